"""The run directory: every path in it, its lock, atomic writes, the summary."""

import copy
import errno
import fcntl
import functools
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuner.summary import Summary
from tuner.vae.errors import Refused, refusing

UNKNOWN = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}  # how a file system says that it has no such call


@contextmanager
def if_known(lost: str) -> Iterator[None]:
    """Go on where the file system has no such call, as NFS, SMB or FUSE may; what is `lost` by that is said once."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
        _warn(lost)


@functools.cache
def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write through a temporary name, fsync and rename: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")  # of 255 bytes at most
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # of what fails after opening, Python names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with if_known("the run's file system syncs no folders: a power cut may cost what was written last"):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunFiles:
    """The files of one search. Nothing else in the package spells a path inside a run directory."""

    def __init__(self, path: Path, shown: str | None = None):
        self.path, self.shown = path, shown or str(path)  # what the user calls it
        self.spec = path / "spec.yaml"
        self.journal = path / "study.journal"
        self.trials = path / "trials.csv"
        self.images = path / ".images"  # decoded; hidden, so that they are no part of what goes to object storage
        self.given = path / "given.npz"  # arrays that a call from Python was given
        self.tensorboard = path / "tensorboard"
        self.artifacts = path / "artifacts"  # samples of each evaluation, as optuna-dashboard shows them
        self.ray = path / "ray"
        self.extractors = path / "extractors"
        self.held_out = path / "held_out.safetensors"
        self.checkpoints = path / "checkpoints"
        self.errors = path / "errors"
        self.retrain = path / "retrain"
        self.kept, self.refitted = self.retrain / "kept.pt", self.retrain / "refitted.pt"
        self.export = path / "export"
        self.report = path / "report.html"
        self.summary_file = path / "summary.json"
        self.lock = path / ".lock"

    @property
    def place(self) -> str:
        """What tells the run from all others: its path, or its URL without the query."""
        return self.shown.partition("?")[0] if "://" in self.shown else str(self.path.absolute())

    @property
    def name(self) -> str:
        return Path(self.place).name

    def name_of(self, path: Path) -> str:
        """What the user calls a file of the run."""
        place = self.place if "://" in self.shown else self.shown
        return f"{place}/{path.relative_to(self.path).as_posix()}"

    def images_at(self, place: Path | None) -> Path | None:
        """Where the images lie: at `place`, or in the run where a call from Python gave it some."""
        return place or (self.given if self.spec.exists() and self.given.exists() else None)

    def is_foreign(self) -> bool:
        """Whether the path is taken by something that is no run."""
        if self.spec.exists() or not self.path.exists():
            return False
        return not self.path.is_dir() or any(
            path not in (self.lock, self.images, self.given) and path.suffix != ".tmp" for path in self.path.iterdir()
        )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Be the one process that works on the run. Raises Refused where another does, or no folder can be made.

        The kernel holds the lock, where the file system has any, and lets go of it however the process ends. What a
        killed process left half written is removed.
        """
        with refusing(self.path, OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.lock.open("a")
        with file:
            try:
                with if_known(f"{self.shown}: its file system has no locks: let no other command work on this run"):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Refused(f"{self.shown}: another process is working on this run") from error
            for left in (*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")):
                if left.is_file() and not left.name.startswith(f".{self.report.name}"):  # written without the lock
                    left.unlink(missing_ok=True)
            yield

    def checkpoint(self, trial: int) -> Path:
        """The one checkpoint of a trial: where it stands, and its best evaluation."""
        return self.checkpoints / f"{trial:04d}.pt"

    def error(self, trial: int) -> Path:
        """The traceback of a trial that failed by an exception."""
        return self.errors / f"{trial:04d}.txt"

    def of_retrain(self) -> "RunFiles":
        """The same run's files, but those of trials are the retrain's: its finalists are numbered anew."""
        files = copy.copy(self)
        files.checkpoints = files.errors = self.retrain
        files.trials = self.retrain / "trials.csv"
        return files

    def extractor(self, name: str, kind: str = "classifier") -> Path:
        return self.extractors / f"{name}.{'pt2' if kind == 'program' else 'safetensors'}"

    def summary(self) -> Summary:
        """What is known of the run so far; empty before the first stage ended.

        Raises Refused where the file is damaged.
        """
        if not self.summary_file.exists():
            return Summary()
        named = self.name_of(self.summary_file)
        with refusing(f"{named}: not readable", OSError, UnicodeDecodeError):
            text = self.summary_file.read_text("utf-8")
        try:
            return Summary.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            at = " at " + ".".join(map(str, first["loc"])) if first["loc"] else ""
            raise Refused(f"{named}: damaged{at}: {first['msg']}") from error

    def update_summary(self, **parts: Any) -> Summary:
        """Lay `parts` over the summary; a mapping is merged into the mapping that is there."""
        known = self.summary()
        merged = {name: getattr(known, name) | part if isinstance(part, dict) else part for name, part in parts.items()}
        summary = Summary.model_validate({**dict(known), **merged})
        write_atomic(self.summary_file, summary.model_dump_json(indent=2, exclude_defaults=True) + "\n")
        return summary

    def write_trials(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """trials.csv: a row a trial, its columns in order of first appearance."""
        import pandas as pd  # which whoever only looks at a run does not wait for

        write_atomic(self.trials, pd.DataFrame(rows, dtype=object).to_csv(index=False))
