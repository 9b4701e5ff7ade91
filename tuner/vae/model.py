"""The convolutional VAE of the classic MNIST tutorials, and the plain autoencoder it is taught against.

Axes: B batch, C channels, H/W pixels, Z latent. Images are (B, 1, 28, 28) floats in [0, 1].
"""

import torch
from torch import Tensor, nn

from tuner.vae.convolution import to_pixels
from tuner.vae.parameters import Parameters


class VAE(nn.Module):
    """Encoder: conv 1 -> width -> 2 width (3x3, stride 2), fully connected 128, two heads. Decoder: its mirror.

    With `variational=False` it is a plain autoencoder: one head, the latent is the mean.

    `contrast` is what logits are multiplied by where images are drawn; it has no part in training or likelihoods.
    """

    contrast: Tensor

    def __init__(self, latent_dim: int, width: int = 32, variational: bool = True):
        super().__init__()
        self.latent_dim = latent_dim
        self.variational = variational
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(2 * width * 7 * 7, 128),
            nn.ReLU(inplace=True),
        )
        self.mean = nn.Linear(128, latent_dim)
        self.log_variance = nn.Linear(128, latent_dim) if variational else None
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 2 * width * 7 * 7),
            nn.ReLU(inplace=True),
            nn.Unflatten(1, (2 * width, 7, 7)),
            nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(inplace=True),
            ToPixels(width, 1, 3, stride=2, padding=1, output_padding=1),
        )
        self.register_buffer("contrast", torch.ones(()))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 1, 28, 28) -> mean (B, Z) and log-variance (B, Z), None for the plain autoencoder."""
        hidden = self.encoder(images)
        return self.mean(hidden), None if self.log_variance is None else self.log_variance(hidden)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, Z) -> logits (B, 1, 28, 28); their sigmoid is what is learned to be the image."""
        logits: Tensor = self.decoder(latents)
        return logits

    def draw(self, latents: Tensor) -> Tensor:
        """(B, Z) -> images (B, 1, 28, 28) in [0, 1]."""
        return torch.sigmoid(self.contrast * self.decode(latents))


def build(parameters: Parameters, seed: int) -> VAE:
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
