"""Errors told in one line."""

import pytest

from tuner.vae.errors import LONGEST, Refused, one_line, refusing


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (FileNotFoundError(2, "No such file", "place"), "No such file"),
        (EOFError(), "EOFError"),
        (ValueError("x" * 1_000), "x" * LONGEST),
    ],
)
def test_an_error_is_told_in_one_line(error, words):
    assert one_line(error) == words


def test_only_the_kinds_that_are_named_are_refused():
    with pytest.raises(Refused, match=r"^some file: no good$"), refusing("some file", ValueError, KeyError):
        raise ValueError("no\ngood")
    with pytest.raises(Refused, match=r"^some file: anything$"), refusing("some file"):
        raise RuntimeError("anything")
    with pytest.raises(TypeError, match=r"^a bug$"), refusing("some file", ValueError):
        raise TypeError("a bug")


@pytest.mark.parametrize(
    ("what", "said"), [("Ray", "Ray: place: No such file"), ("of place", "of place: No such file")]
)
def test_a_file_that_the_system_names_is_named_once(what, said):
    with pytest.raises(Refused, match=f"^{said}$"), refusing(what):
        raise FileNotFoundError(2, "No such file", "place")
