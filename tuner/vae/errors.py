"""What goes wrong while something is read, told in one line. Imports nothing of this package."""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 1_000  # characters of what a library says: four places that did not answer, each with its reason


class Refused(ValueError):
    """Bad input or a damaged file; the text is one line that names it. Commands end with status 2."""


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks; of the system's the reason alone."""
    said = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return " ".join(said.split())[:LONGEST]


def named(what: object, error: BaseException) -> str:
    """One line: `what`, a file if the system names one beside it, and what the error says."""
    file = str(getattr(error, "filename", None) or what)
    return f"{what}: {'' if file in str(what) else f'{file}: '}{one_line(error)}"


@contextmanager
def refusing(what: object, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors in the body, by default all, into a refusal, `named` after `what`."""
    caught = kinds or (Exception,)
    try:
        yield
    except caught as error:
        raise Refused(named(what, error)) from error
