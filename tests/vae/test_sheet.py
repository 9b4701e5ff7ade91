"""Pictures of images, pixel by pixel."""

import io

import numpy as np
import torch
from PIL import Image

from tuner.vae.sheet import grid, png


def test_ink_is_dark_and_the_gap_is_paper():
    images = torch.tensor([[[[0.0, 1.0]]], [[[0.4, 0.2]]], [[[1.0, 0.0]]]])  # three images of 1 x 2 pixels
    expected = [
        [255, 0, 255, 255, 153, 204],
        [255] * 6,
        [255] * 6,
        [0, 255, 255, 255, 255, 255],  # the last place stays empty
    ]
    assert grid(images, columns=2).tolist() == expected


def test_values_beyond_black_and_white_are_clipped():
    assert grid(torch.tensor([[[[-1.0, 2.0]]]]), columns=1).tolist() == [[255, 0]]


def test_scale_repeats_each_pixel_both_ways():
    picture = grid(torch.tensor([[[[0.0, 1.0]]]]), columns=1, scale=2)
    assert picture.tolist() == [[255, 255, 0, 0], [255, 255, 0, 0]]


def test_ten_digits_in_five_columns_measure_148_by_58():
    assert grid(torch.zeros(10, 1, 28, 28), columns=5).shape == (2 * 28 + 2, 5 * 28 + 4 * 2)


def test_a_png_holds_exactly_the_picture():
    picture = np.random.default_rng(0).integers(0, 256, (13, 17), dtype=np.uint8)
    image = Image.open(io.BytesIO(png(picture)))
    assert (image.format, image.mode) == ("PNG", "L")
    assert np.array_equal(np.asarray(image), picture)
