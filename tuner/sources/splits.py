"""What the splits of a data set have to be, and how images come to stand in one."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuner.vae.data import Split

Splits = Mapping[str, Split]  # train, validation and test

SPLIT_SEED = 0  # part of the data's definition: a run's own seed never moves an image to another split
MOST_VALIDATION = 10_000
LEAST = {"train": 200, "validation": 65, "test": 65}  # the covariance of 64 features takes more images than features


def take(split: Split, index: Tensor | np.ndarray[Any, Any]) -> Split:
    return Split(split.images[index], None if split.labels is None else split.labels[index])


def hold_out(train: Split, test: Split) -> Splits:
    """Splits of a data set that is published in two: one in six training images, 10,000 at most, are validation."""
    count = min(MOST_VALIDATION, len(train) // 6)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return {"train": take(train, order[count:]), "validation": take(train, order[:count]), "test": test}
