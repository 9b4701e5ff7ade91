"""Splits by content: they depend on nothing else, and hold no image twice."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuner.sources.splits import ENOUGH, LEAST, by_content, class_indices, hold_out, refuse_few, refuse_large
from tuner.vae.data import Split
from tuner.vae.shape import ImageShape

PLACE = Path("photos")


def _digests(numbers: list[int]) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers]


def _split(numbers: list[int], given: list[str | None] | None = None) -> dict[str, list[int]]:
    """The numbers in each split; an image is its number."""
    images = torch.tensor(numbers, dtype=torch.int64).reshape(-1, 1, 1, 1)
    splits = by_content(Split(images, images.flatten()), given or [None] * len(numbers), _digests(numbers), PLACE)
    for split in splits.values():
        assert split.images.flatten().tolist() == split.labels.tolist()
    return {name: split.images.flatten().tolist() for name, split in splits.items()}


def test_eight_in_ten_are_trained_on_and_one_each_held_out():
    counts = {name: len(found) for name, found in _split(list(range(20_000))).items()}
    for name, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert abs(counts[name] - 20_000 * share) < 4 * (20_000 * share * (1 - share)) ** 0.5


@given(st.lists(st.integers(0, 99), max_size=60), st.lists(st.integers(0, 99), max_size=5), st.randoms())
def test_neither_order_nor_other_images_move_one(numbers, more, random):
    before = _split(numbers)
    shuffled = random.sample(numbers, len(numbers))
    assert _split(shuffled) == before
    after = _split(numbers + more)
    for name, found in before.items():
        assert sorted(number for number in after[name] if number in numbers and number not in more) == sorted(
            number for number in found if number not in more
        )
    sets = [set(found) for found in after.values()]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len({*numbers, *more})


def test_splits_that_are_given_stay_and_a_tenth_makes_up_for_each_that_is_not():
    numbers = list(range(1_000))
    given = ["test" if number < 300 else "train" for number in numbers]
    found = _split(numbers, given)
    assert sorted(found["test"]) == numbers[:300]
    assert sorted(found["train"] + found["validation"]) == numbers[300:]
    assert set(found["validation"]) == {*_split(numbers)["validation"]} - {*numbers[:300]}
    everything = {name: sorted(part) for name, part in _split(numbers, ["train"] * 1_000).items()}
    assert everything == {name: sorted(part) for name, part in _split(numbers).items()}
    whole = ["test" if number < 300 else "validation" if number < 500 else "train" for number in numbers]
    assert sorted(_split(numbers, whole)["train"]) == numbers[500:]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["train", None], "images outside of its splits, beside train"),
        (["test", None], "images outside of its splits, beside test"),
        (["test", "validation"], "no train, beside test and validation"),
    ],
)
def test_half_of_a_split_is_refused(given, words):
    with pytest.raises(ValueError, match=f"photos: {words}"):
        _split([1, 2], given)


def test_one_in_six_is_held_out_of_what_is_published_in_two():
    images = torch.arange(120_000).reshape(-1, 1, 1, 1)
    test = Split(images[:7], images[:7].flatten())
    for count, expected in ((600, 100), (60_000, 10_000), (120_000, 10_000)):
        splits = hold_out(Split(images[:count], images[:count].flatten()), test)
        assert (len(splits["validation"]), len(splits["train"])) == (expected, count - expected)
        numbers = torch.cat([splits["train"].labels, splits["validation"].labels])
        assert numbers.sort().values.tolist() == list(range(count))
        assert splits["test"] is test


@pytest.mark.parametrize("labels", [[30, 10, 20, 10], ["ö", "a", "b", "a"], np.array([9, 7, 8, 7], np.uint8)])
def test_classes_are_numbered_in_their_order(labels):
    assert class_indices(labels).tolist() == [2, 0, 1, 0]


def _of(train: int, validation: int, test: int) -> dict[str, Split]:
    sizes = {"train": train, "validation": validation, "test": test}
    return {name: Split(torch.zeros(size, 1, 16, 16, dtype=torch.uint8)) for name, size in sizes.items()}


def test_too_few_images_are_refused_with_the_number_that_is_needed():
    refuse_few(_of(200, 65, 65), PLACE, by_hash=True)
    for sizes in ((199, 65, 65), (200, 64, 65), (200, 65, 64), (0, 0, 0)):
        with pytest.raises(ValueError, match="photos: too few images") as error:
            refuse_few(_of(*sizes), PLACE, by_hash=True)
        for size, (name, least) in zip(sizes, LEAST.items(), strict=True):
            assert f"{size} for {name} where {least} are needed" in str(error.value)
        assert "some 900 in all" in str(error.value)
    with pytest.raises(ValueError, match=r"are needed$"):
        refuse_few(_of(1, 1, 1), PLACE, by_hash=False)


def test_the_number_that_is_said_to_be_enough_is():
    from scipy.stats import binom

    assert binom.cdf(LEAST["validation"] - 1, ENOUGH, 0.1) < 0.01


def test_what_does_not_fit_in_memory_is_refused_with_the_sum(monkeypatch):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**18}  # 1 GiB
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    refuse_large(60_000, ImageShape(1, 28, 28), PLACE)  # 2 x 47 MB and 564 MB
    words = r"70,000 images of 3x32x32 take 2\.5 GiB of memory \(2 x 0\.2 as bytes, 2\.1 as floats\), .* are 1\.0"
    with pytest.raises(ValueError, match=f"photos: {words}"):
        refuse_large(70_000, ImageShape(3, 32, 32), PLACE)
