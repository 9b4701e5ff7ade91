"""Images as NumPy arrays."""

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy

from tuner.data_spec import ArraysSpec
from tuner.sources.splits import NAMES, Array, Splits, by_content, class_indices, refuse_large
from tuner.vae.data import Split
from tuner.vae.errors import Refused, refusing
from tuner.vae.shape import ImageShape

SIDES = range(16, 129, 4)
DAMAGED = "not a whole NumPy array"
Members = Mapping[str, Callable[[], IO[bytes]]]


def read(spec: ArraysSpec) -> Splits:
    """The `images` and `labels` of an .npz, or its `train_images`, `train_labels`, `validation_images` and so on; or an
    .npy of images.

    Raises Refused where something is missing, damaged or of another shape, type or range, and, before any image is
    read, where they are too many for the memory.
    """
    path = spec.file
    members = _members(path)
    known: dict[str, str | None] = {"": None} | {f"{name}_": split for name, split in NAMES.items()}
    splits = {prefix: split for prefix, split in known.items() if f"{prefix}images" in members}
    if not splits:
        raise Refused(f"{path}: neither images nor train_images in it, but {', '.join(members) or 'nothing'}")
    sizes = {prefix: _size(path, members, f"{prefix}images") for prefix in splits}
    shape, *others = {shape for _, shape in sizes.values()}
    if others:
        raise Refused(f"{path}: its splits differ in height, width or channels")
    refuse_large(sum(count for count, _ in sizes.values()), shape, path)
    images = np.concatenate([_images(path, members, f"{prefix}images") for prefix in splits])
    if spec.invert:
        np.subtract(255, images, out=images)
    labels = [
        _labels(path, members, f"{prefix}labels", count)
        for prefix, (count, _) in sizes.items()
        if f"{prefix}labels" in members
    ]
    if 0 < len(labels) < len(splits):
        raise Refused(f"{path}: some splits have labels, and some have none")
    everything = Split(torch.from_numpy(images), class_indices(np.concatenate(labels)) if labels else None)
    given = [split for prefix, split in splits.items() for _ in range(sizes[prefix][0])]
    return by_content(everything, given, [hashlib.sha256(image.tobytes()).hexdigest() for image in images], path)


def _members(path: Path) -> Members:
    """The arrays of an .npz, or an .npy as the images, each to be opened. Raises Refused where there is no file."""
    with refusing(path, OSError, zipfile.BadZipFile):
        if not zipfile.is_zipfile(path):
            path.open("rb").close()
            return {"images": lambda: path.open("rb")}
        archive = zipfile.ZipFile(path)
    return {name.removesuffix(".npy"): partial(archive.open, name) for name in archive.namelist()}


def _size(path: Path, members: Members, name: str) -> tuple[int, ImageShape]:
    """How many images, and their shape, from the array's header alone."""
    with refusing(f"{path}: {name}: {DAMAGED}"), members[name]() as file:
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)
    found, _, kind = header
    if kind != np.uint8 and kind.kind != "f":
        raise Refused(f"{path}: {name}: {kind}, where uint8 or floats in 0 to 1 are wanted")
    count, height, width, channels = (*found, 1) if len(found) == 3 else found if len(found) == 4 else (0, 0, 0, 0)
    if height not in SIDES or width not in SIDES or channels not in (1, 3):
        raise Refused(
            f"{path}: {name}: shape {found}, where (N, H, W) or (N, H, W, C) is wanted, H and W from 16 to 128 in "
            "steps of 4, C 1 or 3"
        )
    return count, ImageShape(channels, height, width)


def _array(path: Path, members: Members, name: str) -> Array:
    with refusing(f"{path}: {name}: {DAMAGED}"), members[name]() as file:
        return np.asarray(npy.read_array(file, allow_pickle=False))


def _images(path: Path, members: Members, name: str) -> Array:
    """(N, C, H, W) uint8."""
    found = _array(path, members, name)
    if found.dtype != np.uint8:
        low, high = found.min(initial=0), found.max(initial=0)
        if not (low >= 0 and high <= 1):
            raise Refused(f"{path}: {name}: floats from {low:g} to {high:g}, where 0 to 1 is wanted")
        found = np.rint(255 * found).astype(np.uint8)
    return np.ascontiguousarray(found[:, None] if found.ndim == 3 else found.transpose(0, 3, 1, 2))


def _labels(path: Path, members: Members, name: str, count: int) -> Array:
    """(N,) numbers or words; (N, 1) is taken, too."""
    found = _array(path, members, name)
    if found.dtype.kind not in "iuUS" or found.size != count:
        what = f"{found.dtype} of shape {found.shape}"
        raise Refused(f"{path}: {name}: {what}, where {count:,} whole numbers or words are wanted")
    return found.reshape(count)
