"""The README's picture: the first rows of some receipts' samples, one receipt below the other.

    python -m benchmarks.picture RECEIPT... PICTURE

Of each receipt `same_noise.png`, whose left half is of the classic settings and whose right is of what was exported.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.receipt import COLUMNS, MARGIN
from tuner.vae.image_grid import GAP, PAPER, png

ROWS = 4  # of images


def rows_of(receipt: Path) -> np.ndarray:
    """The first rows (H, W, 3) of a receipt's picture."""
    picture = np.asarray(Image.open(receipt / "same_noise.png").convert("RGB"))
    cell = (picture.shape[1] - MARGIN + 2 * GAP) // (2 * COLUMNS)  # an image and the gap beside it
    return picture[: ROWS * cell - GAP]


def stacked(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures (H, W, 3) below each other, in the middle of the widest."""
    widest = max(picture.shape[1] for picture in pictures)
    padded = []
    for picture in pictures:
        room = widest - picture.shape[1]
        sides = ((0, MARGIN // 2), (room // 2, room - room // 2), (0, 0))
        padded.append(np.pad(picture, sides, constant_values=PAPER))
    return np.concatenate(padded)[: -(MARGIN // 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("receipts", type=Path, nargs="+", metavar="RECEIPT")
    parser.add_argument("picture", type=Path, metavar="PICTURE")
    arguments = parser.parse_args()
    arguments.picture.write_bytes(png(stacked([rows_of(receipt) for receipt in arguments.receipts])))


if __name__ == "__main__":
    main()
