"""NumPy arrays: shapes, types and ranges that are taken, and one line about each that is not."""

import io
import zipfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from painted import numbers, painted

from tuner import sources
from tuner.data_spec import ArraysSpec
from tuner.vae.data import Split

COUNT = 1_000
IMAGES = np.stack([painted(number) for number in range(COUNT)])  # (N, H, W, C)


def _spec(path: Path, **options: object) -> ArraysSpec:
    return ArraysSpec.model_validate({"name": "arrays", "file": path, **options})


def _saved(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(folder / "some.npz", **arrays)
    return folder / "some.npz"


def _splits(path: Path, **options: object) -> list[Split]:
    data = sources.load(_spec(path, **options))
    return [data.train, data.validation, sources.load_test(_spec(path, **options))]


def test_images_are_split_by_content_and_keep_their_labels(tmp_path):
    order = np.random.default_rng(0).permutation(COUNT)
    splits = _splits(_saved(tmp_path, images=IMAGES[order], labels=order % 7 + 3))
    found = [numbers(split.images.numpy()) for split in splits]
    assert sorted(chain.from_iterable(found)) == list(range(COUNT))
    for split, inside in zip(splits, found, strict=True):
        assert split.images.shape[1:] == (3, 16, 16)
        assert [number % 7 for number in inside] == split.labels.tolist()
        assert (split.images == torch.from_numpy(IMAGES[inside].transpose(0, 3, 1, 2))).all()
    again = _splits(_saved(tmp_path, images=np.concatenate([IMAGES, IMAGES[:50]])))
    for inside, split in zip(found, again, strict=True):
        assert set(numbers(split.images.numpy())) == set(inside)
        assert split.labels is None


def test_an_npy_is_images_alone(tmp_path):
    np.save(tmp_path / "some.npy", IMAGES)
    plain = _splits(tmp_path / "some.npy")
    assert [split.fingerprint() for split in plain] == [
        split.fingerprint() for split in _splits(_saved(tmp_path, images=IMAGES))
    ]


@pytest.mark.parametrize("validation", ["validation", "val", "valid", None])
def test_splits_have_names(tmp_path, validation):
    parts = {"train": IMAGES[:800], "test": IMAGES[900:]} | ({validation: IMAGES[800:900]} if validation else {})
    arrays = {f"{name}_images": part for name, part in parts.items()}
    labels = {f"{name}_labels": np.array([["b"], ["a"]] * (len(part) // 2)) for name, part in parts.items()}
    splits = _splits(_saved(tmp_path, **arrays, **labels))
    found = [numbers(split.images.numpy()) for split in splits]
    assert sorted(found[2]) == list(range(900, 1_000))
    assert sorted(found[0] + found[1]) == list(range(900 if validation else 800))
    if validation:
        assert sorted(found[1]) == list(range(800, 900))
    for split, inside in zip(splits, found, strict=True):  # "b" comes first, and after "a"
        assert [1 - number % 2 for number in inside] == split.labels.tolist()


def test_floats_are_scaled_and_grey_needs_no_channel(tmp_path):
    grey = IMAGES[..., 0]
    expected = _splits(_saved(tmp_path, images=grey))
    assert expected[0].images.shape[1:] == (1, 16, 16)
    for kind in (np.float16, np.float32, np.float64):
        found = _splits(_saved(tmp_path, images=(grey / 255).astype(kind)[..., None]))
        assert [split.fingerprint() for split in found] == [split.fingerprint() for split in expected]


def test_sides_may_differ_and_ink_be_dark(tmp_path):
    images = np.pad(IMAGES, ((0, 0), (0, 4), (0, 112), (0, 0)))
    plain, inverted = (_splits(_saved(tmp_path, images=images), invert=invert) for invert in (False, True))
    assert sources.load(_spec(tmp_path / "some.npz")).shape == (3, 20, 128)
    found = {image.numpy().tobytes() for split in inverted for image in 255 - split.images}
    assert found == {image.numpy().tobytes() for split in plain for image in split.images}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": IMAGES.astype(np.int64)}, "images: int64, where uint8 or floats in 0 to 1 are wanted"),
        ({"images": IMAGES > 9}, "images: bool, where"),
        ({"images": np.array([None] * 300)}, "images: object, where"),
        ({"images": IMAGES.astype(np.float32)}, "images: floats from 0 to 255, where 0 to 1 is wanted"),
        ({"images": IMAGES / 127.5 - 1}, "images: floats from -1 to"),
        ({"images": np.full((300, 16, 16), np.nan)}, "images: floats from nan"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"images: shape \(1000, 3, 16, 16\), where \(N, H, W\) or"),
        ({"images": IMAGES[0]}, r"images: shape \(16, 16, 3\)"),
        ({"images": IMAGES[:, :15]}, r"images: shape \(1000, 15, 16, 3\)"),
        ({"images": IMAGES[..., :2]}, r"images: shape \(1000, 16, 16, 2\)"),
        ({"images": np.zeros((300, 132, 132), np.uint8)}, r"images: shape \(300, 132, 132\)"),
        ({"images": IMAGES, "labels": np.arange(999)}, r"labels: int64 of shape \(999,\), where 1,000 whole numbers"),
        ({"images": IMAGES, "labels": np.linspace(0, 1, 1_000)}, "labels: float64 of shape"),
        ({"images": IMAGES, "labels": np.array([None] * 1_000)}, "labels: not a whole NumPy array: .*allow_pickle"),
        ({"pictures": IMAGES}, "neither images nor train_images in it, but pictures"),
        ({"train_images": IMAGES, "images": IMAGES}, "images outside of its splits, beside train"),
        ({"test_images": IMAGES}, "no train, beside test"),
        ({"train_images": IMAGES, "test_images": IMAGES[..., 0]}, "its splits differ in height, width or channels"),
        ({"train_images": IMAGES, "test_images": IMAGES, "test_labels": np.arange(1_000)}, "some splits have labels"),
        ({"images": IMAGES[:100]}, "too few images: .* some 900 in all"),
        ({"images": IMAGES[:0]}, "too few images: 0 for train"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_is_refused(tmp_path, arrays, words):
    with pytest.raises(ValueError, match=rf"some\.npz: {words}") as error:
        sources.load(_spec(_saved(tmp_path, **arrays)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("share", [0, 0.0001, 0.5, 0.999])
def test_half_a_file_is_refused(tmp_path, suffix, share):
    path = tmp_path / f"some.{suffix}"
    if suffix == "npy":
        np.save(path, IMAGES)
    else:
        _saved(tmp_path, images=IMAGES)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"some\.{suffix}: ") as error:
        sources.load(_spec(path))
    assert "\n" not in str(error.value)


def test_a_damaged_member_is_named(tmp_path):
    path = _saved(tmp_path, images=IMAGES, labels=np.arange(COUNT))
    content = bytearray(path.read_bytes())
    content[5_000] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.npz: images: not a whole NumPy array: "):
        sources.load(_spec(path))


def test_a_place_without_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.npz: No such file or directory"):
        sources.load(_spec(tmp_path / "none.npz"))
    with pytest.raises(ValueError, match="Is a directory"):
        sources.load(_spec(tmp_path))


def test_what_does_not_fit_in_memory_is_refused_by_the_header_alone(tmp_path):
    header = io.BytesIO()
    shape = (100_000_000, 128, 128, 3)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    (tmp_path / "some.npy").write_bytes(header.getvalue())
    with zipfile.ZipFile(tmp_path / "some.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    for name in ("some.npy", "some.npz"):
        with pytest.raises(ValueError, match=rf"{name}: 100,000,000 images of 3x128x128 take [\d,.]+ GiB of memory"):
            sources.load(_spec(tmp_path / name))
