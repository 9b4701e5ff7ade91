"""Load an export and use it: encode, edit, decode and sample images."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tuner.vae.data import pixels
from tuner.vae.model import VAE, build
from tuner.vae.parameters import Parameters
from tuner.vae.prior import Prior


@dataclass(frozen=True)
class Codec:
    """A trained model with frozen weights and the prior its samples come from."""

    model: VAE
    prior: Prior
    info: dict[str, Any]  # model.json: parameters, test scores, lineage

    @torch.no_grad()
    def encode(self, images: Tensor | np.ndarray) -> Tensor:
        """Images (B, 28, 28) or (B, 1, 28, 28), uint8 or float in [0, 1] -> latent means (B, Z).

        Raises ValueError on another shape.
        """
        batch = torch.as_tensor(images)
        if batch.shape[-2:] != (28, 28) or batch.dim() not in (3, 4) or (batch.dim() == 4 and batch.shape[1] != 1):
            raise ValueError(f"images are {tuple(batch.shape)}; expected (B, 28, 28) or (B, 1, 28, 28)")
        batch = pixels(batch) if batch.dtype == torch.uint8 else batch.float()
        mean, _ = self.model.encode(batch.reshape(-1, 1, 28, 28))
        return mean

    @torch.no_grad()
    def decode(self, latents: Tensor | np.ndarray) -> Tensor:
        """Latents (B, Z) -> images (B, 1, 28, 28) in [0, 1]."""
        return self.model.draw(torch.as_tensor(latents).float())

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """`count` new images (count, 1, 28, 28) in [0, 1] from the fitted prior."""
        return self.decode(self.prior.sample(count, torch.Generator().manual_seed(seed)))


def load(path: Path | str) -> Codec:
    """Read an export directory: weights.safetensors, prior.npz and model.json.

    Raises ValueError, naming the file, where one is missing or damaged.
    """
    path = Path(path)
    try:
        file = path / "model.json"
        info = json.loads(file.read_text())
        parameters = Parameters.model_validate(info["parameters"])
        model = build(parameters, seed=0)
        file = path / "weights.safetensors"
        model.load_state_dict(load_file(file))
        file = path / "prior.npz"
        with np.load(file, allow_pickle=False) as arrays:
            prior = Prior.from_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays})
        latents = (parameters.latent_dim, parameters.latent_dim)
        if prior.covariances.shape[1:] != latents:
            raise ValueError(
                f"covariances of shape {tuple(prior.covariances.shape)}, expected (K, {latents[0]}, {latents[1]})"
            )
    except Exception as error:  # each reader has its own exceptions for a damaged file
        raise ValueError(f"{file}: not readable as part of an export: {' '.join(str(error).split())}") from error
    return Codec(model.eval().requires_grad_(False), prior, info)
