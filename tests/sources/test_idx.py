"""Four IDX files: fixed splits, and faults that name the file."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tuner import sources
from tuner.data_spec import IdxSpec
from tuner.sources.idx import IDX_FILES
from tuner.vae.data import Split

SHARED = Path(__file__).parents[2].parent / "shared/data"
FINGERPRINTS = ["9c544592046c9ab1", "72dca6f3f89a09c2", "a0863a96c44e5666"]
with_mnist = pytest.mark.skipif(not (SHARED / "MNIST").is_dir(), reason=f"no MNIST in {SHARED}")


def _spec(directory: Path) -> IdxSpec:
    return IdxSpec(name="mnist", directory=directory, download=False)


def _pictures(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def _numbers(split: Split) -> Tensor:
    """The first two pixels of an image as one number, its index in the files that `_write_mnist` writes."""
    return split.images[:, 0, 0, 0].int() * 256 + split.images[:, 0, 0, 1]


def _write_mnist(directory: Path) -> Path:
    """Four whole IDX files: 600 training and 70 test images that hold their index, labelled by its last digit."""
    raw = directory / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 600), ("t10k", 70)):
        index = np.arange(count)
        images, labels = np.zeros((count, 28, 28), np.uint8), (index % 10).astype(np.uint8)
        images[:, 0, 0], images[:, 0, 1] = index // 256, index % 256
        for name, magic, array in ((f"{part}-images-idx3-ubyte", 3, images), (f"{part}-labels-idx1-ubyte", 1, labels)):
            sizes = np.array(array.shape, ">u4").tobytes()
            (raw / name).write_bytes(bytes([0, 0, 8, magic]) + sizes + array.tobytes())
    return raw


@with_mnist
def test_mnist_is_50000_10000_and_10000_without_a_shared_image():
    mnist, test = sources.load(_spec(SHARED)), sources.load_test(_spec(SHARED))
    splits = [_pictures(split) for split in (mnist.train, mnist.validation, test)]
    assert [len(pictures) for pictures in splits] == [50_000, 10_000, 10_000]
    assert [split.fingerprint()[:16] for split in (mnist.train, mnist.validation, test)] == FINGERPRINTS
    assert len(set.union(*splits)) == 70_000  # MNIST holds no picture twice
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    counts = (mnist.train.labels.bincount() + mnist.validation.labels.bincount()).tolist()
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_images_keep_their_labels_through_the_shuffle(tmp_path):
    _write_mnist(tmp_path)
    data, test = sources.load(_spec(tmp_path)), sources.load_test(_spec(tmp_path))
    assert [len(split) for split in (data.train, data.validation, test)] == [500, 100, 70]  # one in six is held out
    for split in (data.train, data.validation, test):
        assert (_numbers(split) % 10).tolist() == split.labels.tolist()
    numbers = torch.cat([_numbers(data.train), _numbers(data.validation)]).tolist()
    assert numbers != list(range(600))
    assert sorted(numbers) == list(range(600))
    assert _numbers(test).tolist() == list(range(70))


@pytest.mark.skipif(not (SHARED / "FashionMNIST").is_dir(), reason=f"no Fashion-MNIST in {SHARED}")
def test_fashion_mnist_is_read_in_its_published_form():
    spec = IdxSpec(name="fashion_mnist", directory=SHARED, download=False)
    fashion, test = sources.load(spec), sources.load_test(spec)
    assert [len(split) for split in (fashion.train, fashion.validation, test)] == [50_000, 10_000, 10_000]
    assert (fashion.train.labels.bincount() + fashion.validation.labels.bincount()).tolist() == [6_000] * 10
    assert test.labels.bincount().tolist() == [1_000] * 10


def test_compressed_files_hold_the_same_images(tmp_path):
    raw = _write_mnist(tmp_path)
    plain = sources.load_test(_spec(tmp_path))
    for name in IDX_FILES:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()
    assert sources.load_test(_spec(tmp_path)).fingerprint() == plain.fingerprint()
    cut = raw / f"{IDX_FILES[2]}.gz"
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{IDX_FILES[2]}\.gz: "):
        sources.load_test(_spec(tmp_path))


@pytest.mark.parametrize("name", IDX_FILES)
def test_a_truncated_file_is_named(tmp_path, name):
    path = _write_mnist(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{name}: damaged IDX file"):
        sources.load(_spec(tmp_path))


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\x08", b"\0\0\x08\x03\0\0", b"<html>not found</html>", b"\0\0\x0d\x01" * 9],
    ids=["nothing", "half a magic number", "half a size", "a web page", "floats"],
)
def test_a_file_without_a_whole_header_is_named(tmp_path, content):
    path = _write_mnist(tmp_path) / IDX_FILES[0]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{IDX_FILES[0]}: damaged IDX file, its header"):
        sources.load(_spec(tmp_path))


def test_a_file_with_bytes_too_many_is_named(tmp_path):
    path = _write_mnist(tmp_path) / IDX_FILES[1]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=rf"{IDX_FILES[1]}: damaged IDX file, 609 bytes where its header says 608"):
        sources.load(_spec(tmp_path))


@pytest.mark.parametrize("read", [sources.load, sources.load_test])
def test_missing_mnist_names_the_folder_the_files_and_the_way_out(tmp_path, read):
    with pytest.raises(ValueError, match="no MNIST in") as error:
        read(_spec(tmp_path))
    for part in (str(tmp_path / "MNIST" / "raw"), *IDX_FILES, "there is nothing", "downloading is off", "digits"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def _half(raw: Path) -> str:
    for name in IDX_FILES[1:3]:
        (raw / name).unlink()
    return f"{', '.join(IDX_FILES[1:3])} missing, in PLACE there is MNIST/raw/{IDX_FILES[3]}, MNIST/raw/{IDX_FILES[0]},"


def _packed(raw: Path) -> str:
    _half(raw)
    for name in (IDX_FILES[0], IDX_FILES[3]):
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()
    return (
        f"{', '.join(IDX_FILES[1:3])} missing, in PLACE there is MNIST/raw/{IDX_FILES[3]}.gz, "
        f"MNIST/raw/{IDX_FILES[0]}.gz,"
    )


def _dotted(raw: Path) -> str:
    for name in IDX_FILES:
        (raw / name).rename(raw / name.replace("-idx", ".idx"))
    return f"{', '.join(IDX_FILES)} missing, in PLACE there is MNIST/raw/t10k-images.idx3-ubyte, "


def _elsewhere(raw: Path) -> str:
    for name in IDX_FILES:
        (raw / name).rename(raw.parents[1] / name)
    return f"{', '.join(IDX_FILES)} missing, in PLACE there is {', '.join(sorted(IDX_FILES))}, "


@pytest.mark.parametrize("change", [_half, _packed, _dotted, _elsewhere])
def test_what_is_missing_and_what_is_there_instead_are_listed(tmp_path, change):
    words = change(_write_mnist(tmp_path)).replace("PLACE", str(tmp_path))
    with pytest.raises(ValueError, match="no MNIST in") as error:
        sources.load(_spec(tmp_path))
    assert words in str(error.value)
    assert "downloading is off (Dataset not found. You can use download=True to download it)" in str(error.value)
