"""How images come to stand in a split, and what the splits of a data set have to be."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuner.vae.data import Split
from tuner.vae.errors import Refused
from tuner.vae.shape import ImageShape

Splits = Mapping[str, Split]  # train, validation and test
Array = np.ndarray[Any, Any]

SPLIT_SEED = 0  # part of the data's definition: a run's own seed never moves an image to another split
MOST_VALIDATION = 10_000
NAMES = {"train": "train", "validation": "validation", "test": "test", "training": "train", "testing": "test"}
NAMES |= {"val": "validation", "valid": "validation"}
TENTHS = {0: "test", 1: "validation"}  # of the training images, where no others are given
LEAST = {"train": 200, "validation": 65, "test": 65}  # the covariance of 64 features takes more images than features
ENOUGH = 900  # for a tenth to be `LEAST` but for one time in a hundred
LISTED = 8  # files by name: a whole set, as published and as unpacked
FLOAT_IMAGES, FLOAT_COPIES = 60_000, 3  # what scores and fits hold at once


def take(split: Split, index: Tensor | Array) -> Split:
    return Split(split.images[index], None if split.labels is None else split.labels[index])


def hold_out(train: Split, test: Split) -> Splits:
    """Splits of a data set that is published in two: one in six training images, 10,000 at most, are validation."""
    count = min(MOST_VALIDATION, len(train) // 6)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return {"train": take(train, order[count:]), "validation": take(train, order[:count]), "test": test}


def by_content(everything: Split, given: Sequence[str | None], digests: Sequence[str], place: Path) -> Splits:
    """Splits as `given` for each image, or, of training images and where nothing is given, by SHA-256 of the content.

    A tenth each is validation and test where no image is given as such: a new image moves no other, and equal ones
    stand in one split. Images are in the order of their hashes, which is none of names or classes. Raises Refused
    where only some images have a split, or none is for training.
    """
    named = {split for split in given if split}
    if named and (None in given or "train" not in named):
        what = "images outside of its splits" if None in given else "no train"
        raise Refused(f"{place}: {what}, beside {' and '.join(sorted(named))}")

    def split_of(given: str | None, digest: str) -> str:
        tenth = TENTHS.get(int(digest[:12], 16) % 10, "train")
        return tenth if given in (None, "train") and tenth not in named else given or "train"

    found = np.array([split_of(*image) for image in zip(given, digests, strict=True)])
    order = np.argsort(np.array(digests), kind="stable")
    return {split: take(everything, order[found[order] == split]) for split in LEAST}


def class_indices(labels: Sequence[Any] | Array) -> Tensor:
    """Numbers or words -> 0, 1, ... in their order."""
    return torch.from_numpy(np.unique(np.asarray(labels), return_inverse=True)[1]).long()


def listed(folder: Path) -> str:
    """The first few files in a folder and at most two folders down, by name; for a refusal that misses something."""
    found: list[str] = []
    for here, folders, names in os.walk(folder):
        inside = Path(here).relative_to(folder)
        found += [str(inside / name) for name in sorted(names)]
        folders[:] = sorted(folders) if len(inside.parts) < 2 and len(found) <= LISTED else []
    return ", ".join([*found[:LISTED], "..."][: len(found)]) or ("nothing" if folder.is_dir() else "no folder")


def refuse_few(splits: Splits, place: Path, by_hash: bool) -> None:
    """Raises Refused where a split is too small to be trained on or scored against."""
    few = [f"{len(splits[name]):,} for {name} where {least} are needed" for name, least in LEAST.items()]
    if any(len(splits[name]) < least for name, least in LEAST.items()):
        total = f"; where images are split by their content, that takes some {ENOUGH} in all" if by_hash else ""
        raise Refused(f"{place}: too few images: {', '.join(few)}{total}")


def refuse_large(count: int, shape: ImageShape, place: Path) -> None:
    """Raises Refused where `count` images would not fit in this machine's memory: as bytes, twice while they are
    read, and some of them as floats."""
    once = count * shape.numbers
    floats = 4 * FLOAT_COPIES * min(count, FLOAT_IMAGES) * shape.numbers
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * once + floats > memory:
        raise Refused(
            f"{place}: {count:,} images of {'x'.join(map(str, shape))} take {(2 * once + floats) / 2**30:,.1f} GiB of "
            f"memory (2 x {once / 2**30:,.1f} as bytes, {floats / 2**30:,.1f} as floats), and there are "
            f"{memory / 2**30:,.1f}: give fewer or smaller ones"
        )
