"""Where images come from: one small module a source, behind `load` and, for the export alone, `load_test`."""

from collections.abc import Callable
from typing import Any

from tuner.data_spec import DataSpec, DigitsSpec, EmnistSpec, IdxSpec, TorchvisionSpec
from tuner.sources import digits, idx, torchvision
from tuner.sources.splits import Splits
from tuner.vae.data import Data, Split

SOURCES: dict[type, Callable[[Any], Splits]] = {
    DigitsSpec: digits.read,
    IdxSpec: idx.read,
    TorchvisionSpec: torchvision.read,
    EmnistSpec: torchvision.read,
}


def load(spec: DataSpec) -> Data:
    """The training and validation splits. Raises ValueError, one line, where images are missing or damaged.

    The test split is read, too: damage in it is told before hours of training.
    """
    splits = SOURCES[type(spec)](spec)
    return Data(splits["train"], splits["validation"])


def load_test(spec: DataSpec) -> Split:
    """The test split: for the export alone, once. Raises as `load` does."""
    return SOURCES[type(spec)](spec)["test"]
