"""A trained model made ready to draw: the prior its latents come from and the temperature of its logits, both fitted.

Fitting the prior after training is ex-post density estimation (Ghosh et al. 2020, section 4).
"""

import copy
import math
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuner.vae.data import Split, as_floats, binarize
from tuner.vae.extractor import CHANNELS_LAST, FeatureExtractor
from tuner.vae.losses import Diverged
from tuner.vae.model import Builder, Model, OwnModel, features
from tuner.vae.moment_matching import match
from tuner.vae.parameters import Parameters
from tuner.vae.prior import Prior, fit_flow, fit_mixture, standard_normal
from tuner.vae.process import CPU
from tuner.vae.seeds import Scoring, Stream, derive_seed, generator
from tuner.vae.shape import ImageShape

BATCH = 100  # a decoder's activations at this size stay in the cache
GREY = 0.1  # pixels above this and below 1 minus it
TEMPERATURE_IMAGES = 1_000
MOST_MATCHED = 1_000  # samples at a step


@dataclass(frozen=True)
class FittedModel:
    """A model with the parameters it was trained with, the prior and temperature it draws with, and its scores."""

    model: Model
    parameters: Parameters
    prior: Prior
    temperature: float = 1.0  # what logits are divided by where images are drawn; no part of training or likelihoods
    epoch: float = 0
    scores: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def draw(self, latents: Tensor) -> Tensor:
        """Latents (N, Z), many at a time -> images (N, C, H, W) in [0, 1]."""
        self.model.eval()
        return torch.cat([_draw(self.model, self.temperature, batch) for batch in latents.split(BATCH)])

    def to(self, device: torch.device) -> "FittedModel":
        """A copy there."""
        return replace(self, model=copy.deepcopy(self.model).to(device), prior=self.prior.to(device))

    def snapshot(self) -> "FittedModel":
        """The same with weights of its own, which training on no longer moves."""
        return replace(self, model=copy.deepcopy(self.model))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and plain containers only."""
        return {
            "shape": list(self.model.shape),
            "parameters": self.parameters.model_dump(),
            "model": {name: tensor.clone() for name, tensor in self.model.state_dict().items()},
            "prior": self.prior.state_dict(),
            "temperature": self.temperature,
            "epoch": self.epoch,
            "scores": self.scores,
        }

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any], own: OwnModel | None = None) -> "FittedModel":
        """Raises KeyError, TypeError, ValueError or RuntimeError on what is no such mapping."""
        parameters = Parameters.model_validate(saved["parameters"])
        model = Builder(ImageShape(*saved["shape"]), own)(parameters, seed=0)
        model.load_state_dict(saved["model"])
        prior = Prior.from_state_dict(saved["prior"])
        prior.place(torch.zeros(1, parameters.latent_dim), torch.zeros(1))
        scores = {name: float(value) for name, value in saved["scores"].items()}
        if not float(saved["temperature"]) > 0:
            raise ValueError(f"temperature is {saved['temperature']!r}")
        return cls(model.eval(), parameters, prior, float(saved["temperature"]), float(saved["epoch"]), scores)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Images in [0, 1] of logits divided by the temperature, as Guo et al. 2017 do for classifiers."""
    return torch.sigmoid(logits * (1 / temperature))


def _draw(model: Model, temperature: float, latents: Tensor) -> Tensor:
    return tempered(model.decode(latents), temperature)


