"""What is painted in any mode is what is decoded; what is no image is told in one line."""

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tuner.sources.decode import decode
from tuner.vae.shape import ImageShape

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged images

SIDE = 32
GREY = np.arange(SIDE * SIDE, dtype=np.uint32).reshape(SIDE, SIDE).astype(np.uint8)  # each row and column its own
RED, GREEN, BLUE = GREY, GREY[::-1], GREY.T
COLOUR = np.stack([RED, GREEN, BLUE], axis=2)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(content: bytes) -> np.ndarray:
    found = decode(content, ImageShape(1, SIDE, SIDE))
    assert (found.shape, found.dtype) == ((1, SIDE, SIDE), np.uint8)
    return found[0].astype(int)


def colour(content: bytes) -> np.ndarray:
    """(H, W, 3)."""
    found = decode(content, ImageShape(3, SIDE, SIDE))
    assert (found.shape, found.dtype) == ((3, SIDE, SIDE), np.uint8)
    return found.transpose(1, 2, 0).astype(int)


def over_white(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha.astype(float) / 255
    return values * opacity + 255 * (1 - opacity)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "SGI", "PCX", "JPEG2000", "QOI", "WEBP", "DDS"])
def test_colour_is_kept_to_the_bit_in_every_format_that_keeps_it(kind):
    content = encoded(Image.fromarray(COLOUR), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert (colour(content) == COLOUR).all()


def test_grey_becomes_colour_and_colour_grey():
    assert (grey(encoded(Image.fromarray(GREY))) == GREY).all()
    assert (colour(encoded(Image.fromarray(GREY))) == GREY[..., None]).all()
    luma = COLOUR @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    assert np.abs(grey(encoded(Image.fromarray(COLOUR))) - luma).max() <= 1


def test_one_bit_is_black_and_white():
    bits = GREY % 3 == 0
    assert (grey(encoded(Image.fromarray(bits))) == 255 * bits).all()
    assert (grey(encoded(Image.fromarray(bits), "TIFF", compression="group4")) == 255 * bits).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
def test_a_palette_is_looked_up(kind):
    palette = np.random.default_rng(0).integers(256, size=(256, 3), dtype=np.uint8)
    image = Image.frombytes("P", (SIDE, SIDE), GREY.tobytes())
    image.putpalette(palette.tobytes())
    assert (colour(encoded(image, kind)) == palette[GREY]).all()


def test_a_transparent_colour_of_a_palette_is_white():
    palette = np.random.default_rng(0).integers(256, size=(256, 3), dtype=np.uint8)
    image = Image.frombytes("P", (SIDE, SIDE), GREY.tobytes())
    image.putpalette(palette.tobytes())
    expected = np.where((GREY == 7)[..., None], 255, palette[GREY])
    for kind in ("PNG", "GIF"):
        assert (colour(encoded(image, kind, transparency=7)) == expected).all()
    alphas = bytes(range(256))
    found = colour(encoded(image, transparency=alphas))
    assert np.abs(found - over_white(palette[GREY], GREY[..., None])).max() <= 1


def test_a_transparent_colour_without_a_palette_is_white():
    assert (grey(encoded(Image.fromarray(GREY), transparency=7)) == np.where(GREY == 7, 255, GREY)).all()
    key = tuple(COLOUR[3, 4].tolist())
    expected = np.where((key == COLOUR).all(2, keepdims=True), 255, COLOUR)
    assert (colour(encoded(Image.fromarray(COLOUR), transparency=key)) == expected).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TGA", "WEBP"])
def test_alpha_lies_over_white(kind):
    image = Image.fromarray(np.dstack([COLOUR, GREY[:, ::-1]]))
    content = encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    assert np.abs(colour(content) - over_white(COLOUR, GREY[:, ::-1, None])).max() <= 1


def test_grey_with_alpha_lies_over_white():
    image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(np.ascontiguousarray(GREY.T))])
    assert np.abs(grey(encoded(image)) - over_white(GREY, GREY.T)).max() <= 1


SIXTEEN = GREY.astype(np.uint16) * 257
DEEP: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encoded(Image.fromarray(SIXTEEN)),
    "little-endian TIFF": lambda: encoded(Image.fromarray(SIXTEEN), "TIFF"),
    "big-endian TIFF": lambda: encoded(Image.frombytes("I;16B", (SIDE, SIDE), SIXTEEN.astype(">u2").tobytes()), "TIFF"),
    "32-bit TIFF": lambda: encoded(Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF"),
    "PGM": lambda: b"P5 32 32 65535 " + SIXTEEN.astype(">u2").tobytes(),
    "floats": lambda: encoded(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_eight_bits_are_scaled_to_eight(kind):
    assert (grey(DEEP[kind]()) == GREY).all()
    assert (colour(DEEP[kind]()) == GREY[..., None]).all()


@pytest.mark.parametrize("values", [np.float32(255), np.float32("nan"), np.int32(70_000), np.int32(-1)], ids=str)
def test_values_whose_scale_is_not_known_are_refused(values):
    with pytest.raises(ValueError, match=r"values of mode [IF] outside of 0 to"):
        grey(encoded(Image.fromarray(np.full((SIDE, SIDE), values)), "TIFF"))


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_is_ink_on_white(kind):
    ink = np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[:, None], SIDE, 1)
    none, black = np.zeros_like(ink), np.full_like(ink, 64)
    image = Image.merge("CMYK", [Image.fromarray(part) for part in (ink, none, none, black)])
    expected = np.stack([(255 - part.astype(float)) * (255 - black) / 255 for part in (ink, none, none)], 2)
    assert np.abs(colour(encoded(image, kind, quality=100)) - expected).max() <= (1 if kind == "TIFF" else 4)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_of_several_frames_is_taken(kind):
    frames = [Image.new("L", (SIDE, SIDE), shade).convert("RGB") for shade in (200, 90)]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(colour(content) - 200).max() <= 1


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF 2.3, tag 0x0112
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.T,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).T,
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_as_exif_says(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (grey(encoded(Image.fromarray(GREY), exif=exif)) == TURNS[orientation](GREY)).all()
    smooth = np.add.outer(4 * np.arange(SIDE), 3 * np.arange(SIDE)).astype(np.uint8)
    found = grey(encoded(Image.fromarray(smooth), "JPEG", quality=100, exif=exif))
    assert np.abs(found - TURNS[orientation](smooth.astype(int))).max() <= 2


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 255))
def test_one_colour_stays_that_colour_at_any_size(width, height, shade):
    assert np.abs(grey(encoded(Image.new("L", (width, height), shade))) - shade).max() <= 1


