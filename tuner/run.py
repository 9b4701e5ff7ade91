"""The run directory: every path in it, atomic writes, the summary."""

import csv
import io
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


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
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Run:
    """The files of one search. Nothing else in the package spells a path inside a run directory."""

    def __init__(self, path: Path):
        self.path = path
        self.spec = path / "spec.yaml"
        self.journal = path / "study.journal"
        self.trials = path / "trials.csv"
        self.tensorboard = path / "tensorboard"
        self.ray = path / "ray"
        self.judges = path / "judge"
        self.checkpoints = path / "checkpoints"
        self.retrain = path / "retrain"
        self.retrain_checkpoint = self.retrain / "checkpoint.pt"
        self.retrained = self.retrain / "model.pt"
        self.export = path / "export"
        self.report = path / "report.html"
        self.summary_file = path / "summary.json"

    def checkpoint(self, trial: int) -> Path:
        """The one checkpoint of a trial: where it stands, and its best evaluation."""
        return self.checkpoints / f"{trial:04d}.pt"

    def judge(self, name: str) -> Path:
        return self.judges / f"{name}.safetensors"

    def summary(self) -> dict[str, Any]:
        """What is known of the run so far; empty before the first stage ended.

        Raises ValueError where the file is damaged.
        """
        try:
            summary = json.loads(self.summary_file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.summary_file}: not readable as JSON: {error}") from error
        if not isinstance(summary, dict):
            raise ValueError(f"{self.summary_file}: expected a mapping")
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
        """The rows of trials.csv with numbers as numbers and empty cells left out; none before the search began."""
        if not self.trials.exists():
            return []
        with self.trials.open(newline="") as file:
            return [
                {key: _number(value) for key, value in row.items() if value or key == "reason"}
                for row in csv.DictReader(file)
            ]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
