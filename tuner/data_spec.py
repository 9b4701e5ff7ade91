"""The part of a spec that says on which images: one class a kind of source, told apart by `name`."""

import os
import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from tuner.vae.errors import Refused, refusing

LONGEST_NAME = 255  # bytes, on about every file system
NO_TEXT = re.compile("[\0-\x1f\x7f\ud800-\udfff]")  # the last are what Python makes of bytes that are not UTF-8


def user_path(given: str | Path) -> Path:
    """A path as people write it, `~` being a home directory. Raises Refused where it can't be kept in a spec, told in
    one line, or be a name."""
    if NO_TEXT.search(str(given)):
        raise Refused(f"{str(given)!r}: a path that is not in UTF-8, or with control characters")
    with refusing(given, RuntimeError):
        path = Path(given).expanduser()
    for part in path.parts:
        if len(os.fsencode(part)) > LONGEST_NAME:
            raise Refused(f"{part[:40]}...: File name too long")
    return path


UserPath = Annotated[Path, AfterValidator(user_path)]
Whole = Annotated[int, Strict()]  # or true would be 1


class Frozen(BaseModel):
    """What every part of a spec and of a summary is."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,  # a default of 9 epochs is a float as a given one is
    )


class _Source(Frozen):
    name: str
    place_key: ClassVar[str] = "directory"

    @property
    def place(self) -> Path:
        """Where its files are: a folder or a file."""
        return Path(getattr(self, self.place_key))

    def at(self, place: Path | None) -> Self:
        """The same images at another place; None leaves them where they are."""
        return self if place is None else self.model_copy(update={self.place_key: user_path(place)})

    @property
    def title(self) -> str:
        """What a report calls the images."""
        return self.name

    @property
    def ink(self) -> bool:
        """Whether images are bright strokes on black, which sheets show as dark on white."""
        return self.name not in ("fashion_mnist", "cifar10", "svhn")

    @property
    def resize(self) -> str | None:
        """How images are brought to their size; None where they have it."""
        return None


class _Downloaded(_Source):
    directory: UserPath = Field(Path("data"), description="the folder that images are read from, or downloaded to")
    download: bool = Field(True, description="download images where their files are not in the directory")


class DigitsSpec(_Downloaded):
    """The handwritten digits that come with scikit-learn: nothing is read or downloaded."""

    name: Literal["digits"] = Field("digits", description="the default")


class IdxSpec(_Downloaded):
    """Grey 28x28 images in the four files of MNIST, plain or as `.gz`."""

    name: Literal["mnist", "fashion_mnist", "kmnist"] = Field(description="the data set")


class TorchvisionSpec(_Downloaded):
    """Grey 28x28 digits, or colour 32x32 photos, as torchvision keeps them."""

    name: Literal["qmnist", "cifar10", "svhn"] = Field(description="the data set")


class EmnistSpec(_Downloaded):
    """Grey 28x28 letters and digits, as torchvision keeps them."""

    name: Literal["emnist"] = Field(description="the data set")
    split: Literal["balanced", "byclass", "bymerge", "digits", "letters", "mnist"] = Field(
        "balanced", description="which part"
    )


class _Given(_Source):
    invert: bool = Field(False, description="turn black into white: for dark strokes on white")

    @property
    def title(self) -> str:
        return self.place.name or self.name

    @property
    def ink(self) -> bool:
        return self.invert


class DecodedSpec(_Given):
    """Images as files of their own, which are decoded, scaled by the shorter side and cropped to its centre."""

    size: Whole = Field(64, ge=16, le=128, multiple_of=4, description="height and width in pixels, in steps of 4")
    channels: Literal[1, 3] = Field(3, description="1 is grey, 3 colour")
    labels: Literal["auto", "none"] = Field("auto", description="whether to take labels where there are any")
    on_damaged: Literal["refuse", "skip"] = Field("refuse", description="what happens where images are damaged")

    @property
    def resize(self) -> str:
        return f"shorter side to {self.size}, centre crop, antialiased"


class FolderSpec(DecodedSpec):
    """A folder or `.zip` of images. Below `train`, `validation` and `test`, where there are, folders are labels."""

    name: Literal["folder"] = Field(description="images as files")
    directory: UserPath = Field(description="the folder, or a .zip of it")


class ParquetSpec(DecodedSpec):
    """Hugging Face's data sets: a column `image` or `img`, else the first that holds bytes, and `label`, if there is
    one. Shards `train-*` and `test-*` are splits."""

    place_key: ClassVar[str] = "file"

    name: Literal["parquet"] = Field(description="images in tables")
    file: UserPath = Field(description="a .parquet file, or a folder of them")


class ArraysSpec(_Given):
    """Arrays `images` and, if there are any, `labels`; or `train_images`, `train_labels`, `validation_images`,
    `test_images` and so on. Images are (N, H, W) or (N, H, W, C), H and W from 16 to 128 in steps of 4, C 1 or 3, uint8
    or floats in 0 to 1."""

    place_key: ClassVar[str] = "file"

    name: Literal["arrays"] = Field(description="images as NumPy arrays")
    file: UserPath = Field(description="an .npz, or an .npy of images alone")


DataSpec = Annotated[
    Annotated[
        DigitsSpec | IdxSpec | TorchvisionSpec | EmnistSpec | FolderSpec | ParquetSpec | ArraysSpec,
        Field(discriminator="name"),
    ],
    BeforeValidator(lambda value: {"name": "digits"} | value if isinstance(value, dict) else value),
]
