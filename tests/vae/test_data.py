"""Data sets: fixed, disjoint splits, and faults that name the file."""

import gzip
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import tuner
from tuner.spec import DataSpec
from tuner.vae.data import IDX_FILES, IDX_SETS, Split, as_floats, binarize, load, load_test

NOWHERE = Path("never read")
SHARED = Path(__file__).parents[2].parent / "shared/data"
with_mnist = pytest.mark.skipif(not (SHARED / "MNIST").is_dir(), reason=f"no MNIST in {SHARED}")


def _pictures(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def _write_mnist(directory: Path) -> Path:
    """Four whole IDX files: 12 training and 5 test images filled with their index, labelled by its last digit."""
    raw = directory / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 12), ("t10k", 5)):
        index = np.arange(count, dtype=np.uint8)
        images, labels = np.broadcast_to(index[:, None, None], (count, 28, 28)), index % 10
        for name, magic, array in ((f"{part}-images-idx3-ubyte", 3, images), (f"{part}-labels-idx1-ubyte", 1, labels)):
            sizes = np.array(array.shape, ">u4").tobytes()
            (raw / name).write_bytes(bytes([0, 0, 8, magic]) + sizes + array.tobytes())
    return raw


def test_digits_are_997_400_and_400(digits):
    test = load_test("digits", NOWHERE)
    assert [len(split) for split in (digits.train, digits.validation, test)] == [997, 400, 400]
    for split in (digits.train, digits.validation, test):
        assert split.images.shape[1:] == (1, 28, 28)
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert split.images.amin() == 0
        assert split.images.amax() == 255


def test_digits_splits_share_no_image(digits):
    splits = [_pictures(split) for split in (digits.train, digits.validation, load_test("digits", NOWHERE))]
    assert len(set.union(*splits)) == 997 + 400 + 400  # scikit-learn's digits hold no picture twice


def test_digits_splits_have_each_class_in_its_share(digits):
    splits = (digits.train, digits.validation, load_test("digits", NOWHERE))
    counts = torch.stack([split.labels.bincount(minlength=10) for split in splits]).double()
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    assert (counts - expected).abs().max() < 1


def test_digits_are_the_same_every_time(digits):
    torch.manual_seed(5)
    np.random.seed(5)
    again = load("digits", NOWHERE)
    assert again.train.fingerprint() == digits.train.fingerprint()
    assert again.validation.fingerprint() == digits.validation.fingerprint()


def test_digits_keep_their_labels(digits):
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)
    shrunk = torch.nn.functional.interpolate(as_floats(digits.validation.images), size=(8, 8), mode="area").flatten(1)
    nearest = torch.cdist(shrunk, torch.from_numpy(small / 16).float()).argmin(1)
    assert (torch.from_numpy(labels)[nearest] == digits.validation.labels).double().mean() > 0.99


def test_a_fingerprint_changes_with_one_pixel_or_one_label(digits):
    split = Split(digits.train.images[:9].clone(), digits.train.labels[:9].clone())
    before = split.fingerprint()
    split.images[8, 0, 27, 27] ^= 1
    assert split.fingerprint() != before
    split.images[8, 0, 27, 27] ^= 1
    assert split.fingerprint() == before
    split.labels[0] += 1
    assert split.fingerprint() != before


def test_pixels_map_0_to_255_onto_0_to_1_and_leave_their_input_alone():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert as_floats(images).tolist() == pytest.approx([0, 0.2, 1])
    assert images.tolist() == [0, 51, 255]


def test_a_binarized_pixel_is_white_as_often_as_its_grey_value_says():
    greys = torch.tensor([0, 1, 51, 128, 254, 255], dtype=torch.uint8)
    drawn = binarize(greys.repeat(40_000, 1), torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0, 255}
    shares = (drawn == 255).double().mean(0)
    assert shares.tolist() == pytest.approx((greys / 255).tolist(), abs=5 * 0.5 / 200)  # 5 standard errors
    assert (shares[0], shares[-1]) == (0, 1)