@torch.no_grad()
def encode(model: Model, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) in [0, 1], many at a time -> means and log-variances (N, Z)."""
    model.eval()
    means, log_variances = zip(*(model.encode(batch) for batch in images.split(BATCH)), strict=True)
    known = [log_variance for log_variance in log_variances if log_variance is not None]
    return torch.cat(means), torch.cat(known) if known else None


def grey_share(images: Tensor) -> float:
    """Share of pixels in (0.1, 0.9) of images in [0, 1]."""
    return ((images > GREY) & (images < 1 - GREY)).double().mean().item()


def matching_temperature(logits: Tensor, share: float) -> float:
    """The temperature at which a `share` of the pixels is grey, which is where |logit / temperature| < ln 9."""
    return float(np.quantile(logits.abs().cpu().numpy(), share)) / math.log((1 - GREY) / GREY)


class Fitter:
    """Fits what is fitted after training, on the codes of `count` training images.

    Randomness depends on `seed` alone. Matched mixtures are fitted by the model's own encoder and by a `guide`, an
    extractor that must not be the one that scores them; each of their steps draws a fifth of the `samples` of a score,
    a tenth as many as there are training images or a thousand, whichever is least: more come no closer. Laid out with
    channels last a CPU takes a fifth less time over them. Works where the training images are, and gives what is on the
    CPU.
    """

    def __init__(self, train: Split, *, seed: int, count: int, samples: int, guide: FeatureExtractor | None = None):
        self.images = as_floats(train.images[shuffled(len(train), seed)[:count]])
        self.seed, self.device = seed, self.images.device
        self.matching_count = max(20, min(MOST_MATCHED, samples // 5, len(train) // 10))
        self.guide = guide.on(self.device) if guide else None

    @cached_property
    def training_grey(self) -> float:
        return grey_share(self.images)

    def __call__(self, model: Model, parameters: Parameters, epoch: float = 0) -> FittedModel:
        """A model with the prior and the temperature that its parameters ask for.

        Raises Diverged where codes or temperature are not finite or all codes the same.
        """
        there = copy.deepcopy(model.eval()).to(self.device).to(**CHANNELS_LAST)
        prior = self._prior(there, parameters)
        temperature = self._temperature(there, parameters, prior)
        if parameters.prior == "matched_mixture":
            observers = [partial(features, there)] + ([self.guide.trunk] if self.guide else [])
            seed = derive_seed(self.seed, Stream.SCORE, Scoring.MATCHING)
            draw = partial(_draw, there, temperature)
            prior = match(prior, draw, self.images, observers, self.matching_count, seed)
            temperature = self._temperature(there, parameters, prior)
        return FittedModel(model, parameters, prior.to(CPU), temperature, epoch)

    def _prior(self, model: Model, parameters: Parameters) -> Prior:
        if parameters.prior == "standard_normal":
            return standard_normal(model.latent_dim).to(self.device)
        means, log_variance = encode(model, as_seen(self.images, parameters, self.seed))
        deviations = torch.zeros_like(means) if log_variance is None else torch.exp(0.5 * log_variance)
        seed = derive_seed(self.seed, Stream.SCORE, Scoring.MIXTURE)
        try:
            if parameters.prior == "flow":
                return fit_flow(means, deviations, parameters.prior_components, seed)
            noise = generator(self.seed, Stream.SCORE, Scoring.POSTERIOR)
            latents = means + deviations * torch.randn(means.shape, generator=noise).to(means.device)
            return fit_mixture(latents, parameters.prior_components, seed)
        except ValueError as error:
            raise Diverged(str(error)) from error

    def _temperature(self, model: Model, parameters: Parameters, prior: Prior) -> float:
        if parameters.temperature == "one":
            return 1.0
        latents = prior.sample(TEMPERATURE_IMAGES, generator(self.seed, Stream.SCORE, Scoring.TEMPERATURE))
        with torch.no_grad():
            logits = torch.cat([model.decode(batch) for batch in latents.split(BATCH)])
        temperature = matching_temperature(logits, self.training_grey)
        if not (math.isfinite(temperature) and temperature > 0):
            raise Diverged("temperature is not finite")
        return temperature


def shuffled(count: int, seed: int) -> Tensor:
    """The order (count,) of training images: priors are fitted on the first, floors measured on the last."""
    return torch.randperm(count, generator=generator(seed, Stream.SCORE, Scoring.IMAGES))


def as_seen(images: Tensor, parameters: Parameters, seed: int) -> Tensor:
    """Images in [0, 1] as the model takes them: binary ones are one draw, the same for all models."""
    if parameters.pixels == "grey":
        return images
    drawn = binarize((255 * images).round().to(torch.uint8), generator(seed, Stream.SCORE, Scoring.BINARIZATION))
    return as_floats(drawn)
