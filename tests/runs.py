"""What tests of whole runs read of them, and the command as a process of its own."""

import csv
import json
import shutil
import sys
from pathlib import Path

from optuna.trial import FrozenTrial

from tuner.run import RunFiles, write_atomic
from tuner.study import RETRAIN, SEARCH, evaluations, read_study


def rows_of(run: RunFiles) -> list[dict[str, str]]:
    """The rows of trials.csv as text."""
    with run.trials.open(newline="") as file:
        return list(csv.DictReader(file))


def trials_of(run: RunFiles, name: str = SEARCH) -> list[FrozenTrial]:
    study = read_study(run.journal, name)
    assert study
    return study.known()


def in_the_midst_of_the_retrain(run: RunFiles) -> bool:
    """Whether a finalist has been evaluated."""
    study = read_study(run.journal, RETRAIN)
    return study is not None and any(evaluations(trial) for trial in study.known())


def command(path: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "tuner.search", "--run", str(path), *flags]


def without_retrain(run: RunFiles) -> RunFiles:
    """A finished run as the promotion left it."""
    lines, summary = run.journal.read_bytes().splitlines(keepends=True), run.summary()
    begun = next(number for number, line in enumerate(lines) if json.loads(line).get("study_name") == RETRAIN)
    write_atomic(run.journal, b"".join(lines[:begun]))
    for left in (run.retrain, run.export, *run.tensorboard.glob(f"{RETRAIN}-*")):
        shutil.rmtree(left)
    run.report.unlink()
    assert summary.validation
    later = {
        "retrain": None,
        "test": None,
        "validation": summary.validation.model_copy(update={"refitted": None, "retrained": None}),
        "seconds": {stage: summary.seconds[stage] for stage in ("search", "extractor", "promote")},
    }
    write_atomic(run.summary_file, summary.model_copy(update=later).model_dump_json())
    return run