@with_mnist
def test_mnist_is_50000_10000_and_10000_without_a_shared_image():
    mnist, test = load("mnist", SHARED, download=False), load_test("mnist", SHARED, download=False)
    splits = [_pictures(split) for split in (mnist.train, mnist.validation, test)]
    assert [len(pictures) for pictures in splits] == [50_000, 10_000, 10_000]
    assert len(set.union(*splits)) == 70_000  # MNIST holds no picture twice
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    counts = (mnist.train.labels.bincount() + mnist.validation.labels.bincount()).tolist()
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_images_keep_their_labels_through_the_shuffle(tmp_path):
    _write_mnist(tmp_path)
    shuffled = load("mnist", tmp_path, download=False).validation  # 12 images: all of them held out
    assert (shuffled.images[:, 0, 0, 0] % 10).tolist() == shuffled.labels.tolist()
    assert sorted(shuffled.images[:, 0, 0, 0].tolist()) == list(range(12))
    assert load_test("mnist", tmp_path, download=False).labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.skipif(not (SHARED / "FashionMNIST").is_dir(), reason=f"no Fashion-MNIST in {SHARED}")
def test_fashion_mnist_is_read_in_its_published_form():
    fashion, test = load("fashion_mnist", SHARED, download=False), load_test("fashion_mnist", SHARED, download=False)
    assert [len(split) for split in (fashion.train, fashion.validation, test)] == [50_000, 10_000, 10_000]
    assert (fashion.train.labels.bincount() + fashion.validation.labels.bincount()).tolist() == [6_000] * 10
    assert test.labels.bincount().tolist() == [1_000] * 10


def test_compressed_files_hold_the_same_images(tmp_path):
    raw = _write_mnist(tmp_path)
    plain = load_test("mnist", tmp_path, download=False)
    for name in IDX_FILES:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()
    assert load_test("mnist", tmp_path, download=False).fingerprint() == plain.fingerprint()
    cut = raw / f"{IDX_FILES[2]}.gz"
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{IDX_FILES[2]}\.gz: "):
        load_test("mnist", tmp_path, download=False)


def test_a_spec_names_the_data_sets_that_can_be_loaded():
    assert set(get_args(DataSpec.model_fields["name"].annotation)) == {"digits", *IDX_SETS}


@pytest.mark.parametrize("name", IDX_FILES)
def test_a_truncated_file_is_named(tmp_path, name):
    path = _write_mnist(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{name}: damaged IDX file"):
        load("mnist", tmp_path, download=False)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\x08", b"\0\0\x08\x03\0\0", b"<html>not found</html>", b"\0\0\x0d\x01" * 9],
    ids=["nothing", "half a magic number", "half a size", "a web page", "floats"],
)
def test_a_file_without_a_whole_header_is_named(tmp_path, content):
    path = _write_mnist(tmp_path) / IDX_FILES[0]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{IDX_FILES[0]}: damaged IDX file, its header"):
        load("mnist", tmp_path, download=False)


def test_a_file_with_bytes_too_many_is_named(tmp_path):
    path = _write_mnist(tmp_path) / IDX_FILES[1]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=rf"{IDX_FILES[1]}: damaged IDX file, 21 bytes where its header says 20"):
        load("mnist", tmp_path, download=False)


@pytest.mark.parametrize("read", [load, load_test])
def test_missing_mnist_names_the_folder_the_files_and_the_way_out(tmp_path, read):
    with pytest.raises(ValueError, match="no MNIST in") as error:
        read("mnist", tmp_path, download=False)
    for part in (str(tmp_path / "MNIST" / "raw"), *IDX_FILES, "downloading is off", "digits"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def _python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(tuner.__file__).parents[1])
    code = f"import sys; sys.path[:0] = [{str(path)!r}, {root!r}]\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_torchvision_data_sets_load_beside_a_cpu_torch(tmp_path):
    done = _python(
        """
        import torch
        from tuner.vae.data import _torchvision_datasets
        print(_torchvision_datasets().MNIST is _torchvision_datasets().MNIST)
        from torchvision import transforms, utils
        print(tuple(utils.make_grid(torch.zeros(4, 1, 2, 2)).shape))
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["True", "(3, 6, 18)"]), done.stderr


def test_a_whole_torchvision_that_declares_its_own_operators_loads_too(tmp_path):
    """A matching build registers `nms` from C++ when it is imported, and a second declaration is fatal."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "import torch\n"
        "library = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "library.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
    )
    (tmp_path / "torchvision" / "datasets.py").write_text("MNIST = 'whole'\n")
    done = _python("from tuner.vae.data import _torchvision_datasets; print(_torchvision_datasets().MNIST)", tmp_path)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


def test_only_the_export_may_read_the_test_split():
    package = Path(tuner.__file__).parent
    readers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any(name in path.read_text() for name in ("load_test", "_digits()[2]", "train=False"))
    }
    assert "vae/data.py" in readers
    assert readers <= {"vae/data.py", "export.py"}
