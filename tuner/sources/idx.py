"""MNIST and the sets that are published like it: four IDX files."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tuner.data_spec import IdxSpec
from tuner.sources.splits import Splits, hold_out, listed
from tuner.sources.torchvision import torchvision_datasets
from tuner.vae.data import Split
from tuner.vae.errors import Refused, one_line, refusing

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IDX_SETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's classes, and folders


def read(spec: IdxSpec) -> Splits:
    """Raises Refused, naming the folder and the files, where these are neither there nor can be downloaded, or
    where one of them is damaged."""
    raw = spec.directory / IDX_SETS[spec.name] / "raw"
    missing = [name for name in IDX_FILES if not ((raw / name).exists() or (raw / f"{name}.gz").exists())]
    if missing:
        _fetch(spec, raw, missing)
    train_images, train_labels, test_images, test_labels = (_read_idx(raw / name) for name in IDX_FILES)
    return hold_out(
        _split(raw, train_images, train_labels, IDX_FILES[1]), _split(raw, test_images, test_labels, IDX_FILES[3])
    )


def _split(raw: Path, images: Tensor, labels: Tensor, labels_file: str) -> Split:
    if len(labels) and int(labels.max()) > 9:
        raise Refused(f"{raw}: a label in {labels_file} is above 9: {int(labels.max())}")
    if len(images) != len(labels):
        raise Refused(f"{raw}: {len(images):,} images but {len(labels):,} labels")
    return Split(images.unsqueeze(1), labels.long())


def _fetch(spec: IdxSpec, raw: Path, missing: list[str]) -> None:
    """Have torchvision complete the files; it takes a second to import, so only where one is missing."""
    kind, there = IDX_SETS[spec.name], listed(spec.directory)
    try:
        getattr(torchvision_datasets(), kind)(str(spec.directory), download=spec.download)
    except (RuntimeError, OSError) as error:
        raise Refused(
            f"no {kind} in {raw}: {', '.join(missing)} missing, in {spec.directory} there is {there}, and "
            f"{'the download failed' if spec.download else 'downloading is off'} ({one_line(error)}); put the files "
            "there, plain or as .gz, or use the embedded data set: data.name=digits"
        ) from error


def _read_idx(path: Path) -> Tensor:
    """The uint8 numbers of an IDX file, or of its published form beside it, with .gz behind its name.

    Raises Refused unless it is what its name and header say (LeCun).
    """
    axes = 3 if "idx3" in path.name else 1
    if not path.exists():
        path = path.with_name(f"{path.name}.gz")
    with refusing(path, OSError, EOFError, zlib.error):
        packed = path.read_bytes()
        content = np.frombuffer(bytearray(gzip.decompress(packed) if path.suffix == ".gz" else packed), np.uint8)
    head = 4 + 4 * axes
    sizes = content[4:head].view(">u4").tolist() if len(content) >= head else []
    if content[:4].tolist() != [0, 0, 8, axes] or (axes == 3 and sizes[1:] != [28, 28]):
        raise Refused(
            f"{path}: damaged IDX file, its header is not that of {'28x28 images' if axes == 3 else 'labels'}"
        )
    expected = head + math.prod(sizes)
    if len(content) != expected:
        raise Refused(f"{path}: damaged IDX file, {len(content):,} bytes where its header says {expected:,}")
    return torch.from_numpy(content[head:]).view(sizes)
