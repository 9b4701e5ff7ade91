"""How a command ends before its work is done: one line that says why and how to go on, and a status.

1: it can't go on here and now, the same command can later; 2: bad input or a damaged file; 130: Ctrl-C; 143: SIGTERM.
"""

import errno
import functools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

from tuner.vae.errors import Refused

STOP_SECONDS = 8  # what a clean stop may take after the first signal
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE}
UNWRITABLE |= {errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR}

P = ParamSpec("P")
R = TypeVar("R")


class CutOff(Exception):
    """The work can't go on here and now; the text is one line that says why."""


class Fatal(BaseException):
    """Ends the whole command with its cause. No Exception: Ray Tune takes those for the failure of one trial."""


def fatal(method: Callable[P, R]) -> Callable[P, R]:
    """Decorates what the driver does inside of Ray Tune's loop: an exception in it ends the command."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            raise Fatal from error

    return wrapped


def command(module: str, arguments: Sequence[str], *more: str) -> str:
    """A command as it would be typed."""
    return shlex.join(["python", "-m", module, *arguments, *more])


@contextmanager
def resumable(again: str) -> Iterator[None]:
    """Run the body so that whatever cuts it off ends the process with one line that names the command `again`.

    The first Ctrl-C or SIGTERM raises KeyboardInterrupt in the body and gives it 8 seconds to end; the second
    ends the process at once.
    """
    words = f"go on with: {again}"
    threading.excepthook = _quiet_threads
    with _signals(f"stopped; {words}") as caught:
        try:
            try:
                yield
            except Fatal as fatal_error:
                raise fatal_error.__cause__ or fatal_error from None
        except KeyboardInterrupt:
            _leave(f"stopped; {words}", 128 + (caught[0] if caught else signal.SIGINT))
        except Refused as error:
            _leave(f"error: {error}", 2)
        except CutOff as error:
            _leave(f"error: {error}; {words}", 1)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            _leave(f"error: {error.filename or 'the run directory'}: {error.strerror}; once that is mended, {words}", 1)


@contextmanager
def _signals(words: str) -> Iterator[list[int]]:
    """Handle SIGINT and SIGTERM -> the signals caught so far."""
    caught: list[int] = []

    def end(number: int) -> None:
        os.write(2, f"{words}\n".encode())
        os._exit(128 + number)

    def on_signal(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1:
            end(number)
        timer.args = [number]
        timer.start()
        os.write(2, b"stopping; once more stops at once\n")  # print may be what was interrupted
        raise KeyboardInterrupt

    timer = threading.Timer(STOP_SECONDS, end)
    timer.daemon = True
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before: dict[int, Any] = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _quiet_threads(thrown: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer thread meets the full disk too; the main thread is told by the next write."""
    if not (isinstance(thrown.exc_value, OSError) and thrown.exc_value.errno in UNWRITABLE):
        threading.__excepthook__(thrown)


def _leave(line: str, status: int) -> NoReturn:
    print(line, file=sys.stderr)
    raise SystemExit(status)
