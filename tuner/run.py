"""The run directory: every path in it, its lock, atomic writes, the summary."""

import csv
import fcntl
import io
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OUTCOMES = ("complete", "pruned", "failed")
STATES = ("waiting", "running", *OUTCOMES)
TEXT_COLUMNS = (  # of trials.csv
    {"state", "reason", "model", "likelihood", "pixels", "schedule", "prior", "contrast", "started", "ended"}
)
# What summary.json holds, once the stage that writes it is done; "*" stands for all other keys.
_SCORES = {"frechet_distance": float, "gap_closed": float, "*": float}
_WINNER = {"latent_dim": float, "learning_rate": float, "kl_weight": float, "*": object}
SUMMARY: dict[str, Any] = {
    "spec": {"trials": int, "metric": str, "direction": str, "searched": [str]},
    "extractors": {"*": {"sha256": str, "accuracy": float, "width": int, "deep": bool}},
    "trials": {"complete": int, "pruned": int, "failed": int},
    "floor": float,
    "baseline": float,
    "promotion": [
        {
            "trial": int,
            "epoch": float,
            "searched": float,
            "search_gap_closed": float,
            "second_gap_closed": float,
            "*": float,
        }
    ],
    "best": {"trial": int, "epoch": float, "params": _WINNER, **_SCORES},
    "retrain": {"epochs": int, "kept_epoch": float, "params": _WINNER, **_SCORES},
    "test": {"baseline": _SCORES, "best": {"floor": float, **_SCORES}, "*": _SCORES},
    "seconds": {"*": float},
}
BEFORE_BEST = {"spec", "extractors", "trials", "floor", "baseline", "promotion"}


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write through a temporary name, fsync and rename: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
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


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Refused(ValueError):
    """Bad input or a damaged file; the text is one line that names it. Commands end with status 2."""


class RunFiles:
    """The files of one search. Nothing else in the package spells a path inside a run directory."""

    def __init__(self, path: Path, shown: str | None = None):
        self.path = path
        self.shown = shown or str(path)  # what the user calls it
        self.spec = path / "spec.yaml"
        self.journal = path / "study.journal"
        self.trials = path / "trials.csv"
        self.tensorboard = path / "tensorboard"
        self.ray = path / "ray"
        self.extractors = path / "extractors"
        self.checkpoints = path / "checkpoints"
        self.retrain = path / "retrain"
        self.retrain_checkpoint = self.retrain / "checkpoint.pt"
        self.retrained = self.retrain / "model.pt"
        self.export = path / "export"
        self.report = path / "report.html"
        self.summary_file = path / "summary.json"
        self.lock = path / ".lock"

    @property
    def name(self) -> str:
        return Path(self.shown).name

    def name_of(self, path: Path) -> str:
        """What the user calls a file of the run."""
        return f"{self.shown}/{path.relative_to(self.path).as_posix()}"

    def is_foreign(self) -> bool:
        """Whether the path is taken by something that is no run."""
        if self.spec.exists() or not self.path.exists():
            return False
        return not self.path.is_dir() or any(
            path != self.lock and path.suffix != ".tmp" for path in self.path.iterdir()
        )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Be the one process that works on the run. Raises Refused where another does, or no folder can be made.

        The kernel holds the lock and lets go of it however the process ends. What a killed process left half
        written is removed.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.lock.open("a")
        except OSError as error:
            raise Refused(f"{self.path}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Refused(f"{self.shown}: another process is working on this run") from error
            for directory in (self.path, self.extractors, self.checkpoints, self.retrain):
                for left in directory.glob(".*.tmp"):
                    if left.is_file() and not left.name.startswith(f".{self.report.name}"):  # written without the lock
                        left.unlink(missing_ok=True)
            yield

    def checkpoint(self, trial: int) -> Path:
        """The one checkpoint of a trial: where it stands, and its best evaluation."""
        return self.checkpoints / f"{trial:04d}.pt"

    def extractor(self, name: str) -> Path:
        return self.extractors / f"{name}.safetensors"

    def summary(self) -> dict[str, Any]:
        """What is known of the run so far; empty before the first stage ended.

        Raises Refused where the file is damaged.
        """
        try:
            summary = json.loads(self.summary_file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise Refused(f"{self.name_of(self.summary_file)}: not readable as JSON: {error}") from error
        if not isinstance(summary, dict):
            raise Refused(f"{self.name_of(self.summary_file)}: expected a mapping")
        missing = sorted(BEFORE_BEST - summary.keys()) if "best" in summary else []
        if missing:
            raise Refused(f"{self.name_of(self.summary_file)}: damaged at {missing[0]}")
        for key in summary.keys() & SUMMARY.keys():
            misfit = _misfit(summary[key], SUMMARY[key], key)
            if misfit:
                raise Refused(f"{self.name_of(self.summary_file)}: damaged at {misfit}")
        if len({frozenset(entry) for entry in summary.get("promotion", [])}) > 1:
            raise Refused(f"{self.name_of(self.summary_file)}: damaged at promotion")
        return summary

    def update_summary(self, **parts: Any) -> dict[str, Any]:
        """Lay `parts` over the summary; a mapping is merged into the mapping that is there."""
        summary = self.summary()
        for key, value in parts.items():
            old = summary.get(key)
            summary[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        write_atomic(self.summary_file, json.dumps(summary, indent=2, sort_keys=True) + "\n")
        return summary

    def write_trials(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """trials.csv: a row a trial, its columns in order of first appearance."""
        rows = list(rows)
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.trials, text.getvalue())

    def read_trials(self) -> list[dict[str, Any]]:
        """The rows of trials.csv with numbers as numbers and empty cells left out; none before the search began.

        Raises Refused where the file is damaged.
        """
        if not self.trials.exists():
            return []
        try:
            header, *lines = list(csv.reader(io.StringIO(self.trials.read_text()), strict=True)) or [[]]
            return [_row(number, dict(zip(header, line, strict=True))) for number, line in enumerate(lines)]
        except (OSError, ValueError, csv.Error) as error:
            raise Refused(f"{self.name_of(self.trials)}: damaged: {one_line(error)}") from error


def _row(number: int, cells: dict[str, str]) -> dict[str, Any]:
    """A row of trials.csv. Raises ValueError where a cell can't be what its column says."""
    there = {key: value for key, value in cells.items() if value or key == "reason"}
    row = {key: value if key in TEXT_COLUMNS else _number(value) for key, value in there.items()}
    if row.get("trial") != number or row.get("state") not in STATES or "reason" not in row:
        raise ValueError(f"line {number + 2} is not that of trial {number}")
    if "epochs_trained" not in row:
        raise ValueError(f"line {number + 2} has no epochs")
    return row


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _misfit(value: Any, shape: Any, where: str) -> str:
    """The place at which a value is not of its shape; nothing where it is."""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return where
        found = (_misfit(item, shape[0], f"{where}.{index}") for index, item in enumerate(value))
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return where
        missing = [key for key in shape.keys() - {"*"} if key not in value]
        if missing:
            return f"{where}.{min(missing)}"
        others = shape.get("*", object)
        found = (_misfit(item, shape.get(key, others), f"{where}.{key}") for key, item in value.items())
    elif shape is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return "" if number else where
    else:
        return "" if isinstance(value, shape) and not (shape is int and isinstance(value, bool)) else where
    return next((misfit for misfit in found if misfit), "")
