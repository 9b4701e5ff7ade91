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

from tuner.vae.array import Array
from tuner.vae.data import binarize, pixels
from tuner.vae.model import VAE, build
from tuner.vae.parameters import Parameters

FINITE_CHECK_STEPS = 50  # reading a loss waits for a GPU, so not every step


class Stream(IntEnum):
    """What a random number is for: streams never share numbers."""

    INITIALISATION = 0
    ORDER = 1
    NOISE = 2
    SCORE = 3
    EXTRACTOR = 4
    PROPOSAL = 5
    RETRAIN = 6
    PROMOTE = 7
    PIXELS = 8


def derive_seed(seed: int, *path: int) -> int:
    """A well-mixed 63-bit seed for (seed, *path), all non-negative; the path starts with a Stream."""
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Diverged(ValueError):
    """The loss or a score of a trial is not finite."""


@dataclass
class State:
    """All that training needs to go on: with the trial's parameters and seeds it determines every later number.

    `moments` (2, P) are Adam's, of the model's weights end to end.
    """

    model: VAE
    moments: Tensor
    step: int = 0

    @classmethod
    def fresh(cls, parameters: Parameters, seed: int, trial: int) -> "State":
        model = build(parameters, derive_seed(seed, Stream.INITIALISATION, trial))
        return cls(model, torch.zeros(2, sum(weight.numel() for weight in model.parameters())))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and plain containers only: `torch.load(weights_only=True)` reads it back."""
        return {"model": self.model.state_dict(), "moments": self.moments, "step": self.step}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.moments.copy_(saved["moments"])
        self.step = saved["step"]


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


def stops(parameters: Parameters, images: int, epochs: Sequence[float], behind: int = 0) -> dict[int, float]:
    """The steps after `behind` at which `epochs` end, and which they are.

    Whole steps, one at least; of epochs that share a step the last counts.
    """
    per_epoch = steps_per_epoch(images, parameters.batch_size)
    ends = {max(1, round(epoch * per_epoch)): epoch for epoch in epochs}
    return {step: epoch for step, epoch in ends.items() if step > behind}


def learning_rate_factor(parameters: Parameters, step: int, total_steps: int) -> float:
    """What `learning_rate` is multiplied by at `step`: a linear warm-up times the schedule, in [0, 1].

    Cosine: (1 + cos(pi * step / total_steps)) / 2, Loshchilov & Hutter 2017, eq. 5 without restarts.
    """
    warmup = min(1.0, (step + 1) / (parameters.warmup_steps + 1))
    if parameters.schedule == "constant":
        return warmup
    return warmup * (1 + math.cos(math.pi * min(step / total_steps, 1.0))) / 2


class StepInputs:
    """What a trial's training is fed at each step: a function of (seed, trial, step) and the parameters alone."""

    def __init__(self, parameters: Parameters, images: int, *, seed: int, trial: int, total_epochs: float):
        self.parameters, self.images, self.seed, self.trial = parameters, images, seed, trial
        self.per_epoch = steps_per_epoch(images, parameters.batch_size)
        self.total_steps = max(1, round(total_epochs * self.per_epoch))
        self.epoch = -1
        self.order, self.noise = torch.empty(0), torch.empty(0)

    def draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The order (N,) of the images and the noise (N, Z) of an epoch."""
        order = torch.randperm(self.images, generator=_generator(self.seed, Stream.ORDER, self.trial, epoch))
        generator = _generator(self.seed, Stream.NOISE, self.trial, epoch)
        return order, torch.randn(self.images, self.parameters.latent_dim, generator=generator)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The images' indices (B,) and the noise (B, Z) of a step; an epoch's last batch may be short."""
        if step // self.per_epoch != self.epoch:
            self.epoch = step // self.per_epoch
            self.order, self.noise = self.draw(self.epoch)
        first = step % self.per_epoch * self.parameters.batch_size
        part = slice(first, first + self.parameters.batch_size)
        return self.order[part], self.noise[part]

    def learning_rate(self, step: int) -> float:
        return self.parameters.learning_rate * learning_rate_factor(self.parameters, step, self.total_steps)

    def kl_factor(self, step: int) -> float:
        warmup = self.parameters.kl_warmup_epochs * self.per_epoch
        return self.parameters.kl_weight * (min(1.0, step / warmup) if warmup else 1.0)


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
    """Train `state` and yield at each of `epochs` (increasing; those already behind are skipped).

    An epoch is rounded to whole steps, one at least; of epochs that share a step the last is yielded. In between,
    `state` is as it was at the last record.

    `images` is (N, 1, 28, 28) uint8, on the device to train on; `state` stays on the CPU. The cosine schedule ends
    at `total_epochs`. Raises Diverged as soon as a loss is seen not to be finite.
    """
    feed = StepInputs(parameters, len(images), seed=seed, trial=trial, total_epochs=total_epochs)
    device = images.device
    array = Array(parameters, device=device)
    array.load(0, state.model, state.moments)
    for last_step, epoch in stops(parameters, len(images), epochs, state.step).items():
        started = time.perf_counter()
        sums = torch.zeros(3, device=device)  # loss, reconstruction, KL
        seen = 0
        for step in range(state.step, last_step):
            order, noise = feed.batch(step)
            count = len(order)
            drawn = images[order.to(device)]
            if parameters.pixels == "binary":
                drawn = binarize(drawn, _generator(seed, Stream.PIXELS, trial, step))
            batch = pixels(drawn).view(1, count, 28, 28)
            share = torch.full((1, count), 1 / count, device=device)
            factor = torch.tensor([feed.kl_factor(step)], device=device)
            means = array.backward(batch, share, noise.unsqueeze(0).to(device), factor)
            array.update(0, feed.learning_rate(step), step)
            sums += means[0] * count
            seen += count
            check = (step + 1) % FINITE_CHECK_STEPS == 0 or step + 1 == last_step
            if check and not bool(torch.isfinite(sums).all()):
                raise Diverged(f"training loss not finite at epoch {(step + 1) / feed.per_epoch:.3g}")
        array.store(0, state.model, state.moments)
        state.step = last_step
        loss, reconstruction, kl = (sums / seen).tolist()
        yield Record(epoch, last_step, loss, reconstruction, kl, seen, time.perf_counter() - started)


def _generator(seed: int, *path: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, *path))
