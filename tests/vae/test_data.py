"""Splits and pixels."""

import pytest
import torch

from tuner.vae.data import Split, as_floats, binarize, spread


def test_a_fingerprint_changes_with_one_pixel_or_one_label(digits):
    split = Split(digits.train.images[:9].clone(), digits.train.labels[:9].clone())
    before = split.fingerprint()
    split.images[8, 0, 27, 27] ^= 1
    assert split.fingerprint() != before
    split.images[8, 0, 27, 27] ^= 1
    assert split.fingerprint() == before
    split.labels[0] += 1
    assert split.fingerprint() != before


def test_pixels_map_0_to_255_onto_0_to_1_and_leave_their_input_alone():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert as_floats(images).tolist() == pytest.approx([0, 0.2, 1])
    assert images.tolist() == [0, 51, 255]


def test_some_of_a_splits_images_are_from_all_over_it():
    images = torch.arange(11)
    assert spread(images, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(images, 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert spread(images, 99).tolist() == images.tolist()


def test_a_binarized_pixel_is_white_as_often_as_its_grey_value_says():
    greys = torch.tensor([0, 1, 51, 128, 254, 255], dtype=torch.uint8)
    drawn = binarize(greys.repeat(40_000, 1), torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0, 255}
    shares = (drawn == 255).double().mean(0)
    assert shares.tolist() == pytest.approx((greys / 255).tolist(), abs=5 * 0.5 / 200)  # 5 standard errors
    assert (shares[0], shares[-1]) == (0, 1)
