"""torchvision's data sets, from files laid out as torchvision lays them, and beside any build of torch."""

import hashlib
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

import tuner
from tuner import sources
from tuner.data_spec import EmnistSpec, TorchvisionSpec
from tuner.sources.torchvision import torchvision_datasets
from tuner.vae.data import Split

TRAIN, TEST = 600, 80


def _spec(directory: Path, name: str) -> TorchvisionSpec:
    return TorchvisionSpec.model_validate({"name": name, "directory": directory, "download": False})


def _images(count: int, channels: int, side: int) -> np.ndarray:
    """(N, C, H, W), random, and the image's number in its first two pixels."""
    images = np.random.default_rng(count).integers(256, size=(count, channels, side, side), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(count) // 256, np.arange(count) % 256
    return images


def _check(train: Split, validation: Split, test: Split, channels: int, side: int, classes: int) -> None:
    """Every image is there once, upright, in its channels' order, with the label that is its number's remainder."""
    assert (len(train), len(validation), len(test)) == (TRAIN - TRAIN // 6, TRAIN // 6, TEST)
    for found, count in ((Split(torch.cat([train.images, validation.images])), TRAIN), (test, TEST)):
        numbers = found.images[:, 0, 0, 0].long() * 256 + found.images[:, 0, 0, 1]
        assert sorted(numbers.tolist()) == list(range(count))
        assert torch.equal(found.images, torch.from_numpy(_images(count, channels, side))[numbers])
        labels = torch.cat([train.labels, validation.labels]) if found is not test else test.labels
        assert labels.tolist() == (numbers % classes).tolist()


def _read(spec: TorchvisionSpec | EmnistSpec) -> tuple[Split, Split, Split]:
    data = sources.load(spec)
    return data.train, data.validation, sources.load_test(spec)


def _write_idx(path: Path, values: np.ndarray, kind: int = 8) -> None:
    """LeCun's format; a kind of 8 is bytes, 12 whole numbers of four."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = np.array(values.shape, ">u4").tobytes()
    path.write_bytes(
        bytes([0, 0, kind, values.ndim]) + sizes + values.astype(np.uint8 if kind == 8 else ">i4").tobytes()
    )


@pytest.mark.parametrize(("split", "classes", "first"), [("balanced", 47, 0), ("letters", 26, 1), ("digits", 10, 0)])
def test_emnist_stands_upright(tmp_path, split, classes, first):
    for part, count in (("train", TRAIN), ("test", TEST)):
        images, stem = _images(count, 1, 28)[:, 0], tmp_path / f"EMNIST/raw/emnist-{split}-{part}"
        _write_idx(Path(f"{stem}-images-idx3-ubyte"), images.transpose(0, 2, 1))  # as NIST has it: column by column
        _write_idx(Path(f"{stem}-labels-idx1-ubyte"), np.arange(count) % classes + first)
    spec = EmnistSpec(name="emnist", split=split, directory=tmp_path, download=False)
    _check(*_read(spec), channels=1, side=28, classes=classes)
    assert spec.ink


def test_qmnist_has_the_class_first_of_what_it_tells(tmp_path):
    for part, count in (("train", TRAIN), ("test", TEST)):
        _write_idx(tmp_path / f"QMNIST/raw/qmnist-{part}-images-idx3-ubyte", _images(count, 1, 28)[:, 0])
        labels = np.stack([np.arange(count) % 10, *np.arange(7 * count).reshape(7, count)], 1)
        _write_idx(tmp_path / f"QMNIST/raw/qmnist-{part}-labels-idx2-int", labels, kind=12)
    _check(*_read(_spec(tmp_path, "qmnist")), channels=1, side=28, classes=10)


def test_cifar10_is_in_colour(tmp_path, monkeypatch):
    folder, cifar10 = tmp_path / "cifar-10-batches-py", torchvision_datasets().CIFAR10
    folder.mkdir()

    def written(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    lists = []
    for names, count in ((["data_batch_1", "data_batch_2"], TRAIN), (["test_batch"], TEST)):
        images, labels = _images(count, 3, 32).reshape(count, -1), np.arange(count) % 10
        parts = zip(names, np.split(images, len(names)), np.split(labels, len(names)), strict=True)
        lists.append([[name, written(name, {"data": data, "labels": part.tolist()})] for name, data, part in parts])
    monkeypatch.setattr(cifar10, "train_list", lists[0])
    monkeypatch.setattr(cifar10, "test_list", lists[1])
    md5 = written("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(cifar10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    _check(*_read(_spec(tmp_path, "cifar10")), channels=3, side=32, classes=10)
    (folder / "test_batch").write_bytes(b"cut")
    with pytest.raises(ValueError, match=rf"no CIFAR10 .* in {tmp_path}, where .* is off \(Dataset not found"):
        sources.load(_spec(tmp_path, "cifar10"))


def test_svhn_has_class_10_for_0(tmp_path, monkeypatch):
    listed = {}
    for part, count in (("train", TRAIN), ("test", TEST)):
        path = tmp_path / f"{part}_32x32.mat"
        labels = np.arange(count) % 10
        labels[labels == 0] = 10
        savemat(path, {"X": _images(count, 3, 32).transpose(2, 3, 1, 0), "y": labels[:, None].astype(np.uint8)})
        listed[part] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision_datasets().SVHN, "split_list", listed)
    _check(*_read(_spec(tmp_path, "svhn")), channels=3, side=32, classes=10)


@pytest.mark.parametrize("name", ["qmnist", "cifar10", "svhn", "emnist"])
def test_a_set_that_is_nowhere_is_told_in_one_line(tmp_path, name):
    made = EmnistSpec if name == "emnist" else TorchvisionSpec
    spec = made.model_validate({"name": name, "directory": tmp_path, "download": False})
    for read in (sources.load, sources.load_test):
        with pytest.raises(
            ValueError, match=f"no {name.upper()} that torchvision can read in {tmp_path}, where there is nothing, and"
        ) as e:
            read(spec)
        assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_told_in_one_line(tmp_path):
    for part in ("train", "test"):
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            path = tmp_path / f"EMNIST/raw/emnist-balanced-{part}-{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"no EMNIST .*, where there is EMNIST/raw/emn.*, and downloading is off \("):
        sources.load(EmnistSpec(name="emnist", directory=tmp_path, download=False))


def _python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(tuner.__file__).parents[1])
    code = f"import sys; sys.path[:0] = [{str(path)!r}, {root!r}]\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_torchvision_data_sets_load_beside_a_cpu_torch(tmp_path):
    done = _python(
        """
        import torch
        from tuner.sources.torchvision import torchvision_datasets
        print(torchvision_datasets().MNIST is torchvision_datasets().MNIST)
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
    code = "from tuner.sources.torchvision import torchvision_datasets; print(torchvision_datasets().MNIST)"
    done = _python(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr
