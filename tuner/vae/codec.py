"""Load an export and use it: encode, edit, decode and sample images, and tell how likely they are."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tuner.vae.data import as_floats
from tuner.vae.errors import refusing
from tuner.vae.fitted import FittedModel
from tuner.vae.losses import bernoulli_nll, kl_divergence, squared_error
from tuner.vae.model import Builder, OwnModel
from tuner.vae.parameters import Parameters
from tuner.vae.prior import Prior
from tuner.vae.shape import ImageShape

UNREADABLE = "not readable as part of an export"
SATURATED = 1e-7  # a pixel this near to 0 or 1 tells no logit any more
Program = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Codec:
    """A trained model with frozen weights and the prior its samples come from."""

    fitted: FittedModel
    info: dict[str, Any]  # config.json: images, parameters, test scores, lineage

    @torch.no_grad()
    def encode(self, images: Tensor | np.ndarray) -> Tensor:
        """Images (B, C, H, W) or (B, H, W, C), grey also (B, H, W), uint8 or float in [0, 1] -> latent means (B, Z).

        Raises ValueError on another shape or other values.
        """
        channels, height, width = self.fitted.model.shape
        batch = torch.as_tensor(images)
        forms = [(channels, height, width), (height, width, channels), *([(height, width)] if channels == 1 else [])]
        if tuple(batch.shape[1:]) not in forms:
            expected = " or ".join(f"(B, {', '.join(map(str, form))})" for form in forms)
            raise ValueError(f"images are {tuple(batch.shape)}; expected {expected}")
        if batch.dtype != torch.uint8 and not (batch.is_floating_point() and bool(((batch >= 0) & (batch <= 1)).all())):
            raise ValueError("images are neither uint8 nor floats in [0, 1]")
        batch = as_floats(batch) if batch.dtype == torch.uint8 else batch.float()
        batch = batch.movedim(3, 1) if batch.shape[3:] == (channels,) else batch
        mean, _ = self.fitted.model.encode(batch.reshape(-1, channels, height, width))
        return mean

    def decode(self, latents: Tensor | np.ndarray) -> Tensor:
        """Latents (B, Z) -> images (B, C, H, W) in [0, 1]."""
        return self.fitted.draw(torch.as_tensor(latents).float())

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """`count` new images (count, C, H, W) in [0, 1] from the fitted prior."""
        return self.decode(self.fitted.prior.sample(count, torch.Generator().manual_seed(seed)))


def load(path: Path | str, own: OwnModel | None = None) -> Codec:
    """Read an export directory: config.json, model.safetensors and prior.safetensors.

    `own` is the code that a user's own model was made by. Raises ValueError, naming the file, where one is missing
    or damaged.
    """
    path = Path(path)
    with refusing(f"{path / 'config.json'}: {UNREADABLE}"):
        info = json.loads((path / "config.json").read_text("utf-8"))
        parameters, temperature = Parameters.model_validate(info["parameters"]), float(info["temperature"])
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}")
        model = Builder(ImageShape(*info["images"]["shape"]), own)(parameters, seed=0)
    with refusing(f"{path / 'model.safetensors'}: {UNREADABLE}"):
        model.load_state_dict(load_file(path / "model.safetensors"))
    with refusing(f"{path / 'prior.safetensors'}: {UNREADABLE}"):
        prior = Prior.from_state_dict(load_file(path / "prior.safetensors"))
        drawn = prior.place(torch.zeros(2, model.latent_dim), torch.tensor([0.0, 1.0]))
        if drawn.shape[1] != model.latent_dim:
            raise ValueError(f"gives {drawn.shape[1]} numbers where the model takes {model.latent_dim}")
    return Codec(FittedModel(model.eval().requires_grad_(False), parameters, prior, temperature), info)


@torch.no_grad()
def negative_elbo(
    encode: Program, decode: Program, images: Tensor, temperature: float, variance: float | None
) -> Tensor:
    """A bound on -log p(x) of images (B, C, H, W) in [0, 1], in nats (B,), at one draw of noise, the same for all.

    `encode` gives means and log-variances, if it has any; `decode` images at the temperature, which is taken back.
    `variance` is that of a Gaussian decoder, per pixel; None for a Bernoulli one.
    """
    latents, log_variance = (*encode(images), None)[:2]
    rate = torch.zeros(len(images), dtype=torch.float64)
    if log_variance is not None:
        rate = kl_divergence(latents.double(), log_variance.double())
        noise = torch.randn(latents.shape[1], generator=torch.Generator().manual_seed(0))
        latents = latents + torch.exp(0.5 * log_variance) * noise
    logits, images = temperature * decode(latents).double().logit(SATURATED), images.double()
    if variance is None:
        return rate + bernoulli_nll(logits, images)
    constant = images[0].numel() / 2 * math.log(2 * math.pi * variance)
    return rate + squared_error(logits, images) / (2 * variance) + constant
