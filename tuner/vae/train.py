"""State in, one record per evaluation out: the trial, the retrain and the tests consume the same generator."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.vae.data import as_floats, binarize
from tuner.vae.losses import Diverged
from tuner.vae.parameters import TrainingParameters
from tuner.vae.seeds import Stream, generator
from tuner.vae.step import Factors, State, StepMaker, fastest_step

FINITE_CHECK_STEPS = 50  # reading a loss waits for a GPU, so not every step


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


def stops(parameters: TrainingParameters, images: int, epochs: Sequence[float], behind: int = 0) -> dict[int, float]:
    """The steps after `behind` at which `epochs` end, and which they are.

    Whole steps, one at least; of epochs that share a step the last counts.
    """
    per_epoch = steps_per_epoch(images, parameters.batch_size)
    ends = {max(1, round(epoch * per_epoch)): epoch for epoch in epochs}
    return {step: epoch for step, epoch in ends.items() if step > behind}


def learning_rate_factor(parameters: TrainingParameters, step: int, total_steps: int) -> float:
    """What `learning_rate` is multiplied by at `step`: a linear warm-up times the schedule, in [0, 1].

    Cosine: (1 + cos(pi * step / total_steps)) / 2, Loshchilov & Hutter 2017, eq. 5 without restarts.
    """
    warmup = min(1.0, (step + 1) / (parameters.warmup_steps + 1))
    if parameters.schedule == "constant":
        return warmup
    return warmup * (1 + math.cos(math.pi * min(step / total_steps, 1.0))) / 2


class StepInputs:
    """What a trial's steps are fed: a function of (seed, trial, step) and the parameters alone."""

    def __init__(
        self,
        parameters: TrainingParameters,
        images: int,
        latent_dim: int,
        *,
        seed: int,
        trial: int,
        total_epochs: float,
    ):
        self.parameters, self.images, self.latent_dim = parameters, images, latent_dim
        self.seed, self.trial = seed, trial
        self.per_epoch = steps_per_epoch(images, parameters.batch_size)
        self.total_steps = max(1, round(total_epochs * self.per_epoch))
        self.epoch = -1
        self.order, self.noise = torch.empty(0), torch.empty(0)

    def draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The order (N,) of the images and the noise (N, Z) of an epoch."""
        order = torch.randperm(self.images, generator=generator(self.seed, Stream.ORDER, self.trial, epoch))
        noise = generator(self.seed, Stream.NOISE, self.trial, epoch)
        return order, torch.randn(self.images, self.latent_dim, generator=noise)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The images' indices (B,) and the noise (B, Z) of a step; an epoch's last batch may be short."""
        if step // self.per_epoch != self.epoch:
            self.epoch = step // self.per_epoch
            self.order, self.noise = self.draw(self.epoch)
        first = step % self.per_epoch * self.parameters.batch_size
        part = slice(first, first + self.parameters.batch_size)
        return self.order[part], self.noise[part]

    def factors(self, step: int) -> Factors:
        warmup = self.parameters.kl_warmup_epochs * self.per_epoch
        learning_rate = self.parameters.learning_rate * learning_rate_factor(self.parameters, step, self.total_steps)
        return Factors(learning_rate, self.parameters.kl_weight * (min(1.0, step / warmup) if warmup else 1.0))


def train(
    state: State,
    parameters: TrainingParameters,
    images: Tensor,
    epochs: Sequence[float],
    *,
    seed: int,
    trial: int,
    total_epochs: float,
    make_step: StepMaker = fastest_step,
) -> Iterator[Record]:
    """Train `state` and yield at each of `epochs`, increasing, that is not behind, rounded as in `stops`.

    In between, `state` is as it was at the last record. `images` is (N, C, H, W) uint8, on the device to train on;
    `state` stays on the CPU. The cosine schedule ends at `total_epochs`. Raises Diverged as soon as a loss is seen not
    to be finite.
    """
    latent_dim, device = state.model.latent_dim, images.device
    inputs = StepInputs(parameters, len(images), latent_dim, seed=seed, trial=trial, total_epochs=total_epochs)
    take_step = make_step(state, parameters, device)
    for last_step, epoch in stops(parameters, len(images), epochs, state.step).items():
        started = time.perf_counter()
        sums = torch.zeros(3, device=device)  # loss, reconstruction, KL
        seen = 0
        for step in range(state.step, last_step):
            order, noise = inputs.batch(step)
            batch = images[order.to(device)]
            if parameters.pixels == "binary":
                batch = binarize(batch, generator(seed, Stream.PIXELS, trial, step))
            sums += take_step(as_floats(batch), noise.to(device), inputs.factors(step)) * len(order)
            seen += len(order)
            check = (step + 1) % FINITE_CHECK_STEPS == 0 or step + 1 == last_step
            if check and not bool(torch.isfinite(sums).all()):
                raise Diverged(f"training loss not finite at epoch {(step + 1) / inputs.per_epoch:.3g}")
        take_step.store()
        loss, reconstruction, kl = (sums / seen).tolist()
        yield Record(epoch, last_step, loss, reconstruction, kl, seen, time.perf_counter() - started)
