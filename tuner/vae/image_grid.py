"""What a model draws, as sheets of images: every model gets the same noise and the same held-out images."""

import io
import math
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tuner.vae.fitted import FittedModel, encode
from tuner.vae.prior import standard_normal
from tuner.vae.shape import ImageShape

GAP = 2  # pixels between images
PAPER = 255
COLUMNS = 8
STEPS = 9  # images in a row of a traversal or an interpolation
SAMPLE_ROWS, REBUILT_ROWS, INTERPOLATED = 8, 3, 6  # rows, where images are small
HELD_OUT_ROWS = 5
HELD_OUT = HELD_OUT_ROWS * COLUMNS
TRAVERSED = 10  # latents in a traversal, those that vary most
MANIFOLD, LEAST_MANIFOLD = 15, 5  # images along each side
SENT = 300_000  # numbers in a picture that is sent at every rung: PNG makes 100 to 150 kB of it
SEEN = 56  # pixels that an image on a sheet should be wide
LARGEST_LATENT = 512


def grid(images: Tensor, columns: int, ink: bool, scale: int = 1) -> np.ndarray:
    """Images (N, C, H, W) in [0, 1], row by row -> a uint8 picture on white: grey (H, W) or colour (H, W, 3).

    With `ink`, bright strokes on black are shown as dark ones on white.
    """
    count, channels, height, width = images.shape
    brightness = images.permute(0, 2, 3, 1).clamp(0, 1) * 255
    rows = -(-count // columns)
    places = torch.full((rows * columns, height + GAP, width + GAP, channels), PAPER, dtype=torch.uint8)
    places[:count, :height, :width] = (255 - brightness if ink else brightness).round().to(torch.uint8)
    rowwise = places.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    picture: np.ndarray = rowwise[:-GAP, :-GAP].numpy()
    return (picture[..., 0] if channels == 1 else picture).repeat(scale, 0).repeat(scale, 1)


def png(picture: np.ndarray) -> bytes:
    """A uint8 picture (H, W) or (H, W, 3) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def sheet(images: Tensor, columns: int, ink: bool) -> bytes:
    """The grid of images (N, C, H, W) as a PNG file, small ones enlarged to some 56 pixels."""
    return png(grid(images, columns, ink, scale=max(1, round(SEEN / images.shape[3]))))


def rows_that_fit(shape: ImageShape, columns: int, most: int, numbers: int = SENT) -> int:
    """How many rows of images, `most` at most, a picture of so many numbers holds; one in any case."""
    return max(1, min(most, numbers // (columns * shape.numbers)))


def evenly_spaced(images: Tensor) -> Tensor:
    """The 40 of a split's images (N, C, H, W) that sheets show: of each class some, even where they are in order."""
    return images[torch.linspace(0, len(images) - 1, HELD_OUT).round().long()]


def fixed_noise(count: int) -> tuple[Tensor, Tensor]:
    """The one draw that all grids share: normal (count, 512) and uniform (count,); a prefix for fewer or smaller."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(1024, generator=generator)
    return torch.randn(count, LARGEST_LATENT, generator=generator), uniform[:count]


def samples(fitted: FittedModel, count: int) -> Tensor:
    """`count` images (count, C, H, W) from the fitted prior at the fixed noise."""
    return fitted.draw(fitted.prior.place(*fixed_noise(count)))


@torch.no_grad()
def image_grids(fitted: FittedModel, held_out: Tensor, ink: bool) -> dict[str, np.ndarray]:
    """Pictures as of `grid` by name: samples from the prior and from N(0, I), reconstructions, traversal,
    interpolation, manifold. The larger the images, the fewer.

    `held_out` is (N, C, H, W) in [0, 1]; each of its rows is followed by the row of its reconstructions.
    """
    shape, latent_dim = fitted.model.shape, fitted.model.latent_dim
    means, _ = encode(fitted.model, held_out)
    count = COLUMNS * rows_that_fit(shape, COLUMNS, SAMPLE_ROWS)
    plain = replace(fitted, prior=standard_normal(latent_dim))
    rows = rows_that_fit(shape, 2 * COLUMNS, REBUILT_ROWS)
    drawn = {
        "samples/fitted_prior": (samples(fitted, count), COLUMNS),
        "samples/standard_normal": (samples(plain, count), COLUMNS),
        "reconstructions/above_and_below": (reconstructions(fitted, held_out, means, rows), COLUMNS),
        "latent/traversal": (traversal(fitted, means, rows_that_fit(shape, STEPS, TRAVERSED)), STEPS),
        "latent/interpolation": (interpolation(fitted, means, rows_that_fit(shape, STEPS, INTERPOLATED)), STEPS),
    }
    if latent_dim == 2:
        side = max(LEAST_MANIFOLD, min(MANIFOLD, math.isqrt(SENT // shape.numbers)))
        drawn["latent/manifold"] = (manifold(fitted, means, side), side)
    return {name: grid(images, columns, ink) for name, (images, columns) in drawn.items()}


def interleaved(above: Tensor, below: Tensor, columns: int) -> Tensor:
    """Two sets of images (N, C, H, W), a row of `columns` of the one followed by a row of the other."""
    rows = zip(above.split(columns), below.split(columns), strict=True)
    return torch.cat([image for pair in rows for image in pair])


def reconstructions(fitted: FittedModel, images: Tensor, means: Tensor, rows: int) -> Tensor:
    """The first `rows` of 8 images (N, C, H, W), and under each the row of what their `means` (N, Z) decode to."""
    count = COLUMNS * rows
    return interleaved(images[:count], fitted.draw(means[:count]), COLUMNS)


def traversal(fitted: FittedModel, means: Tensor, rows: int) -> Tensor:
    """One row for each of the latents that vary most: the first image moved from -3 to +3 standard deviations.

    `means` are encoded images (N, Z); returns (rows * 9, C, H, W), fewer where there are fewer latents.
    """
    spread = means.std(0)
    latents = []
    for unit in spread.argsort(descending=True, stable=True)[:rows].tolist():
        moved = means[:1].repeat(STEPS, 1)
        moved[:, unit] = means[:, unit].mean() + torch.linspace(-3, 3, STEPS) * spread[unit]
        latents.append(moved)
    return fitted.draw(torch.cat(latents))


def interpolation(fitted: FittedModel, means: Tensor, rows: int) -> Tensor:
    """Each row goes in a straight line from the reconstruction of one image to that of another.

    `means` are encoded images (N, Z), the first `rows` and as many after them the ends; returns (rows * 9, C, H, W).
    """
    first, last = means[:rows, None], means[rows : 2 * rows, None]
    return fitted.draw(torch.lerp(first, last, torch.linspace(0, 1, STEPS)[:, None]).flatten(0, 1))


def manifold(fitted: FittedModel, means: Tensor, side: int) -> Tensor:
    """A 2-dimensional latent space as `side` by `side` images, 2 standard deviations of `means` (N, 2) each way."""
    steps = torch.linspace(-2, 2, side)
    axes = [means[:, unit].mean() + steps * means[:, unit].std() for unit in range(2)]
    return fitted.draw(torch.cartesian_prod(axes[1].flip(0), axes[0]).flip(1))
