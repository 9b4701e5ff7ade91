"""What a model draws, as grey pictures: every model gets the same noise and the same held-out digits."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tuner.vae.model import VAE
from tuner.vae.prior import Prior, standard_normal

GAP = 2  # pixels between images
PAPER = 255
COLUMNS = 8
LARGEST_LATENT = 512
TRAVERSED = 10  # latents in a traversal, those that vary most
MANIFOLD = 15  # images along each side


def grid(images: Tensor, columns: int, scale: int = 1) -> np.ndarray:
    """Images (N, 1, H, W) in [0, 1], ink 1, row by row -> uint8 picture (rows, columns) with dark ink on white."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    picture = torch.full((rows, height + GAP, columns, width + GAP), PAPER, dtype=torch.uint8)
    ink = (255 - images.clamp(0, 1) * 255).round().to(torch.uint8)[:, 0]
    for index in range(count):
        picture[index // columns, :height, index % columns, :width] = ink[index]
    flat = picture.reshape(rows * (height + GAP), columns * (width + GAP))[:-GAP, :-GAP].numpy()
    return flat.repeat(scale, 0).repeat(scale, 1)


def png(picture: np.ndarray) -> bytes:
    """A grey uint8 picture (H, W) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def fixed_noise(count: int) -> tuple[Tensor, Tensor]:
    """The one draw that all grids share: normal (count, 512) and uniform (count,); a prefix for fewer or smaller."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(1024, generator=generator)
    return torch.randn(count, LARGEST_LATENT, generator=generator), uniform[:count]


@torch.no_grad()
def samples(model: VAE, prior: Prior, count: int) -> Tensor:
    """`count` images (count, 1, 28, 28) from `prior` at the fixed noise."""
    model.eval()
    return model.draw(prior.place(*fixed_noise(count)))


@torch.no_grad()
def image_grids(model: VAE, prior: Prior, held_out: Tensor) -> dict[str, np.ndarray]:
    """Pictures (H, W) uint8 by name: samples from the prior and from N(0, I), reconstructions, traversal, manifold.

    `held_out` is (N, 1, 28, 28) in [0, 1]; each of its rows is followed by the row of its reconstructions.
    """
    model.eval()
    means, _ = model.encode(held_out)
    rows = zip(held_out.split(COLUMNS), model.draw(means).split(COLUMNS), strict=True)
    pictures = {
        "samples/fitted_prior": grid(samples(model, prior, 64), COLUMNS),
        "samples/standard_normal": grid(samples(model, standard_normal(model.latent_dim), 64), COLUMNS),
        "reconstructions/above_and_below": grid(torch.cat([image for pair in rows for image in pair]), COLUMNS),
        "latent/traversal": grid(traversal(model, means), columns=9),
    }
    if model.latent_dim == 2:
        pictures["latent/manifold"] = grid(manifold(model, means), columns=MANIFOLD)
    return pictures


@torch.no_grad()
def traversal(model: VAE, means: Tensor) -> Tensor:
    """One row for each of the latents that vary most: the first image moved from -3 to +3 standard deviations.

    `means` are encoded images (N, Z); returns (rows * 9, 1, 28, 28).
    """
    spread = means.std(0)
    latents = []
    for unit in spread.argsort(descending=True, stable=True)[:TRAVERSED].tolist():
        moved = means[:1].repeat(9, 1)
        moved[:, unit] = means[:, unit].mean() + torch.linspace(-3, 3, 9) * spread[unit]
        latents.append(moved)
    return model.draw(torch.cat(latents))


@torch.no_grad()
def manifold(model: VAE, means: Tensor) -> Tensor:
    """A 2-dimensional latent space as a square of images, 2 standard deviations of `means` (N, 2) to each side."""
    steps = torch.linspace(-2, 2, MANIFOLD)
    axes = [means[:, unit].mean() + steps * means[:, unit].std() for unit in range(2)]
    return model.draw(torch.cartesian_prod(axes[1].flip(0), axes[0]).flip(1))
