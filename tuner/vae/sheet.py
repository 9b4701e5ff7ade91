"""Images of a model's work as one grey picture."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GAP = 2  # pixels between images
PAPER = 255


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
