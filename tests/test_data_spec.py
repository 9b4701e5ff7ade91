"""Where images come from, as a spec says it."""

import os
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from tuner.data_spec import DataSpec, user_path
from tuner.vae.errors import Refused

PLACED: dict[str, dict[str, object]] = {name: {} for name in ("digits", "mnist", "fashion_mnist", "kmnist", "qmnist")}
PLACED |= {"emnist": {}, "cifar10": {}, "svhn": {}, "folder": {"directory": "data"}}
PLACED |= {"parquet": {"file": "data"}, "arrays": {"file": "data"}}
BRIGHT = {"digits", "mnist", "kmnist", "qmnist", "emnist"}


def parse(**keys: object) -> DataSpec:
    return TypeAdapter(DataSpec).validate_python(keys)


@pytest.mark.parametrize("name", PLACED)
def test_a_source_has_a_place_and_can_be_elsewhere(name):
    spec = parse(name=name, **PLACED[name])
    assert spec.place == Path("data")
    assert spec.at(None) == spec
    moved = spec.at(Path("elsewhere"))
    assert moved.place == Path("elsewhere")
    assert moved != spec
    assert moved.at(Path("data")) == spec
    assert spec.model_dump(mode="json")["name"] == name
    assert parse(**spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize("name", PLACED)
def test_ink_is_what_is_bright_on_black(name):
    assert parse(name=name, **PLACED[name]).ink == (name in BRIGHT)
    if name in ("folder", "parquet", "arrays"):
        assert parse(name=name, invert=True, **PLACED[name]).ink


@pytest.mark.parametrize("name", PLACED)
def test_what_is_decoded_says_how_it_got_its_size(name):
    if name in ("folder", "parquet"):
        spec = parse(name=name, size=32, **PLACED[name])
        assert spec.resize == "shorter side to 32, centre crop, antialiased"
    else:
        assert parse(name=name, **PLACED[name]).resize is None


def test_a_report_calls_the_users_own_images_by_where_they_are():
    assert parse(name="cifar10").title == "cifar10"
    assert parse(name="folder", directory="pictures/cats").title == "cats"
    assert parse(name="parquet", file="faces.parquet").title == "faces.parquet"
    assert parse(name="folder", directory=".").title == "folder"


def test_the_default_is_digits():
    assert parse() == parse(name="digits")
    assert parse(directory="elsewhere").name == "digits"


@pytest.mark.parametrize("size", [16, 20, 28, 64, 124, 128])
def test_sizes_are_in_steps_of_4(size):
    assert parse(name="folder", directory="data", size=size).size == size


@pytest.mark.parametrize(
    "keys",
    [
        *({"size": size} for size in (12, 15, 18, 30, 132, 64.5, True, "64")),
        *({"channels": channels} for channels in (0, 2, 4)),
        {"labels": "some"},
        {"on_damaged": "repair"},
        {"split": "balanced"},
        {"file": "photos"},
        {"download": True},
    ],
    ids=str,
)
def test_what_makes_no_folder_is_refused(keys):
    with pytest.raises(ValidationError):
        parse(name="folder", directory="data", **keys)


@pytest.mark.parametrize("name", PLACED)
def test_a_tilde_in_a_place_is_the_home_directory(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    key = next(iter(PLACED[name]), "directory")
    assert parse(name=name, **{key: "~/a~b"}).place == tmp_path / "a~b"
    assert parse(name=name, **PLACED[name]).at(Path("~")).place == tmp_path


def test_a_path_that_no_file_can_have_or_no_spec_can_hold_is_refused_in_one_line():
    for path in (
        "a/" + "x" * 256,
        "ü" * 128,
        "~nobody-of-that-name/x",
        os.fsdecode(b"a/\xff"),
        "a\nb",
        "a\0b",
        "a\x1b[1m",
    ):
        with pytest.raises(Refused) as refused:
            user_path(path)
        assert str(refused.value).isprintable()
    for path in ("x" * 255, "ü" * 127, "two words/größe/\u3000/~", "-", "[/b]"):
        assert user_path(path) == Path(path)
