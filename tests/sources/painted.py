"""Small images that tell their number, as files and as arrays."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 16


def painted(number: int) -> np.ndarray:
    """(H, W, 3) uint8: the number in its first two pixels, and grey below."""
    image = np.full((SIDE, SIDE, 3), number % 200, np.uint8)
    image[0, 0], image[0, 1] = number // 256, number % 256
    return image


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(painted(number)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def numbers(images: np.ndarray) -> list[int]:
    """The numbers of images (N, C, H, W)."""
    return (images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 0, 1]).tolist()


def write(folder: Path, count: int, first: int = 0) -> None:
    """`count` files of the numbers from `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (folder / f"{number:04d}.png").write_bytes(encoded(number))
