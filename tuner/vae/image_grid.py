"""What a model draws, as grey pictures: every model gets the same noise and the same held-out digits."""

import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tuner.vae.fitted import FittedModel, encode
from tuner.vae.prior import standard_normal

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


def samples(fitted: FittedModel, count: int) -> Tensor:
    """`count` images (count, C, H, W) from the fitted prior at the fixed noise."""
    return fitted.draw(fitted.prior.place(*fixed_noise(count)))


@torch.no_grad()
def image_grids(fitted: FittedModel, held_out: Tensor) -> dict[str, np.ndarray]:
    """Pictures (H, W) uint8 by name: samples from the prior and from N(0, I), reconstructions, traversal, manifold.

    `held_out` is (N, C, H, W) in [0, 1]; each of its rows is followed by the row of its reconstructions.
    """
    means, _ = encode(fitted.model, held_out)
    latent_dim = fitted.model.latent_dim
    pictures = {
        "samples/fitted_prior": grid(samples(fitted, 64), COLUMNS),
        "samples/standard_normal": grid(samples(replace(fitted, prior=standard_normal(latent_dim)), 64), COLUMNS),
        "reconstructions/above_and_below": grid(interleaved(held_out, fitted.draw(means), COLUMNS), COLUMNS),
        "latent/traversal": grid(traversal(fitted, means), columns=9),
    }
    if latent_dim == 2:
        pictures["latent/manifold"] = grid(manifold(fitted, means), columns=MANIFOLD)
    return pictures


def interleaved(above: Tensor, below: Tensor, columns: int) -> Tensor:
    """Two sets of images (N, C, H, W), a row of `columns` of the one followed by a row of the other."""
    rows = zip(above.split(columns), below.split(columns), strict=True)
    return torch.cat([image for pair in rows for image in pair])


def traversal(fitted: FittedModel, means: Tensor) -> Tensor:
    """One row for each of the latents that vary most: the first image moved from -3 to +3 standard deviations.

    `means` are encoded images (N, Z); returns (rows * 9, C, H, W).
    """
    spread = means.std(0)
    latents = []
    for unit in spread.argsort(descending=True, stable=True)[:TRAVERSED].tolist():
        moved = means[:1].repeat(9, 1)
        moved[:, unit] = means[:, unit].mean() + torch.linspace(-3, 3, 9) * spread[unit]
        latents.append(moved)
    return fitted.draw(torch.cat(latents))


def manifold(fitted: FittedModel, means: Tensor) -> Tensor:
    """A 2-dimensional latent space as a square of images, 2 standard deviations of `means` (N, 2) to each side."""
    steps = torch.linspace(-2, 2, MANIFOLD)
    axes = [means[:, unit].mean() + steps * means[:, unit].std() for unit in range(2)]
    return fitted.draw(torch.cartesian_prod(axes[1].flip(0), axes[0]).flip(1))
