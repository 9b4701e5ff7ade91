"""Load an export and use it: encode, edit, decode and sample images."""

import json
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
from tuner.vae.model import Builder, OwnModel
from tuner.vae.parameters import Parameters
from tuner.vae.prior import Prior
from tuner.vae.shape import ImageShape

UNREADABLE = "not readable as part of an export"


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
    """Read an export directory: weights.safetensors, prior.npz and config.json.

    `own` is the code that a user's own model was made by. Raises ValueError, naming the file, where one is missing
    or damaged.
    """
    path = Path(path)
    with refusing(f"{path / 'config.json'}: {UNREADABLE}"):
        info = json.loads((path / "config.json").read_text())
        parameters, temperature = Parameters.model_validate(info["parameters"]), float(info["temperature"])
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}")
        model = Builder(ImageShape(*info["images"]["shape"]), own)(parameters, seed=0)
    with refusing(f"{path / 'weights.safetensors'}: {UNREADABLE}"):
        model.load_state_dict(load_file(path / "weights.safetensors"))
    with refusing(f"{path / 'prior.npz'}: {UNREADABLE}"):
        with np.load(path / "prior.npz", allow_pickle=False) as arrays:
            prior = Prior.from_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays})
        expected, found = (model.latent_dim, model.latent_dim), tuple(prior.covariances.shape)
        if found[1:] != expected:
            raise ValueError(f"covariances of shape {found}, expected (K, {expected[0]}, {expected[1]})")
    return Codec(FittedModel(model.eval().requires_grad_(False), parameters, prior, temperature), info)
