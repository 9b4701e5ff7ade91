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
    """`image`, `img`, or the first with bytes of its own. Raises Refused without one."""
    found = [field.name for field in table.schema_arrow if _is_bytes(field.type) or _has_bytes(field.type)]
    if not found:
        raise Refused(f"{path}: no column of images with bytes among {', '.join(table.schema_arrow.names)}")
    return next((name for name in ("image", "img") if name in found), found[0])


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _has_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _rows(path: Path, group: int) -> Any:
    table = pq.ParquetFile(path)
    name = _image_column(table, path)
    part = name if _is_bytes(table.schema_arrow.field(name).type) else f"{name}.bytes"
    return table.read_row_group(group, columns=[part]).column(0)


def _check_labels(listed: list[Picture], place: Path) -> None:
    """Raises Refused unless all are numbers from 0, all words, or none is there."""
    kinds = {type(picture.label) for picture in listed}
    odd = next((picture for picture in listed if isinstance(picture.label, int) and picture.label < 0), None)
    if odd or kinds not in ({int}, {str}, {type(None)}):
        why = f"{odd.name} has {odd.label}" if odd else f"they are {', '.join(sorted(kind.__name__ for kind in kinds))}"
        raise Refused(f"{place}: its labels are no classes: {why}; data.labels=none does without")
