"""The study of a run: its journal opened, and read as one row a trial. Knows nothing of Ray."""

import math
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import LOCK_FILE_SUFFIX
from optuna.trial import FrozenTrial, TrialState

from tuner.run import Refused, one_line
from tuner.spec import Objective, Spec
from tuner.vae.score import METRICS, gap_closed

BASELINE = 0  # the trial of the classic settings
NAME = "search"
NEEDED = ("epoch", "seconds_train", "seconds_score", "frechet_distance", "frechet_distance_standard_normal")
STATES = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


def open_study(journal: Path, spec: Spec) -> optuna.Study:
    """The study of a run, made on first use. To be opened by the process that claimed the run.

    A last line that a kill left unfinished is cut off: what it was to say is said again. Raises Refused where
    the journal is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal.with_name(f"{journal.name}{LOCK_FILE_SUFFIX}").unlink(missing_ok=True)  # a killed process's, not ours
    if journal.exists() and not journal.read_bytes().endswith(b"\n"):
        os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name=NAME,
            directions=[objective.direction for objective in spec.objective],
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),  # never asked: the searcher samples on a copy
        )
        _check(study)
        return study
    except Exception as error:
        raise _damaged(journal, error) from error


def read_study(journal: Path) -> optuna.Study:
    """The study of a run to look at, also while it is being written; leaves the journal alone. Raises Refused."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.load_study(study_name=NAME, storage=JournalStorage(JournalFileBackend(str(journal))))
        _check(study)
        return study
    except Exception as error:
        raise _damaged(journal, error) from error


def _check(study: optuna.Study) -> None:
    """Raises KeyError or TypeError where a trial says less than the searcher wrote."""
    for trial in study.get_trials(deepcopy=False):
        if not isinstance(trial.user_attrs["parameters"], dict):
            raise TypeError(f"trial {trial.number} has no parameters")
        for scores in evaluations(trial):
            for key in (*NEEDED, *(scores.keys() & METRICS.keys())):
                if not isinstance(scores[key], int | float):
                    raise TypeError(f"trial {trial.number} has {key} {scores[key]!r}")


def _damaged(journal: Path, error: Exception) -> Exception:
    """Optuna raises whatever the damage provokes; a disk that can't be written is another matter."""
    if isinstance(error, OSError) and not isinstance(error, IsADirectoryError):
        return error
    return Refused(f"{journal}: not readable as an Optuna journal: {one_line(error)}")


def evaluations(trial: FrozenTrial) -> list[dict[str, float]]:
    """A trial's evaluations in order of their rungs."""
    found = {
        int(key.partition(":")[2]): value for key, value in trial.user_attrs.items() if key.startswith("evaluation:")
    }
    return [found[rung] for rung in sorted(found)]


def front(rows: Sequence[Mapping[str, Any]], objectives: Sequence[Objective]) -> list[Mapping[str, Any]]:
    """The rows that no other row is at least as good as in all objectives, and better in one."""
    points = [[objective.sign * row[objective.metric] for objective in objectives] for row in rows]
    return [
        row
        for row, point in zip(rows, points, strict=True)
        if not any(other != point and all(map(operator.le, other, point)) for other in points)
    ]


def table(study: optuna.Study, spec: Spec, floor: float) -> list[dict[str, Any]]:
    """A row a trial: number, state, reason, searched and fixed parameters, scores of its best evaluation, times.

    `gap_closed` compares with the baseline's last N(0, I) distance and is missing until the baseline ended.
    """
    trial_objective = spec.trial_objective
    trials = study.get_trials(deepcopy=False)
    baseline = math.nan
    if trials and trials[BASELINE].state == TrialState.COMPLETE:
        baseline = evaluations(trials[BASELINE])[-1]["frechet_distance_standard_normal"]
    rows = []
    for trial in trials:
        scored = evaluations(trial)
        best = min(scored, key=lambda scores: trial_objective.sign * scores[trial_objective.metric], default={})
        row: dict[str, Any] = {
            "trial": trial.number,
            "state": STATES[trial.state],
            "reason": trial.user_attrs.get("reason", ""),
            "epoch": best.get("epoch", ""),
            "epochs_trained": scored[-1]["epoch"] if scored else 0,
        }
        row |= trial.user_attrs.get("parameters", {})
        row |= {metric: best[metric] for metric in METRICS if metric in best}
        if best and math.isfinite(baseline):
            row["gap_closed"] = gap_closed(best["frechet_distance"], floor, baseline)
        row["seconds_train"] = round(sum(scores["seconds_train"] for scores in scored), 3)
        row["seconds_score"] = round(sum(scores["seconds_score"] for scores in scored), 3)
        row["started"] = trial.datetime_start.isoformat(timespec="milliseconds") if trial.datetime_start else ""
        row["ended"] = trial.datetime_complete.isoformat(timespec="milliseconds") if trial.datetime_complete else ""
        rows.append(row)
    return rows