@pytest.mark.parametrize("size", [(20_000, 20), (20, 20_000), (1, 1), (1, 999), (33, 32), (4_000, 3_000)], ids=str)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_middle_square_is_kept(size, kind):
    """It is red, and what lies beside it blue."""
    side = min(size)
    image = Image.new("RGB", size, "blue")
    image.paste("red", ((size[0] - side) // 2, (size[1] - side) // 2, (size[0] + side) // 2, (size[1] + side) // 2))
    found = colour(encoded(image, kind, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {})))
    inside = found if kind == "PNG" else found[1:-1, 1:-1]  # a JPEG's blocks run over the edge
    assert np.abs(inside - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [(900, 300), (300, 900), (48, 32), (12, 8), (1, 1), (4_000, 3_000)], ids=str)
def test_of_an_image_that_is_no_square_the_middle_of_the_same_form_is_kept(size, turned):
    """Two thirds as high as it is wide: it is red, and what lies beside it blue. JPEGs are decoded at a fraction."""
    scale = min(size[0] / 48, size[1] / 32)
    wide, high = max(1, round(48 * scale)), max(1, round(32 * scale))
    left, top = (size[0] - wide) // 2, (size[1] - high) // 2
    image = Image.new("RGB", size, "blue")
    image.paste("red", (left, top, left + wide, top + high))
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
        image = image.transpose(Image.Transpose.ROTATE_90)
    found = decode(encoded(image, "JPEG", quality=100, subsampling=0, exif=exif), ImageShape(3, 32, 48))
    assert found.shape == (3, 32, 48)
    assert np.abs(found[:, 2:-2, 2:-2] - np.array([255, 0, 0])[:, None, None]).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_scaling_down_averages(kind):
    """A pattern finer than the result is its mean, where picking pixels would give stripes."""
    fine = np.indices((1024, 1024)).sum(0) % 2 * 255
    content = encoded(Image.fromarray(fine.astype(np.uint8)), kind, **({"quality": 100} if kind == "JPEG" else {}))
    assert np.abs(grey(content) - 127.5).max() <= 1.5


def test_scaling_down_keeps_a_slope_straight():
    slope = np.repeat(np.linspace(0, 255, 640)[None], 640, 0)
    expected = slope.reshape(SIDE, 20, SIDE, 20).mean((1, 3))
    for kind in ("PNG", "JPEG"):
        found = grey(encoded(Image.fromarray(np.rint(slope).astype(np.uint8)), kind))
        assert np.abs(found - expected)[:, 2:-2].max() <= 1.5


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is so large, with nothing in it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize(("width", "height"), [(10_000, 9_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_more_pixels_than_pillow_takes_for_harmless_are_refused_before_they_are_made(width, height):
    with pytest.raises(ValueError, match=r"pixels are too many|exceeds limit of \d+ pixels"):
        grey(png_of(width, height))


PHOTO = encoded(Image.fromarray(COLOUR), "JPEG")
DAMAGED = {
    "nothing": b"",
    "text": b"no image at all",
    "a web page": b"<html><body>404</body></html>",
    "half a JPEG": PHOTO[: len(PHOTO) // 2],
    "a JPEG's first bytes": PHOTO[:30],
    "half a PNG": encoded(Image.fromarray(COLOUR))[:-200],
    "half a GIF": encoded(Image.fromarray(COLOUR), "GIF")[:900],
    "half a TIFF": encoded(Image.fromarray(COLOUR), "TIFF")[:500],
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n",
    "a CIE Lab TIFF": encoded(Image.new("LAB", (SIDE, SIDE)), "TIFF"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_no_image_is_a_value_error(what):
    with pytest.raises(ValueError, match=r".") as refused:
        grey(DAMAGED[what])
    assert "\n" not in str(refused.value)
    assert " at 0x" not in str(refused.value)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "TGA", "ICO"]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 10_000),
)
def test_a_damaged_image_is_decoded_somehow_or_refused(kind, changes, cut):
    content = bytearray(encoded(Image.fromarray(COLOUR), kind))
    for place, value in changes:
        content[place % len(content)] = value
    with suppress(ValueError):
        colour(bytes(content[: cut % len(content) + 1 if cut % 2 else None]))
