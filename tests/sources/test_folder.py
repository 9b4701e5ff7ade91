"""Folders and zips of images: splits, labels, oddities; what can't be read is told by name."""

import os
import shutil
import zipfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from painted import SIDE, encoded, numbers, write
from PIL import Image

from tuner import sources
from tuner.data_spec import FolderSpec
from tuner.sources import folder
from tuner.sources.decode import decode
from tuner.vae.data import Data, Split
from tuner.vae.shape import ImageShape

SHARED = Path(__file__).parents[2].parent / "shared/data"


def _spec(directory: Path, **options: object) -> FolderSpec:
    return FolderSpec.model_validate({"name": "folder", "directory": directory, "size": SIDE, **options})


def _found(directory: Path, **options: object) -> dict[str, tuple[str | None, int | str | None]]:
    """Split and label of each image by its name."""
    return {image.name: (image.split, image.label) for image in folder.pictures(_spec(directory, **options))}


def _touch(place: Path, *names: str) -> Path:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"x")
    return place


def _fingerprints(spec: FolderSpec, kept: Path | None = None) -> list[str]:
    data = sources.load(spec, kept)
    return [split.fingerprint() for split in (data.train, data.validation, sources.load_test(spec, kept))]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits by name, with three classes: the number's remainder."""
    place = tmp_path_factory.mktemp("named")
    for split, first, count in (("train", 0, 210), ("val", 300, 66), ("test", 400, 69)):
        for kind in range(3):
            for number in range(first + kind, first + count, 3):
                path = place / split / "abc"[kind] / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(number))
    return place


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand images in one folder."""
    place = tmp_path_factory.mktemp("flat") / "photos"
    write(place, 1_000)
    return place


# Splits and labels


def test_splits_and_classes_are_folders(named):
    data, test = sources.load(_spec(named)), sources.load_test(_spec(named))
    assert data.shape == (3, SIDE, SIDE)
    assert data.classes == 3
    for split, first, count in ((data.train, 0, 210), (data.validation, 300, 66), (test, 400, 69)):
        found = numbers(split.images.numpy())
        assert sorted(found) == list(range(first, first + count))
        assert [(number - first) % 3 for number in found] == split.labels.tolist()
        assert split.labels.dtype == torch.int64
        assert (split.images[:, :, 1:] == torch.tensor(found)[:, None, None, None] % 200).all()


def test_images_stand_in_no_order_of_classes(named):
    labels = sources.load(_spec(named)).train.labels
    assert (labels[1:] != labels[:-1]).sum() > 100


def test_labels_are_left_out_on_demand(named):
    data = sources.load(_spec(named, labels="none"))
    assert (data.train.labels, data.validation.labels, data.classes) == (None, None, None)
    assert torch.equal(data.train.images, sources.load(_spec(named)).train.images)


def test_progress_is_told(flat, tmp_path):
    said: list[str] = []
    sources.load(_spec(flat), tmp_path, said.append)
    assert said == ["500 of 1,000 images looked at", "500 of 1,000 images decoded"]
    sources.load(_spec(flat), tmp_path, said.append)
    assert said[2:] == ["500 of 1,000 images looked at"]


def test_a_flat_folder_is_split_by_content_and_has_no_labels(flat, tmp_path):
    spec = _spec(flat)
    data, test = sources.load(spec), sources.load_test(spec)
    splits = [set(numbers(split.images.numpy())) for split in (data.train, data.validation, test)]
    assert set.union(*splits) == set(range(1_000))
    assert sum(map(len, splits)) == 1_000
    assert data.classes is None
    other = tmp_path / "other"  # other names, classes and images beside
    for number in range(1_000):
        path = other / "ab"[number % 2] / f"{999 - number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(flat / f"{number:04d}.png", path)
    write(other / "b", 30, first=1_000)
    write(other / "a", 20)  # again
    moved, moved_test = sources.load(_spec(other)), sources.load_test(_spec(other))
    assert moved.classes == 2
    for before, after in zip(splits, (moved.train, moved.validation, moved_test), strict=True):
        assert {number for number in numbers(after.images.numpy()) if number < 1_000} == before


def test_colour_size_and_inversion(flat):
    spec = _spec(flat, channels=1, size=20, invert=True)
    data = sources.load(spec)
    assert data.shape == (1, 20, 20)
    plain = sources.load(_spec(flat, channels=1, size=20))
    assert torch.equal(data.train.images, 255 - plain.train.images)
    assert (spec.ink, _spec(flat).ink) == (True, False)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["1.png", "2.JPG", "3.jpeg"], [(None, None)] * 3),
        (["a/1.png", "b/2.png", "b/c/3.png"], [(None, "a"), (None, "b"), (None, "b")]),
        (["a/1.png", "2.png"], [(None, None)] * 2),  # one lies in no class
        (["a/1.png", "a/2.png"], [(None, None)] * 2),  # one class
        (["photos/a/1.png", "photos/b/2.png"], [(None, "a"), (None, "b")]),
        (["x/y/train/a/1.png", "x/y/train/b/2.png"], [("train", "a"), ("train", "b")]),
        (["train/a/1.png", "valid/b/2.png", "test/a/3.png"], [("test", "a"), ("train", "a"), ("validation", "b")]),
        (["Train/1.png", "VAL/2.png", "valid/3.png"], [("train", None), *[("validation", None)] * 2]),
        (["train/a/1.png", "test/2.png"], [("test", None), ("train", None)]),
        (["b/train/1.png", "a/train/2.png"], [(None, "a"), (None, "b")]),  # splits stand above classes
    ],
)
def test_what_folders_mean(tmp_path, names, expected):
    found = _found(_touch(tmp_path, *names))
    assert list(found.values()) == expected
    assert sorted(found) == sorted(names)


def test_what_is_no_image_by_its_name_is_left_out(tmp_path):
    names = [".hidden.png", ".git/1.png", "__MACOSX/._1.png", "a/Thumbs.db", "labels.csv", "README", "a.txt", "a.json"]
    names += [".DS_Store", "a/__MACOSX/2.png", "paper.pdf", "figure.eps", "data.h5", "noending", "film.mp4"]
    _touch(tmp_path, *names, "1.png")
    assert list(_found(tmp_path)) == ["1.png"]


def test_links_are_followed_but_never_round_in_circles(tmp_path):
    place = _touch(tmp_path / "photos", "a/1.png", "b/2.png")
    _touch(tmp_path / "elsewhere", "3.png", "deep/4.png")
    (place / "b" / "linked.png").symlink_to(tmp_path / "elsewhere" / "3.png")
    (place / "c").symlink_to(tmp_path / "elsewhere")
    (place / "a" / "up").symlink_to(place)
    (place / "a" / "beside").symlink_to("../b")
    (place / "b" / "beside").symlink_to("../a")
    (place / "round").symlink_to("round")
    (place / "lost.png").symlink_to("nowhere.png")
    os.mkfifo(place / "pipe.png")
    found = _found(place)
    assert sorted(found) == ["a/1.png", "b/2.png", "b/linked.png", "c/3.png", "c/deep/4.png", "lost.png"]
    assert _found(_touch(tmp_path / "c", "a/1.png", "b/2.png"))["a/1.png"] == (None, "a")


def test_names_of_any_letters(tmp_path):
    place = tmp_path / "bilder ☃"
    write(place / "größe", 200)
    write(place / "日本", 700, first=200)
    os.rename(place / "größe" / "0000.png", os.fsencode(place / "größe") + b"/\xff\xfe.png")
    (place / "日本" / "0200.png").rename(place / "日本" / "new\nline.PNG")
    data = sources.load(_spec(place), tmp_path / "kept")
    assert data.classes == 2
    everything = Split(torch.cat([data.train.images, data.validation.images]))
    labels = torch.cat([data.train.labels, data.validation.labels])
    assert [int(number >= 200) for number in numbers(everything.images.numpy())] == labels.tolist()
    (place / "日本" / "new\nline.PNG").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"new line\.PNG \(no image\)"):
        sources.load(_spec(place))


# Zips


def _zipped(place: Path, to: Path, top: str = "") -> Path:
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(place.rglob("*")):
            archive.write(path, f"{top}{path.relative_to(place)}")
    return to


def test_a_zip_holds_the_same_images_as_the_folder(named, tmp_path):
    expected = _fingerprints(_spec(named))
    assert _fingerprints(_spec(_zipped(named, tmp_path / "a.zip"))) == expected
    assert _fingerprints(_spec(_zipped(named, tmp_path / "b.zip", top="photos/2024/"))) == expected


def test_a_damaged_member_of_a_zip_is_named(named, tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for member in sorted(named.rglob("*.png")):
            archive.write(member, member.relative_to(named))
        place = archive.getinfo("train/b/1.png").header_offset
    content = bytearray(path.read_bytes())
    content[place + 60] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip: 1 of 345 images can't be read: train/b/1\.png \(Bad CRC-32"):
        sources.load(_spec(path))


@pytest.mark.parametrize(
    ("write_it", "words"),
    [
        (lambda path: None, "photos: No such file or directory"),
        (lambda path: path.write_bytes(b"PK no zip"), "photos: not a folder, and not a whole .zip"),
        (lambda path: path.mkdir(), "photos: no images in it"),
        (lambda path: _touch(path, "a.txt", ".b.png"), "photos: no images in it"),
    ],
    ids=["nothing", "damaged", "empty", "no images"],
)
def test_a_place_without_images_is_refused(tmp_path, write_it, words):
    write_it(tmp_path / "photos")
    with pytest.raises(ValueError, match=words) as error:
        sources.load(_spec(tmp_path / "photos"))
    assert str(tmp_path) in str(error.value)


# Damage, and too few or too many


def test_damaged_images_are_refused_by_name_with_their_count(named, tmp_path, capfd):
    place = shutil.copytree(named, tmp_path / "photos")
    (place / "train/a/0.png").write_bytes(encoded(0)[:45])
    (place / "train/b/lost.jpg").symlink_to("nowhere.jpg")
    (place / "test/c/none.gif").write_bytes(b"")
    (place / "val/a/text.webp").write_text("text")
    words = (
        r"photos: 4 of 348 images can't be read: test/c/none\.gif \(no image\), train/a/0\.png \([^)]+\), "
        r"train/b/lost\.jpg \(No such file or directory\), \.\.\.; data\.on_damaged=skip leaves them out$"
    )
    for read in (sources.load, sources.load_test):
        with pytest.raises(ValueError, match=words):
            read(_spec(place))
    assert capfd.readouterr().err == ""
    data = sources.load(_spec(place, on_damaged="skip"))
    err = capfd.readouterr().err
    assert err.startswith(f"{place}: 4 of 348 images can't be read and are left out: test/c/none.gif (no image), ")
    assert err.count("\n") == 1
    assert len(data.train) == 209
    whole = sources.load(_spec(named))
    kept = [number != 0 for number in numbers(whole.train.images.numpy())]
    assert torch.equal(data.train.images, whole.train.images[kept])
    assert torch.equal(data.train.labels, whole.train.labels[kept])


def test_too_few_images_are_refused(tmp_path):
    write(tmp_path / "photos", 40)
    with pytest.raises(ValueError, match=r"photos: too few images: \d+ for train where 200 are needed, .* 900 in all"):
        sources.load(_spec(tmp_path / "photos"), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_too_many_images_are_refused_before_any_is_decoded(tmp_path, monkeypatch):
    _touch(tmp_path, *(f"{number}.png" for number in range(1_000)))
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**15}.__getitem__)
    with pytest.raises(ValueError, match=r"1,000 images of 3x128x128 take 0\.6 GiB of memory .* there are 0\.1"):
        sources.load(_spec(tmp_path, size=128))


# What is kept


def _written(kept: Path) -> object:
    path = kept / "train.safetensors"
    return path.exists() and (path.stat().st_ino, path.stat().st_mtime_ns)


def _load(spec: FolderSpec, kept: Path) -> tuple[Data, bool]:
    """The images, and whether they were decoded, which writes a new file."""
    before = _written(kept)
    return sources.load(spec, kept), _written(kept) != before


def test_decoding_is_done_once(named, tmp_path):
    kept = tmp_path / "kept"
    _, decoded = _load(_spec(named), kept)
    assert decoded
    assert sorted(path.stem for path in kept.iterdir()) == ["test", "train", "validation"]
    again, decoded = _load(_spec(named), kept)
    assert not decoded
    assert [split.fingerprint() for split in (again.train, again.validation)] == _fingerprints(_spec(named))[:2]
    moved = shutil.copytree(named, tmp_path / "moved")
    assert not _load(_spec(moved), kept)[1]  # the content counts, not the place
    assert again.train.images.add_(1) is again.train.images  # they are one's own
    assert not _load(_spec(named), kept)[1]


def test_training_reads_no_test_split(named, tmp_path):
    kept = tmp_path / "kept"
    _load(_spec(named), kept)
    test = kept / "test.safetensors"
    test.unlink()
    assert not _load(_spec(named), kept)[1]
    assert not test.exists()
    assert len(sources.load_test(_spec(named), kept)) == 69
    assert test.exists()


@pytest.mark.parametrize("change", ["an image", "a class", "an option", "a new image"])
def test_what_is_kept_of_other_images_is_decoded_anew(named, tmp_path, change):
    place, kept = shutil.copytree(named, tmp_path / "photos"), tmp_path / "kept"
    _load(_spec(place), kept)
    spec = _spec(place, size=24) if change == "an option" else _spec(place)
    if change == "an image":
        (place / "train/a/0.png").write_bytes(encoded(200))
    if change == "a class":
        (place / "train/a/0.png").rename(place / "train/b/0.png")
    if change == "a new image":
        (place / "train/a/new.png").write_bytes(encoded(999))
    _, decoded = _load(spec, kept)
    assert decoded
    assert _fingerprints(spec, kept) == _fingerprints(spec)


@pytest.mark.parametrize("damage", ["cut", "flipped", "renamed", "emptied", "another's"])
def test_a_damaged_file_of_what_is_kept_is_decoded_anew(named, tmp_path, damage):
    kept = tmp_path / "kept"
    expected = _fingerprints(_spec(named), kept)
    path = kept / "train.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-100:]
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    if damage == "renamed":
        content[content.index(b"images")] ^= 1
    other = (kept / "validation.safetensors").read_bytes()
    path.write_bytes({"emptied": b"", "another's": other}.get(damage, content))
    assert _load(_spec(named), kept)[1]
    assert _fingerprints(_spec(named), kept) == expected


# A hundred odd files

SHADE = 140
MODES = {  # that shade in each
    "1": 1,
    "L": SHADE,
    "LA": (SHADE, 255),
    "P": SHADE,  # of a grey palette
    "PA": (SHADE, 255),
    "RGB": (SHADE,) * 3,
    "RGBA": (SHADE, SHADE, SHADE, 255),
    "RGBX": (SHADE, SHADE, SHADE, 0),
    "CMYK": (0, 0, 0, 255 - SHADE),
    "YCbCr": (SHADE, 128, 128),
    "I;16": SHADE * 257,
    "I": SHADE * 257,
    "F": SHADE / 255,
}
KINDS = "png jpg jpeg gif tif tiff bmp webp ppm tga pcx sgi jp2 im qoi dds ico avif".split()  # noqa: SIM905
DEEP = {"png", "tif", "tiff", "ppm", "jp2", "im"}  # which hold more than bytes
SIZES = ((1, 1), (1, 40), (40, 1), (33, 17), (300, 200), (20_000, 20))


def _odd_files(place: Path) -> list[str]:
    """One shade in every mode that every format can hold, in every size -> the names."""
    names = []
    for (mode, value), kind in product(MODES.items(), KINDS):
        size = SIZES[len(names) % len(SIZES)] if kind not in ("ico", "avif") else (64, 64)
        if mode in ("I;16", "I", "F") and kind not in DEEP:
            continue
        image = Image.new(mode, size, value)
        if mode in ("P", "PA"):
            image.putpalette(bytes(grey for grey in range(256) for _ in "RGB"))
        name = f"größe {mode[:1]}/№ {len(names):03d} of {mode}.{kind.upper() if mode == 'L' else kind}"
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            image.save(place / name)
            names.append(name)
        except (OSError, KeyError, ValueError):  # a mode that this format has not
            (place / name).unlink(missing_ok=True)
    return names


@pytest.mark.parametrize("channels", [1, 3])
def test_a_hundred_odd_files_give_what_was_painted_or_are_named(tmp_path, capfd, channels):
    odd, place = tmp_path / "odd", tmp_path / "photos"
    names = _odd_files(odd)
    assert len(names) > 100
    for name in names:
        found = decode((odd / name).read_bytes(), ImageShape(channels, SIDE, SIDE))
        assert found.shape == (channels, SIDE, SIDE), name
        assert np.abs(found.astype(int) - (255 if " of 1." in name else SHADE)).max() <= 2, name
    shutil.copytree(odd, place / "train" / "odd")
    for split, first in (("train", 0), ("val", 300), ("test", 600)):
        write(place / split / "even", 200, first)
    damaged = ["half.jpg", "none.png", "text.gif", "lost.tif"]
    (place / "train/odd/half.jpg").write_bytes((odd / names[-1]).read_bytes()[:20])
    (place / "train/odd/none.png").write_bytes(b"")
    (place / "train/odd/text.gif").write_text("text")
    (place / "train/odd/lost.tif").symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"4 of {604 + len(names)} images can't be read") as error:
        sources.load(_spec(place, channels=channels))
    assert sum(name in str(error.value) for name in damaged) == 3
    data = sources.load(_spec(place, channels=channels, on_damaged="skip"))
    assert data.train.labels.bincount().tolist() == [200, len(names)]
    assert "are left out" in capfd.readouterr().err


# Real photographs


@pytest.mark.skipif(not (SHARED / "cifar10-jpeg.zip").exists(), reason=f"no cifar10-jpeg.zip in {SHARED}")
@pytest.mark.slow
def test_photographs_are_read_from_their_zip_as_pillow_reads_them(tmp_path):
    place = SHARED / "cifar10-jpeg.zip"
    spec = FolderSpec(name="folder", directory=place, size=32)
    data, test = sources.load(spec, tmp_path), sources.load_test(spec, tmp_path)
    assert len(data.train) + len(data.validation) == 10_000
    assert 900 < len(data.validation) < 1_100
    assert (data.train.labels.bincount() + data.validation.labels.bincount()).tolist() == [1_000] * 10
    assert test.labels.bincount().tolist() == [200] * 10
    with zipfile.ZipFile(place) as archive, archive.open("test/cat/0007.jpg") as file:
        photo = torch.from_numpy(np.asarray(Image.open(file)).transpose(2, 0, 1).copy())
    (index,) = (test.images == photo).flatten(1).all(1).nonzero().flatten()
    assert test.labels[index] == 3  # airplane, automobile, bird, cat
