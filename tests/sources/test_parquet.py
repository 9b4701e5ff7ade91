"""Hugging Face's tables of images, as its own library writes them."""

from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from painted import SIDE, encoded, numbers

from tuner import sources
from tuner.data_spec import FolderSpec, ParquetSpec
from tuner.vae.data import Split


def _spec(path: Path, **options: object) -> ParquetSpec:
    return ParquetSpec.model_validate({"name": "parquet", "file": path, "size": SIDE, **options})


def _write(path: Path, content: list[bytes | None], column: str = "image", group: int = 100, **more: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": image, "path": f"{index}.png"} for index, image in enumerate(content)], kind)
    pq.write_table(pa.table({**more, column: images}), path, row_group_size=group)
    return path


def _images(first: int, last: int) -> list[bytes | None]:
    return [encoded(number) for number in range(first, last)]


def _splits(path: Path, **options: object) -> list[Split]:
    data = sources.load(_spec(path, **options))
    return [data.train, data.validation, sources.load_test(_spec(path, **options))]


def test_shards_are_splits(tmp_path):
    for number, (first, last) in enumerate([(0, 150), (150, 250)]):
        labels = [index % 5 for index in range(first, last)]
        _write(tmp_path / f"data/train-{number:05d}-of-00002.parquet", _images(first, last), label=labels)
    labels = [index % 5 for index in range(300, 370)]
    _write(tmp_path / "data/validation-00000-of-00001.parquet", _images(300, 370), label=labels)
    _write(tmp_path / "data/test-00000-of-00001.parquet", _images(400, 470), label=labels)
    splits = _splits(tmp_path)
    for split, expected in zip(splits, (range(250), range(300, 370), range(400, 470)), strict=True):
        found = numbers(split.images.numpy())
        assert sorted(found) == list(expected)
        assert [number % 5 for number in found] == split.labels.tolist()
    assert _splits(tmp_path, labels="none")[0].labels is None


def test_folders_are_splits_and_a_column_may_hold_the_bytes_themselves(tmp_path):
    """As Hugging Face lays out what it has converted."""
    for split, first, last in (("train", 0, 250), ("validation", 300, 370), ("testing", 400, 470)):
        path = tmp_path / "default" / split / "0000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"picture": pa.array(_images(first, last), pa.binary())}), path)
    for split, expected in zip(_splits(tmp_path), (range(250), range(300, 370), range(400, 470)), strict=True):
        assert sorted(numbers(split.images.numpy())) == list(expected)


@pytest.mark.parametrize("group", [7, 100_000])
@pytest.mark.parametrize("column", ["image", "img", "photo"])
def test_one_table_is_split_by_content(tmp_path, group, column):
    words = [f"class {number % 3}" for number in range(1_000)]
    path = _write(tmp_path / "all.parquet", _images(0, 1_000), column, group, label=words)
    splits = _splits(path)
    found = [numbers(split.images.numpy()) for split in splits]
    assert sorted(chain.from_iterable(found)) == list(range(1_000))
    for split, inside in zip(splits, found, strict=True):
        assert [number % 3 for number in inside] == split.labels.tolist()


def test_a_folder_and_a_table_of_the_same_files_are_split_alike(tmp_path):
    for number in range(1_000):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    path = _write(tmp_path / "all.parquet", _images(0, 1_000))
    folder = sources.load(FolderSpec(name="folder", directory=tmp_path, size=SIDE))
    table = sources.load(_spec(path))
    assert table.train.fingerprint() == folder.train.fingerprint()
    assert table.classes is None


def test_what_is_decoded_is_kept(tmp_path):
    path = _write(tmp_path / "all.parquet", _images(0, 1_000))
    said: list[str] = []
    expected = sources.load(_spec(path), tmp_path / "kept").train.fingerprint()
    assert sources.load(_spec(path), tmp_path / "kept", said.append).train.fingerprint() == expected
    assert not any("decoded" in words for words in said)


def test_damaged_rows_are_named_and_left_out(tmp_path, capfd):
    content = _images(0, 1_000)
    content[3], content[500] = b"no image", None
    path = _write(tmp_path / "all.parquet", content)
    words = r"2 of 1,000 images can't be read: all\.parquet row 3 \(no image\), all\.parquet row 500 \(no bytes\)"
    with pytest.raises(ValueError, match=words):
        sources.load(_spec(path))
    splits = _splits(path, on_damaged="skip")
    assert sorted(chain.from_iterable(numbers(split.images.numpy()) for split in splits)) == [
        number for number in range(1_000) if number not in (3, 500)
    ]
    assert "are left out" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, None] * 500, "its labels are no classes: they are NoneType, int; data.labels=none does without"),
        ([0, -1] * 500, r"its labels are no classes: all\.parquet row 1 has -1"),
        ([0.5] * 1_000, "its labels are no classes: they are float"),
        ([[1]] * 1_000, "its labels are no classes: they are list"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, words):
    path = _write(tmp_path / "all.parquet", _images(0, 1_000), label=labels)
    with pytest.raises(ValueError, match=words):
        sources.load(_spec(path))
    assert _splits(path, labels="none")[0].labels is None


def test_what_is_refused(tmp_path):
    def refusal(path: Path) -> str:
        with pytest.raises(ValueError, match=r".") as error:
            sources.load(_spec(path))
        assert "\n" not in str(error.value)
        return str(error.value).removeprefix(f"{tmp_path}/")

    assert refusal(tmp_path / "none.parquet") == "none.parquet: No such file or directory"
    assert refusal(tmp_path) == f"{tmp_path}: no images in it"
    (tmp_path / "some.parquet").write_bytes(b"PAR1 and no more")
    assert refusal(tmp_path) == "some.parquet: not a whole Parquet file"
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "some.parquet")
    assert refusal(tmp_path) == "some.parquet: no column of images with bytes among text, label"
    whole = _write(tmp_path / "some.parquet", _images(0, 300)).read_bytes()
    assert refusal(tmp_path).startswith(f"{tmp_path}: too few images: ")
    (tmp_path / "some.parquet").write_bytes(whole[:-100])
    assert refusal(tmp_path) == "some.parquet: not a whole Parquet file"
    (tmp_path / "some.parquet").write_bytes(whole[:2_000] + bytes(2_000) + whole[4_000:])
    assert " of 300 images can't be read: some.parquet row " in refusal(tmp_path)
    _write(tmp_path / "test-0.parquet", _images(300, 400))
    (tmp_path / "some.parquet").write_bytes(whole)
    assert refusal(tmp_path) == f"{tmp_path}: images outside of its splits, beside test"
