"""One optimiser step behind one interface: `AutogradStep`, the reference for any model, and `WrittenOutStep`, which
computes the same to rounding for the built-in family, faster, and is held to that by tests."""

import copy
import operator
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tuner.vae.array import BETAS, EPSILON, Array, ArrayShape, running_mse
from tuner.vae.losses import RECONSTRUCTION, kl_divergence
from tuner.vae.model import VAE, Builder, Model
from tuner.vae.parameters import ModelParameters, TrainingParameters
from tuner.vae.seeds import Stream, derive_seed


@dataclass
class State:
    """All that training needs to go on: with the trial's parameters and seeds it determines every later number.

    `averages` (2, P) are Adam's running means of the gradients and of their squares, of the weights end to end; `mse`
    is that of the squared error a pixel, kept where the KL weight is counted in it.
    """

    model: Model
    averages: Tensor
    step: int = 0
    mse: float = 0.0

    @classmethod
    def fresh(cls, builder: Builder, parameters: ModelParameters, seed: int, trial: int) -> "State":
        return cls.of(builder(parameters, derive_seed(seed, Stream.INITIALISATION, trial)))

    @classmethod
    def of(cls, model: Model) -> "State":
        """A model before its first step."""
        return cls(model, torch.zeros(2, sum(weight.numel() for weight in model.parameters())))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and plain containers only: `torch.load(weights_only=True)` reads it back."""
        return {"model": self.model.state_dict(), "averages": self.averages, "step": self.step, "mse": self.mse}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.averages.copy_(saved["averages"])
        self.step, self.mse = operator.index(saved["step"]), float(saved["mse"])


class Factors(NamedTuple):
    """What changes from step to step beside the images."""

    learning_rate: float
    kl: float  # on the KL term against the summed reconstruction error, in the unit of `kl_unit`


class Step(Protocol):
    """Trains a copy of a state's model on its own device; the state learns of it at `store`."""

    def __call__(self, images: Tensor, noise: Tensor, factors: Factors) -> Tensor:
        """One step on images (B, C, H, W) in [0, 1] with noise (B, Z) -> (3,): means of loss, reconstruction and KL."""

    def store(self) -> None:
        """Write weights, averages and the number of steps back into the state."""


StepMaker = Callable[[State, TrainingParameters, torch.device], Step]


def fastest_step(state: State, parameters: TrainingParameters, device: torch.device) -> Step:
    """The written-out step for the built-in family, the reference for any other model."""
    return (WrittenOutStep if type(state.model) is VAE else AutogradStep)(state, parameters, device)


class AutogradStep:
    """The reference: the losses of `losses.py`, autograd and PyTorch's fused Adam."""

    def __init__(self, state: State, parameters: TrainingParameters, device: torch.device):
        self.state, self.reconstruction = state, RECONSTRUCTION[parameters.likelihood]
        low = parameters.precision == "bfloat16"
        self.precision = torch.autocast(device.type, torch.bfloat16) if low else nullcontext()
        self.calibrated, self.mse = parameters.kl_unit == "calibrated", torch.tensor(state.mse, device=device)
        self.model = copy.deepcopy(state.model).to(device).train()
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(self.model.parameters(), betas=BETAS, eps=EPSILON, fused=True)
        weights = list(self.model.parameters())
        rows = state.averages.split([weight.numel() for weight in weights], 1)
        for weight, row in zip(weights, rows, strict=True):
            mean, square = (torch.empty_like(weight).copy_(part.view(weight.shape)).detach() for part in row)
            step = torch.tensor(float(state.step), device=device)
            self.optimizer.state[weight] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        self.steps = state.step

    def __call__(self, images: Tensor, noise: Tensor, factors: Factors) -> Tensor:
        with self.precision:
            mean, log_variance = self.model.encode(images)
        mean = mean.float()
        latents = mean
        if log_variance is not None:
            log_variance = log_variance.float()
            latents = mean + torch.exp(0.5 * log_variance) * noise
        with self.precision:
            logits = self.model.decode(latents)
        reconstruction = self.reconstruction(logits.float(), images).mean()
        kl = mean.new_zeros(()) if log_variance is None else kl_divergence(mean, log_variance).mean()
        factor: float | Tensor = factors.kl
        if self.calibrated:
            self.mse = running_mse(self.mse, reconstruction.detach(), self.model.shape)
            factor = factors.kl * 2 * self.mse
        loss = reconstruction + factor * kl
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.param_groups[0]["lr"] = factors.learning_rate
        self.optimizer.step()
        self.steps += 1
        return torch.stack([loss, reconstruction, kl]).detach()

    @torch.no_grad()
    def store(self) -> None:
        self.state.model.load_state_dict(self.model.state_dict())
        kept = [self.optimizer.state[weight] for weight in self.model.parameters()]
        for row, name in zip(self.state.averages, ("exp_avg", "exp_avg_sq"), strict=True):
            row.copy_(torch.cat([of_weight[name].flatten() for of_weight in kept]))
        self.state.step, self.state.mse = self.steps, self.mse.item()


class WrittenOutStep:
    """An array of one."""

    def __init__(self, state: State, parameters: TrainingParameters, device: torch.device):
        assert type(state.model) is VAE
        self.state, self.model, self.steps = state, state.model, state.step
        self.array = Array(ArrayShape.of(self.model, parameters), device=device)
        self.array.load(0, self.model, state.averages, state.mse)

    def __call__(self, images: Tensor, noise: Tensor, factors: Factors) -> Tensor:
        share = torch.full((1, len(images)), 1 / len(images), device=images.device)
        kl_factor = torch.tensor([factors.kl], device=images.device)
        means = self.array.backward(images.permute(0, 2, 3, 1).unsqueeze(0), share, noise.unsqueeze(0), kl_factor)
        self.array.update(0, factors.learning_rate, self.steps)
        self.steps += 1
        return means[0]

    def store(self) -> None:
        self.state.mse = self.array.store(0, self.model, self.state.averages)
        self.state.step = self.steps
