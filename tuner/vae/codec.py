"""Load an export and use it: encode, edit, decode and sample images."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tuner.vae.data import as_floats
from tuner.vae.fitted import FittedModel
from tuner.vae.model import Builder
from tuner.vae.parameters import Parameters
from tuner.vae.prior import Prior
from tuner.vae.shape import ImageShape


@dataclass(frozen=True)
class Codec:
    """A trained model with frozen weights and the prior its samples come from."""

    fitted: FittedModel
    info: dict[str, Any]  # model.json: parameters, test scores, lineage

    @torch.no_grad()
    def encode(self, images: Tensor | np.ndarray) -> Tensor:
        """Images (B, 28, 28) or (B, 1, 28, 28), uint8 or float in [0, 1] -> latent means (B, Z).

        Raises ValueError on another shape.
        """
        batch = torch.as_tensor(images)
        if batch.shape[-2:] != (28, 28) or batch.dim() not in (3, 4) or (batch.dim() == 4 and batch.shape[1] != 1):
            raise ValueError(f"images are {tuple(batch.shape)}; expected (B, 28, 28) or (B, 1, 28, 28)")
        batch = as_floats(batch) if batch.dtype == torch.uint8 else batch.float()
        mean, _ = self.fitted.model.encode(batch.reshape(-1, 1, 28, 28))
        return mean

    def decode(self, latents: Tensor | np.ndarray) -> Tensor:
        """Latents (B, Z) -> images (B, 1, 28, 28) in [0, 1]."""
        return self.fitted.draw(torch.as_tensor(latents).float())

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """`count` new images (count, 1, 28, 28) in [0, 1] from the fitted prior."""
        return self.decode(self.fitted.prior.sample(count, torch.Generator().manual_seed(seed)))


def load(path: Path | str) -> Codec:
    """Read an export directory: weights.safetensors, prior.npz and model.json.

    Raises ValueError, naming the file, where one is missing or damaged.
    """
    path = Path(path)
    with _reading(path / "model.json") as file:
        info = json.loads(file.read_text())
        parameters, temperature = Parameters.model_validate(info["parameters"]), float(info["temperature"])
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}")
        model = Builder(ImageShape(*info["shape"]))(parameters, seed=0)
    with _reading(path / "weights.safetensors") as file:
        model.load_state_dict(load_file(file))
    with _reading(path / "prior.npz") as file:
        with np.load(file, allow_pickle=False) as arrays:
            prior = Prior.from_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays})
        expected, found = (model.latent_dim, model.latent_dim), tuple(prior.covariances.shape)
        if found[1:] != expected:
            raise ValueError(f"covariances of shape {found}, expected (K, {expected[0]}, {expected[1]})")
    return Codec(FittedModel(model.eval().requires_grad_(False), parameters, prior, temperature), info)


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """Name a file that can't be read: each reader has its own exceptions for a damaged one."""
    try:
        yield file
    except Exception as error:
        raise ValueError(f"{file}: not readable as part of an export: {' '.join(str(error).split())}") from error
