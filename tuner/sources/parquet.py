"""Hugging Face's data sets: tables with a column of encoded images."""

import os
import re
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tuner.data_spec import ParquetSpec
from tuner.sources.decode import Picture
from tuner.sources.splits import NAMES
from tuner.vae.errors import Refused

LABEL = "label"


def pictures(spec: ParquetSpec) -> list[Picture]:
    """Every row of every table, in the split that a shard's name begins with, else the nearest folder's.

    Raises Refused where there is no table or a damaged one, no column of images, or labels that are no classes.
    """
    place = spec.file
    paths = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    rows, lock = lru_cache(maxsize=2)(_rows), Lock()

    def content(path: Path, group: int, row: int) -> bytes:
        with lock:  # so that threads don't read the same group at once
            found = rows(path, group)[row].as_py()
        encoded = found["bytes"] if isinstance(found, dict) else found
        if encoded is None:
            raise ValueError("no bytes")
        return bytes(encoded)

    listed: list[Picture] = []
    for path in paths:
        name = path.relative_to(place) if place.is_dir() else Path(path.name)
        begins = (re.split("[^a-z]", part.lower(), maxsplit=1)[0] for part in (path.stem, *reversed(name.parts[:-1])))
        split = next((NAMES[word] for word in begins if word in NAMES), None)
        try:
            table = pq.ParquetFile(path)
            _image_column(table, path)
            groups = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            labelled = spec.labels == "auto" and LABEL in table.schema_arrow.names
            labels = table.read([LABEL]).column(0).to_pylist() if labelled else [None] * sum(groups)
        except (OSError, pa.ArrowException) as error:
            number = getattr(error, "errno", None)
            raise Refused(f"{path}: {os.strerror(number) if number else 'not a whole Parquet file'}") from error
        places = [(group, row) for group, count in enumerate(groups) for row in range(count)]
        for number, (place_of, label) in enumerate(zip(places, labels, strict=True)):
            listed.append(Picture(f"{name} row {number}", partial(content, path, *place_of), split, label))
    if not listed:
        raise Refused(f"{place}: no images in it")
    _check_labels(listed, place)
    return listed


def _image_column(table: pq.ParquetFile, path: Path) -> str:
    """Where the bytes are: in `image`, `img`, or the first column that has any. Raises Refused without one."""
    found = {field.name: part for field in table.schema_arrow if (part := _bytes_of(field))}
    if not found:
        raise Refused(f"{path}: no column of images with bytes among {', '.join(table.schema_arrow.names)}")
    return next(found[name] for name in ("image", "img", *found) if name in found)


def _bytes_of(field: pa.Field) -> str | None:
    """A column that is bytes, or its field of that name."""
    if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
        return str(field.name)
    held = pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    return f"{field.name}.bytes" if held else None


def _rows(path: Path, group: int) -> Any:
    table = pq.ParquetFile(path)
    return table.read_row_group(group, columns=[_image_column(table, path)]).column(0)


def _check_labels(listed: list[Picture], place: Path) -> None:
    """Raises Refused unless all are numbers from 0, all words, or none is there."""
    kinds = {type(picture.label) for picture in listed}
    odd = next((picture for picture in listed if isinstance(picture.label, int) and picture.label < 0), None)
    if odd or kinds not in ({int}, {str}, {type(None)}):
        why = f"{odd.name} has {odd.label}" if odd else f"they are {', '.join(sorted(kind.__name__ for kind in kinds))}"
        raise Refused(f"{place}: its labels are no classes: {why}; data.labels=none does without")
