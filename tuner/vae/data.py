"""Images as uint8 tensors in splits."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.vae.shape import ImageShape


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8; labels (N,) int64 from 0, where there are any. Work on them is done where they are."""

    images: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), None if self.labels is None else self.labels.to(device))

    def fingerprint(self) -> str:
        """SHA-256 over pixels and labels, in hex."""
        digest = hashlib.sha256(self.images.contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Data:
    """What a search may see of a data set: all but the test split."""

    train: Split
    validation: Split

    def to(self, device: torch.device) -> "Data":
        return Data(self.train.to(device), self.validation.to(device))

    @property
    def shape(self) -> ImageShape:
        return ImageShape(*self.train.images.shape[1:])

    @property
    def classes(self) -> int | None:
        """How many kinds of labels there are; None without labels."""
        return None if self.train.labels is None else int(self.train.labels.max()) + 1


def spread(images: Tensor, most: int) -> Tensor:
    """At most so many of a split's images (N, ...), from all over it: MNIST's test split begins with the easiest."""
    return images[:: max(1, len(images) // most)][:most]


def as_floats(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 in [0, 1]."""
    return images.float().div_(255)


def binarize(images: Tensor, generator: torch.Generator) -> Tensor:
    """Draw each pixel anew: 255 with the probability that its grey value says, else 0. uint8 of any shape.

    Stochastic binarization, Salakhutdinov & Murray 2008.
    """
    below = torch.randint(255, images.shape, generator=generator, dtype=torch.uint8)
    return torch.where(below.to(images.device) < images, 255, 0).to(torch.uint8)
