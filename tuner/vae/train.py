"""State in, one record per evaluation out: the trial, the retrain and the tests consume the same generator.

Every random number is a function of (study seed, trial number, what it is for, epoch or step), never of
what ran before. So a trial gives the same numbers alone, beside others, on one worker or eight, and a
checkpoint needs no generator state to go on exactly where it stopped.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuner.vae.data import pixels
from tuner.vae.losses import RECONSTRUCTION, kl_divergence
from tuner.vae.model import VAE, build
from tuner.vae.parameters import Parameters

FINITE_CHECK_STEPS = 50  # reading a loss waits for the device, so not every step


class Stream(IntEnum):
    """What a random number is for: streams never share numbers."""

    INITIALISATION = 0
    ORDER = 1
    NOISE = 2
    SCORE = 3
    JUDGE = 4
    PROPOSAL = 5
    RETRAIN = 6
    PROMOTE = 7


def derive_seed(seed: int, *path: int) -> int:
    """A well-mixed 63-bit seed for (seed, *path), all non-negative; the path starts with a Stream."""
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Diverged(ValueError):
    """The loss or a score of a trial is not finite."""


@dataclass
class State:
    """All that training needs to go on: with the trial's parameters and seeds it determines every later number."""

    model: VAE
    optimizer: torch.optim.Optimizer
    step: int = 0

    @classmethod
    def fresh(cls, parameters: Parameters, seed: int, trial: int, device: str = "cpu") -> "State":
        model = build(parameters, derive_seed(seed, Stream.INITIALISATION, trial)).to(device)
        return cls(model, adam(model, parameters.learning_rate))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and plain containers only: `torch.load(weights_only=True)` reads it back."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]


def adam(model: VAE, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)


@dataclass(frozen=True)
class Record:
    """Means over the images seen since the last record."""

    epoch: float
    step: int
    loss: float  # reconstruction + factor * KL, nats or squared error an image
    reconstruction: float
    kl: float  # nats an image
    images: int
    seconds: float


def steps_per_epoch(images: int, batch_size: int) -> int:
    """The short last batch counts as a step."""
    return math.ceil(images / batch_size)


def learning_rate_factor(parameters: Parameters, step: int, total_steps: int) -> float:
    """What `learning_rate` is multiplied by at `step`: a linear warm-up times the schedule, in [0, 1].

    Cosine: (1 + cos(pi * step / total_steps)) / 2, Loshchilov & Hutter 2017, eq. 5 without restarts.
    """
    warmup = min(1.0, (step + 1) / (parameters.warmup_steps + 1))
    if parameters.schedule == "constant":
        return warmup
    return warmup * (1 + math.cos(math.pi * min(step / total_steps, 1.0))) / 2


def train(
    state: State,
    parameters: Parameters,
    images: Tensor,
    epochs: Sequence[float],
    *,
    seed: int,
    trial: int,
    total_epochs: float,
) -> Iterator[Record]:
    """Train `state` in place and yield at each of `epochs` (increasing; those already behind are skipped).

    An epoch is rounded to whole steps, one at least; of epochs that share a step the last is yielded.

    `images` is (N, 1, 28, 28) uint8 on the device of the model. The cosine schedule ends at `total_epochs`.
    Raises Diverged as soon as a loss is seen not to be finite.
    """
    per_epoch = steps_per_epoch(len(images), parameters.batch_size)
    total_steps = max(1, round(total_epochs * per_epoch))
    reconstruction_loss = RECONSTRUCTION[parameters.likelihood]
    variational = parameters.model == "vae"
    warmup_steps = parameters.kl_warmup_epochs * per_epoch
    model, optimizer = state.model, state.optimizer
    order_epoch, order = -1, torch.empty(0)

    stops = {max(1, round(epoch * per_epoch)): epoch for epoch in epochs}
    for last_step, epoch in stops.items():
        if last_step <= state.step:
            continue
        started = time.perf_counter()
        sums = torch.zeros(3, device=images.device)  # loss, reconstruction, KL
        seen = 0
        model.train()
        while state.step < last_step:
            step = state.step
            if step // per_epoch != order_epoch:
                order_epoch = step // per_epoch
                order = torch.randperm(len(images), generator=_generator(seed, Stream.ORDER, trial, order_epoch))
                order = order.to(images.device)
            begin = step % per_epoch * parameters.batch_size
            batch = pixels(images[order[begin : begin + parameters.batch_size]])

            latents, log_variance = model.encode(batch)
            kl = torch.zeros_like(sums[:1])
            if variational:
                assert log_variance is not None
                kl = kl_divergence(latents, log_variance)
                noise = torch.randn(latents.shape, generator=_generator(seed, Stream.NOISE, trial, step))
                latents = latents + torch.exp(0.5 * log_variance) * noise.to(latents.device)
            reconstruction = reconstruction_loss(model.decode(latents), batch)
            factor = parameters.kl_weight * (min(1.0, step / warmup_steps) if warmup_steps else 1.0)
            loss = reconstruction.mean() + factor * kl.mean()

            for group in optimizer.param_groups:
                group["lr"] = parameters.learning_rate * learning_rate_factor(parameters, step, total_steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

            sums += torch.stack([loss, reconstruction.mean(), kl.mean()]).detach() * len(batch)
            seen += len(batch)
            state.step = step + 1
            check = state.step % FINITE_CHECK_STEPS == 0 or state.step == last_step
            if check and not bool(torch.isfinite(sums).all()):
                raise Diverged(f"training loss not finite at epoch {state.step / per_epoch:.3g}")
        loss_mean, reconstruction_mean, kl_mean = (sums / seen).tolist()
        yield Record(epoch, state.step, loss_mean, reconstruction_mean, kl_mean, seen, time.perf_counter() - started)


def _generator(seed: int, *path: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, *path))
