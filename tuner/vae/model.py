"""What the tuner asks of a model, and the built-in one: the convolutional VAE of the classic MNIST tutorials.

Axes: B batch, C channels, H/W pixels, Z latent. Images are (B, 1, 28, 28) floats in [0, 1].
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.vae.convolution import to_pixels
from tuner.vae.parameters import ModelParameters

HIDDEN = 128


class Model(nn.Module):
    """The model protocol: a module with these three is trained, scored, fitted and exported like the built-in one."""

    latent_dim: int

    @abstractmethod
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) in [0, 1] -> mean (B, Z) and log-variance (B, Z), None for a plain autoencoder."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """(B, Z) -> logits (B, C, H, W); their sigmoid is what is learned to be the image."""

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, D), where alike images are near: the means, unless a model knows better."""
        return self.encode(images)[0]


class VAE(Model):
    """Encoder: conv 1 -> width -> 2 width (3x3, stride 2), fully connected 128, two heads. Decoder: its mirror.

    With `variational=False` it is the plain autoencoder that it is taught against: one head, the latent is the mean.
    """

    def __init__(self, latent_dim: int, width: int = 32, variational: bool = True):
        super().__init__()
        self.latent_dim, self.width, self.variational = latent_dim, width, variational
        self.map = (2 * width, 7, 7)
        flat = 2 * width * 7 * 7
        self.down = nn.ModuleList(
            [nn.Conv2d(1, width, 3, stride=2, padding=1), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)]
        )
        self.hidden = nn.Linear(flat, HIDDEN)
        self.mean = nn.Linear(HIDDEN, latent_dim)
        self.log_variance = nn.Linear(HIDDEN, latent_dim) if variational else None
        self.start = nn.Linear(latent_dim, flat)
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1),
                ToPixels(width, 1, 3, stride=2, padding=1, output_padding=1),
            ]
        )

    def features(self, images: Tensor) -> Tensor:
        """The 128 numbers that both heads read."""
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


def build(parameters: ModelParameters, seed: int) -> Model:
    """The untrained network of a trial; the same `seed` gives the same weights, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VAE(parameters.latent_dim, parameters.width, parameters.model == "vae")


class ToPixels(nn.ConvTranspose2d):
    """A transposed convolution to one channel (3x3, stride 2, padding 1): (B, C, H, W) -> (B, 1, 2H, 2W)."""

    def forward(self, images: Tensor, output_size: list[int] | None = None) -> Tensor:
        if images.device.type != "cpu" or torch.compiler.is_exporting():
            return super().forward(images, output_size)
        assert self.bias is not None
        return to_pixels(images.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
