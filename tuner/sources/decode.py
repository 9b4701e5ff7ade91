"""Encoded images of any kind -> splits of equal size, on all cores; kept in a run, so that it is done once."""

import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tuner.data_spec import DecodedSpec
from tuner.run import write_atomic
from tuner.sources.splits import Array, Splits, by_content, class_indices, refuse_few, refuse_large
from tuner.vae.data import Split
from tuner.vae.errors import Refused, one_line
from tuner.vae.shape import ImageShape

Image.init()
FOREIGN = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}  # Pillow alone can't read these
FORMATS = sorted(set(Image.OPEN) - FOREIGN)
ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind not in FOREIGN}
WHITES = {"I;16": 65_535, "I;16B": 65_535, "I;16L": 65_535, "I": 65_535, "F": 1}  # of the modes that hold no bytes
BLOCK = 500  # images between two words about how far it is
NAMED = 3  # damaged images
VERSION = 1  # of what decoding gives: another one makes a kept result void

Say = Callable[[str], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Picture:
    """An encoded image, and what its place says about it: the split and the class, where there are."""

    name: str
    read: Callable[[], bytes]
    split: str | None = None
    label: int | str | None = None


def decode(content: bytes, shape: ImageShape) -> Array:
    """The middle of an image, as much as fits, as (C, H, W) uint8, antialiased; of several frames the first.

    It is turned as EXIF says, and what is transparent is white. Raises ValueError where it can't be read, or has more
    pixels than Pillow takes for harmless.
    """
    channels, height, width = shape
    twice = 2 * max(height, width)
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or sys.maxsize):
            raise ValueError(f"{image.width:,} x {image.height:,} pixels are too many")
        image.draft(None, (twice, twice))  # a JPEG is decoded at an eighth of its size, if that is enough
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError("no image") from error
    except Exception as error:  # whatever Pillow stumbles over
        raise ValueError(one_line(error)) from error
    scale = min(image.width / width, image.height / height)
    across, down = max(1, round(scale * width)), max(1, round(scale * height))
    left, top = (image.width - across) // 2, (image.height - down) // 2
    image = image.crop((left, top, left + across, top + down))
    if image.mode in WHITES:
        values = np.asarray(image) / WHITES[image.mode]
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"values of mode {image.mode} outside of 0 to {WHITES[image.mode]:,}")
        image = Image.fromarray(np.rint(255 * values).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def decode_all(pictures: Sequence[Picture], shape: ImageShape, say: Say) -> tuple[Array, list[str]]:
    """(N, C, H, W) uint8, and for each picture its name and what is wrong with it; nothing where it is whole."""
    images = np.empty((len(pictures), *shape), np.uint8)

    def put(index: int) -> str:
        try:
            content = pictures[index].read()
        except Exception as error:  # an archive's members fail in as many ways as images do
            return f"{pictures[index].name} ({one_line(error)})"
        try:
            images[index] = decode(content, shape)
        except ValueError as error:
            return f"{pictures[index].name} ({one_line(error)})"
        return ""

    return images, _in_threads(put, range(len(pictures)), lambda count: say(f"{count} images decoded"))


def read(pictures: Sequence[Picture], spec: DecodedSpec, wanted: Sequence[str], kept: Path | None, say: Say) -> Splits:
    """The `wanted` splits; from the folder `kept`, where the same images were decoded into it before.

    Raises Refused where images are damaged and not to be skipped, where there are too few, and, before any is
    decoded, where there are too many for the memory.
    """
    shape = ImageShape(spec.channels, spec.size, spec.size)
    refuse_large(len(pictures), shape, spec.place)
    digests = _in_threads(_digest, pictures, lambda count: say(f"{count} images looked at"))
    options = spec.model_dump(mode="json", exclude={spec.place_key})
    listed = [(picture.split, picture.label, digest) for picture, digest in zip(pictures, digests, strict=True)]
    key = hashlib.sha256(json.dumps([VERSION, options, listed]).encode()).hexdigest()
    if kept and (found := _read_kept(kept, wanted, key)):
        return found

    images, faults = decode_all(pictures, shape, say)
    whole = [index for index, fault in enumerate(faults) if not fault]
    if len(whole) < len(pictures):
        if spec.on_damaged == "refuse":
            raise Refused(f"{damaged_words(faults, spec.place)}; data.on_damaged=skip leaves them out")
        print(damaged_words(faults, spec.place, " and are left out"), file=sys.stderr)
        images = images[whole]
    if spec.invert:
        np.subtract(255, images, out=images)
    labels = [pictures[index].label for index in whole]
    everything = Split(torch.from_numpy(images), None if None in labels else class_indices(labels))
    given = [pictures[index].split for index in whole]
    splits = by_content(everything, given, [digests[index] for index in whole], spec.place)
    refuse_few(splits, spec.place, by_hash=True)
    if kept:
        _keep(kept, splits, key)
    return splits


def _digest(picture: Picture) -> str:
    """SHA-256 of an image's content in hex; of nothing where it can't be read, which decoding will tell."""
    with suppress(Exception):
        return hashlib.sha256(picture.read()).hexdigest()
    return hashlib.sha256().hexdigest()


def _in_threads(function: Callable[[Any], Result], items: Sequence[Any], say: Say) -> list[Result]:
    """The function of each item: Pillow and hashlib let go of the interpreter while they work."""
    results: list[Result] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of oddities that it gets over
        for start in range(0, len(items), BLOCK):
            if start:
                say(f"{start:,} of {len(items):,}")
            results += pool.map(function, items[start : start + BLOCK])
    return results


def damaged_words(faults: Sequence[str], place: Path, verdict: str = "") -> str:
    """One line of what `decode_all` found: how many images are damaged, and the first by name."""
    damaged = [fault for fault in faults if fault]
    names = " ".join(", ".join([*damaged[:NAMED], "..."][: len(damaged)]).split())  # a name can hold a line break
    return f"{place}: {len(damaged):,} of {len(faults):,} images can't be read{verdict}: {names}"


def _signature(key: str, name: str, split: Split) -> dict[str, str]:
    return {"key": key, "split": name, "sha256": split.fingerprint()}


def _keep(kept: Path, splits: Splits, key: str) -> None:
    for name, split in splits.items():
        tensors = {"images": split.images} | ({} if split.labels is None else {"labels": split.labels})
        write_atomic(kept / f"{name}.safetensors", save(tensors, _signature(key, name, split)))


def _read_kept(kept: Path, wanted: Sequence[str], key: str) -> Splits | None:
    """What `_keep` wrote under this key; None where that is missing, damaged or of other images."""
    found = {}
    for name in wanted:
        try:
            with safe_open(kept / f"{name}.safetensors", "pt") as file:
                tensors = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
                known = file.metadata()
            split = Split(tensors["images"], tensors.get("labels"))
        except (OSError, SafetensorError, KeyError):
            return None
        if known != _signature(key, name, split):
            return None
        found[name] = split
    return found
