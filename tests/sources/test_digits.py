"""The embedded digits: fixed, disjoint splits."""

import numpy as np
import pytest
import torch

from tuner import sources
from tuner.data_spec import DigitsSpec
from tuner.vae.data import Data, Split, as_floats


@pytest.fixture(scope="module")
def digits() -> Data:
    return sources.load(DigitsSpec())


def _pictures(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_digits_are_997_400_and_400(digits):
    test = sources.load_test(DigitsSpec())
    assert [len(split) for split in (digits.train, digits.validation, test)] == [997, 400, 400]
    for split in (digits.train, digits.validation, test):
        assert split.images.shape[1:] == (1, 28, 28)
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert split.images.amin() == 0
        assert split.images.amax() == 255
    fingerprints = [split.fingerprint()[:16] for split in (digits.train, digits.validation, test)]
    assert fingerprints == ["a096686ff2f70413", "562ee4e1350195c7", "67d1a10db1361f59"]


def test_digits_splits_share_no_image(digits):
    splits = [_pictures(split) for split in (digits.train, digits.validation, sources.load_test(DigitsSpec()))]
    assert len(set.union(*splits)) == 997 + 400 + 400  # scikit-learn's digits hold no picture twice


def test_digits_splits_have_each_class_in_its_share(digits):
    splits = (digits.train, digits.validation, sources.load_test(DigitsSpec()))
    counts = torch.stack([split.labels.bincount(minlength=10) for split in splits]).double()
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    assert (counts - expected).abs().max() < 1


def test_digits_are_the_same_every_time(digits):
    torch.manual_seed(5)
    np.random.seed(5)
    again = sources.load(DigitsSpec())
    assert again.train.fingerprint() == digits.train.fingerprint()
    assert again.validation.fingerprint() == digits.validation.fingerprint()


def test_digits_keep_their_labels(digits):
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)
    shrunk = torch.nn.functional.interpolate(as_floats(digits.validation.images), size=(8, 8), mode="area").flatten(1)
    nearest = torch.cdist(shrunk, torch.from_numpy(small / 16).float()).argmin(1)
    assert (torch.from_numpy(labels)[nearest] == digits.validation.labels).double().mean() > 0.99
