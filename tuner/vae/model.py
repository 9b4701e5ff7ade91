"""What the tuner asks of a model, and the built-in family: the convolutional VAE of the classic MNIST tutorials.

Axes: B batch, C channels, H/W pixels, Z latent. Images are (B, C, H, W) floats in [0, 1].
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.vae.convolution import transpose_convolve
from tuner.vae.parameters import ModelParameters
from tuner.vae.shape import ImageShape

HIDDEN = {1: 128, 3: 512}  # by channels: with fewer, colour reconstructs worse
MOST_CHANNELS = 4  # times the width

OwnModel = Callable[..., nn.Module]  # a user's build(shape, latent_dim, **options)


class Model(nn.Module):
    """The model protocol: a module with these is trained, scored, fitted and exported like the built-in one.

    A user's own needs no more than `encode` and `decode`, and need not inherit from this.
    """

    shape: ImageShape
    latent_dim: int

    @abstractmethod
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) in [0, 1] -> mean (B, Z) and log-variance (B, Z), None for a plain autoencoder."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """(B, Z) -> logits (B, C, H, W); their sigmoid is what is learned to be the image."""


def features(model: Model, images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] -> (B, D), where alike ones are near: what a model's own `features` says, or else
    the means of its latents."""
    known: Callable[[Tensor], Tensor] | None = getattr(model, "features", None)
    return known(images) if known else model.encode(images)[0]


class VAE(Model):
    """Encoder: 3x3 convolutions of stride 2 until the map is 8 or less, fully connected 128 (colour 512), two heads.

    Decoder: its mirror. The first convolution has `width` channels, each next twice as many, 4 width at most: at 28x28
    there are two, as in the tutorials. With `variational=False` it is the plain autoencoder: one head, the latent is
    the mean.
    """

    def __init__(self, shape: ImageShape, latent_dim: int, width: int = 32, variational: bool = True):
        super().__init__()
        self.shape, self.latent_dim, self.width, self.variational = shape, latent_dim, width, variational
        sizes, channels = shape.maps(), channels_of(shape, width)
        self.map = (channels[-1], *sizes[-1])
        flat = channels[-1] * sizes[-1][0] * sizes[-1][1]
        self.down = nn.ModuleList(nn.Conv2d(*pair, 3, stride=2, padding=1) for pair in pairwise(channels))
        self.hidden = nn.Linear(flat, HIDDEN[shape.channels])
        self.mean = nn.Linear(HIDDEN[shape.channels], latent_dim)
        self.log_variance = nn.Linear(HIDDEN[shape.channels], latent_dim) if variational else None
        self.start = nn.Linear(latent_dim, flat)
        self.up = nn.ModuleList(
            (nn.ConvTranspose2d if stage else ToPixels)(
                inputs, kernels, 3, stride=2, padding=1, output_padding=output_padding(size)
            )
            for stage, kernels, inputs, size in reversed([*zip(count(), channels, channels[1:], sizes, strict=False)])
        )

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 128), or (B, 512) in colour: what both heads read."""
        for convolution in self.down:
            images = F.relu(convolution(images), inplace=True)
        return F.relu(self.hidden(images.flatten(1)), inplace=True)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden = self.features(images)
        return self.mean(hidden), None if self.log_variance is None else self.log_variance(hidden)

    def decode(self, latents: Tensor) -> Tensor:
        images = F.relu(self.start(latents), inplace=True).unflatten(1, self.map)
        for convolution in self.up[:-1]:
            images = F.relu(convolution(images), inplace=True)
        logits: Tensor = self.up[-1](images)
        return logits


def channels_of(shape: ImageShape, width: int) -> list[int]:
    """Of the image and of each map after it, from the largest to the smallest."""
    return [shape.channels, *(width * min(2**stage, MOST_CHANNELS) for stage in range(len(shape.maps()) - 1))]


def output_padding(size: Sequence[int]) -> tuple[int, int]:
    """What PyTorch's transposed convolution needs to be told to give a map of `size`, not one that is less by one."""
    return 1 - size[0] % 2, 1 - size[1] % 2


class ToPixels(nn.ConvTranspose2d):
    """The last transposed convolution (3x3, stride 2, padding 1), to few channels: (B, C, h, w) -> (B, K, H, W)."""

    def forward(self, images: Tensor, output_size: list[int] | None = None) -> Tensor:
        if images.device.type != "cpu" or torch.compiler.is_exporting():
            return super().forward(images, output_size)
        assert self.bias is not None
        rows, columns = (
            2 * size - 1 + int(more) for size, more in zip(images.shape[2:], self.output_padding, strict=True)
        )
        last, weight = images.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1)
        return transpose_convolve(last, weight, self.bias, (rows, columns)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Builder:
    """Makes the networks of a run: for images of `shape`; those whose parameters ask for the user's own by `own`."""

    shape: ImageShape
    own: OwnModel | None = None

    def __call__(self, parameters: ModelParameters, seed: int) -> Model:
        """The untrained network of a trial; the same `seed` gives the same weights, whatever ran before.

        Raises ValueError where it is to be the user's own and there is none, or what it gives is no module.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if parameters.model != "own":
                return VAE(self.shape, parameters.latent_dim, parameters.width, parameters.model == "vae")
            if self.own is None:
                raise ValueError("the model is a user's own: its code is wanted (--model MODULE:FUNCTION)")
            made = self.own(self.shape, parameters.latent_dim, **parameters.options)
        if not isinstance(made, nn.Module):
            raise ValueError(f"gives a {type(made).__name__}, expected a torch.nn.Module")
        model = cast(Model, made)
        model.shape, model.latent_dim = self.shape, parameters.latent_dim
        return model
