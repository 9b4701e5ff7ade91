"""Data sets as uint8 tensors with fixed splits.

`load` gives the training and validation splits and nothing else; the test split has a function of its
own, `load_test`, which only the export calls.
"""

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.vae.shape import ImageShape

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IDX_SETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's classes, and folders
IDX_VALIDATION = 10_000
DIGITS_VALIDATION = DIGITS_TEST = 400
SPLIT_SEED = 0  # part of the data's definition: a run's own seed never moves an image to another split


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8; labels (N,) int64 from 0, where there are any."""

    images: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """SHA-256 over pixels and labels, in hex."""
        digest = hashlib.sha256(self.images.contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Data:
    """What a search may see of a data set: all but the test split."""

    train: Split
    validation: Split

    @property
    def shape(self) -> ImageShape:
        return ImageShape(*self.train.images.shape[1:])

    @property
    def classes(self) -> int | None:
        """How many kinds of labels there are; None without labels."""
        return None if self.train.labels is None else int(self.train.labels.max()) + 1


def as_floats(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 in [0, 1]."""
    return images.float().div_(255)


def binarize(images: Tensor, generator: torch.Generator) -> Tensor:
    """Draw each pixel anew: 255 with the probability that its grey value says, else 0. uint8 of any shape.

    Stochastic binarization, Salakhutdinov & Murray 2008.
    """
    below = torch.randint(255, images.shape, generator=generator, dtype=torch.uint8)
    return torch.where(below.to(images.device) < images, 255, 0).to(torch.uint8)


def load(name: str, directory: Path, download: bool = True) -> Data:
    """The training and validation splits of `digits` or of a data set in `IDX_SETS`.

    Raises ValueError, naming the folder and the files, when these are neither there nor can be downloaded,
    or when one of them is damaged.
    """
    if name == "digits":
        train, validation, _ = _digits()
        return Data(train, validation)
    everything = _idx_set(IDX_SETS[name], directory, train=True, download=download)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, rest = order[:IDX_VALIDATION], order[IDX_VALIDATION:]
    return Data(_take(everything, rest), _take(everything, held_out))


def load_test(name: str, directory: Path, download: bool = True) -> Split:
    """The test split: for the export alone, once. Raises as `load` does."""
    return _digits()[2] if name == "digits" else _idx_set(IDX_SETS[name], directory, train=False, download=download)


def _take(split: Split, index: Tensor | np.ndarray) -> Split:
    return Split(split.images[index], None if split.labels is None else split.labels[index])


def _digits() -> tuple[Split, Split, Split]:
    """scikit-learn's 1,797 handwritten digits (UCI, 8x8, 17 greys), resized to 28x28; 997 / 400 / 400."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    small, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(small).float().reshape(-1, 1, 8, 8) / 16
    resized = F.interpolate(grey, size=(28, 28), mode="bicubic", align_corners=False).clamp(0, 1)
    everything = Split(resized.mul(255).round().to(torch.uint8), torch.from_numpy(labels).long())
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST, random_state=SPLIT_SEED, stratify=labels
    )
    train, validation = train_test_split(
        rest, test_size=DIGITS_VALIDATION, random_state=SPLIT_SEED, stratify=labels[rest]
    )
    return _take(everything, train), _take(everything, validation), _take(everything, test)


def _idx_set(kind: str, directory: Path, train: bool, download: bool) -> Split:
    raw = directory / kind / "raw"
    if not all((raw / name).exists() or (raw / f"{name}.gz").exists() for name in IDX_FILES):
        _fetch(kind, directory, download)
    files = [_read_idx(raw / name) for name in IDX_FILES]  # a damaged test split is told before hours of training
    images, labels = files[:2] if train else files[2:]
    if len(labels) and int(labels.max()) > 9:
        raise ValueError(f"{raw}: a label in {IDX_FILES[1 if train else 3]} is above 9: {int(labels.max())}")
    if len(images) != len(labels):
        raise ValueError(f"{raw}: {len(images):,} images but {len(labels):,} labels")
    return Split(images.unsqueeze(1), labels.long())


def _fetch(kind: str, directory: Path, download: bool) -> None:
    """Have torchvision complete the files; it takes a second to import, so only where one is missing."""
    try:
        getattr(_torchvision_datasets(), kind)(str(directory), download=download)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"no {kind} in {directory / kind / 'raw'} (wanted: {', '.join(IDX_FILES)}) and "
            f"{'the download failed' if download else 'downloading is off'} ({_first_line(error)}); "
            "put the files there, or use the embedded data set: data.name=digits"
        ) from error


def _read_idx(path: Path) -> Tensor:
    """The uint8 numbers of an IDX file, or of its published form beside it, with .gz behind its name.

    Raises ValueError unless it is what its name and header say (LeCun).
    """
    axes = 3 if "idx3" in path.name else 1
    try:
        if not path.exists():
            path = path.with_name(f"{path.name}.gz")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = np.frombuffer(bytearray(file.read()), np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    head = 4 + 4 * axes
    sizes = content[4:head].view(">u4").tolist() if len(content) >= head else []
    if content[:4].tolist() != [0, 0, 8, axes] or (axes == 3 and sizes[1:] != [28, 28]):
        raise ValueError(
            f"{path}: damaged IDX file, its header is not that of {'28x28 images' if axes == 3 else 'labels'}"
        )
    expected = head + math.prod(sizes)
    if len(content) != expected:
        raise ValueError(f"{path}: damaged IDX file, {len(content):,} bytes where its header says {expected:,}")
    return torch.from_numpy(content[head:]).view(sizes)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _torchvision_datasets() -> Any:
    """torchvision.datasets, also where a CUDA build of torchvision meets a CPU build of torch.

    That mix is what package indexes hand out; `import torchvision` then dies because the schemas of its
    compiled operators are missing. Declared, they are never called: data sets and transforms need none.
    """
    try:
        from torchvision import datasets
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_datasets.library = library  # type: ignore[attr-defined]  # dropped, it would undeclare them
        from torchvision import datasets
    return datasets
