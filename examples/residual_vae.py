"""A model of your own: a residual VAE for images of any size that is a multiple of 4, such as CIFAR-10's 32x32 colour.

The tuner calls `build` for each trial, with the shape of the images, the latents that the trial is to have, and the
options that the spec searches or fixes as `model.depth` and `model.width`. What `build` returns needs two methods:

    encode(images (B, C, H, W) in [0, 1]) -> mean (B, Z) and log-variance (B, Z)
    decode(latents (B, Z)) -> logits (B, C, H, W), whose sigmoid is the image

Losses, sampling of latents, training, scores, checkpoints and the export are the tuner's.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """x + f(x): what a block has to learn is a correction, so that many of them still train (He et al. 2016).

    In between are half as many channels: nearly as good, and a third faster.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.second = nn.Conv2d(channels // 2, channels, 1)
        nn.init.zeros_(self.second.weight)  # at first it changes nothing

    def forward(self, images: Tensor) -> Tensor:
        return images + self.second(F.relu(self.first(F.relu(images))))


class ResidualVAE(nn.Module):
    """Images become patches of 4x4 pixels at once, so that blocks work on small maps: that is what makes it fast."""

    def __init__(self, shape: tuple[int, int, int], latent_dim: int, depth: int, width: int):
        super().__init__()
        channels, height, width_of_images = shape
        self.map = (width, height // 4, width_of_images // 4)
        flat = width * (height // 4) * (width_of_images // 4)
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=4),
            *(Residual(width) for _ in range(depth)),
            nn.Flatten(),
            nn.ReLU(),
            nn.Linear(flat, 2 * latent_dim),  # mean and log-variance side by side
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, flat),
            nn.Unflatten(1, self.map),
            *(Residual(width) for _ in range(depth)),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, stride=4),
        )

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


def build(shape: tuple[int, int, int], latent_dim: int, depth: int = 2, width: int = 64) -> nn.Module:
    """What `--model examples.residual_vae:build` names."""
    return ResidualVAE(shape, latent_dim, depth, width)
