"""The study of a run: its journal, which is the one record of the search, opened, and read as one row a trial.

The only module that knows how Optuna keeps things. Knows nothing of Ray, and imports no torch.
"""

import json
import math
import os
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import optuna
import optuna.artifacts
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from tuner.run import write_atomic
from tuner.space import Choices, IntRange
from tuner.spec import Objective, Spec
from tuner.vae.errors import Refused, one_line, refusing
from tuner.vae.metrics import METRICS, gap_closed
from tuner.vae.parameters import Parameters

BASELINE = 0  # the trial of the classic settings
SEARCH, RETRAIN, WARM_START = "search", "retrain", "warm_start"  # the studies in a run's journal
MANY, BEST = 300, 100  # trials: of more than MANY the sampler sees so many, and views show the best hundred
NEEDED = ("epoch", "seconds_train", "seconds_score", "frechet_distance", "frechet_distance_standard_normal")
ENDED = ("complete", "pruned", "failed")
UNFINISHED = "unfinished"  # what a limit cut off: running to Optuna, with the reason
STATES = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class Journal(JournalFileBackend):
    """Optuna's own, but the lines of one event are synced together, and without its lock: who writes has the run's."""

    damage = ""  # that a reader met

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.path, self.in_event = path, False

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode())
            if not self.in_event:
                file.flush()
                os.fsync(file.fileno())

    @contextmanager
    def event(self) -> Iterator[None]:
        """What the body writes is there at once, and synced at its end."""
        self.in_event = True
        try:
            yield
        finally:
            self.in_event = False
            self.append_logs([])


class ReadJournal(Journal):
    """A journal to look at: what comes before a line that is none."""

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        try:
            yield from super().read_logs(log_number_from)
        except ValueError as error:
            self.damage = one_line(error)


class Study(optuna.Study):
    """Optuna's study with what a stage keeps beside its trials."""

    def __init__(self, storage: JournalStorage, name: str, journal: Journal):
        super().__init__(name, storage, sampler=optuna.samplers.RandomSampler())  # never asked: see the searcher
        self.storage, self.journal = storage, journal
        self.identity = storage.get_study_id_from_name(name)

    def delete(self) -> None:
        optuna.delete_study(study_name=self.study_name, storage=self.storage)

    def known(self) -> list[FrozenTrial]:
        """All trials by number, not to be changed. Takes a millisecond for each ten thousand."""
        return self.get_trials(deepcopy=False)

    def at(self, number: int) -> FrozenTrial:
        """One trial, not to be changed. Raises KeyError where there is none."""
        return self.storage.get_trial(self.storage.get_trial_id_from_study_id_trial_number(self.identity, number))

    def foreign(self) -> list[FrozenTrial]:
        """Those of earlier runs that the sampler knows, too."""
        names = optuna.get_all_study_names(self.storage)
        return Study(self.storage, WARM_START, self.journal).known() if WARM_START in names else []

    def trial(self, number: int) -> optuna.trial.Trial:
        """A trial to write to."""
        return optuna.trial.Trial(self, self.storage.get_trial_id_from_study_id_trial_number(self.identity, number))

    def attach(self, number: int, folder: Path, name: str, content: bytes) -> None:
        """Keep a file in `folder` as an artifact of a trial that has not ended, as optuna-dashboard shows them."""
        folder.mkdir(exist_ok=True)
        with TemporaryDirectory() as temporary:
            path = Path(temporary) / name
            path.write_bytes(content)
            store = optuna.artifacts.FileSystemArtifactStore(folder)
            optuna.artifacts.upload_artifact(
                artifact_store=store, file_path=str(path), study_or_trial=self.trial(number)
            )

    @property
    def floor(self) -> float:
        """The Frechet distance of real training images; NaN until an extractor is there to measure it."""
        return float(self.user_attrs.get("floor", math.nan))

    @property
    def baseline(self) -> float:
        """The classic settings' last distance under N(0, I); NaN until that trial ended."""
        if "baseline" in self.user_attrs:  # of a study that has no trial of theirs
            return float(self.user_attrs["baseline"])
        try:
            trial = self.at(BASELINE)
        except KeyError:
            return math.nan
        done = trial.state == TrialState.COMPLETE
        return evaluations(trial)[-1]["frechet_distance_standard_normal"] if done else math.nan


def open_study(journal: Path, spec: Spec, name: str = SEARCH) -> Study:
    """A study of a run, made on first use. To be opened by the process that claimed the run.

    Raises Refused where the journal is damaged, and not by lines that `_mend` can cut off.
    """
    if journal.is_file():
        _mend(journal)
    study = _load(journal, spec, name)
    assert study
    return study


def read_study(journal: Path, name: str = SEARCH) -> Study | None:
    """A study of a run to look at, also while it is being written; None before it began. Raises Refused.

    Of a damaged journal it is what comes before the damage, with a warning: a look mends nothing.
    """
    if not journal.exists() or (journal.is_file() and not journal.stat().st_size):
        return None
    return _load(journal, None, name)


def _mend(journal: Path) -> None:
    """Cut a journal off where it is damaged; a copy of the damaged file is kept beside it.

    A last line that a kill left unfinished is no damage: what it was to say is said again.
    """
    content = journal.read_bytes()
    *lines, unfinished = content.split(b"\n")
    sound = list(takewhile(_is_record, lines))
    lost = len(lines) - len(sound)
    if lost and not sound:
        raise Refused(f"{journal}: not readable as an Optuna journal: its first line is none of one")
    if lost:
        damaged = journal.with_name(f"{journal.name}.damaged")
        write_atomic(damaged, content)
        print(
            f"warning: {journal}: line {len(sound) + 1} of {len(lines)} is damaged: what was written from there on is "
            f"lost; the damaged file is kept as {damaged.name}",
            file=sys.stderr,
        )
    if lost or unfinished:
        os.truncate(journal, sum(len(line) + 1 for line in sound))


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _load(journal: Path, spec: Spec | None, name: str) -> Study | None:
    """None where there is no such study beside the search's yet and none is to be made."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    backend = (Journal if spec else ReadJournal)(journal)
    try:
        storage = JournalStorage(backend)
        if spec:
            directions = [objective.direction for objective in spec.objective]
            optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
        elif name != SEARCH and name not in optuna.get_all_study_names(storage):
            return None
        study = Study(storage, name, backend)
        study.known()
    except Exception as error:  # Optuna raises whatever the damage provokes; a full disk is another matter
        if isinstance(error, OSError) and not isinstance(error, IsADirectoryError):
            raise
        said = backend.damage or one_line(error)
        raise Refused(f"{journal}: not readable as an Optuna journal: {said}") from error
    if backend.damage:
        print(f"warning: {journal}: damaged, read up to there: {backend.damage}", file=sys.stderr)
    with refusing(f"{journal}: not the journal of a search", KeyError, TypeError, ValueError, OverflowError):
        _check(study)
    return study


def _check(study: Study) -> None:
    """Raises KeyError, TypeError, ValueError or OverflowError where a study says less than was written to it."""
    for name in ("floor", "baseline"):
        _require_number(f"the {name}", study.user_attrs.get(name, 0.0))
    for trial in study.known():
        Parameters.model_validate(trial.user_attrs["parameters"])
        scored = evaluations(trial)
        if not isinstance(trial.user_attrs.get("reason", ""), str):
            raise TypeError(f"the reason of trial {trial.number} is no text")
        if trial.state == TrialState.COMPLETE and not scored:
            raise ValueError(f"trial {trial.number} is complete without scores")
        for scores in scored:
            for key in (*NEEDED, *scores):
                _require_number(f"{key} of trial {trial.number}", scores[key])


def _require_number(name: str, value: object) -> None:
    if not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}")
    float(value)  # a whole number may be too large for one


def distributions(spec: Spec) -> dict[str, BaseDistribution]:
    """A spec's space as Optuna's distributions, inclusive at both ends as the YAML is; real numbers are drawn to be put
    on the `nearest` step."""

    def distribution(entry: Any) -> BaseDistribution:
        if isinstance(entry, Choices):
            return CategoricalDistribution(entry.choices)
        if isinstance(entry, IntRange):
            return IntDistribution(entry.low, entry.high, log=entry.log, step=entry.step or 1)
        half = (entry.step or 0) / 2  # steps are ours: Optuna's count in decimals, and may end before high
        return FloatDistribution(entry.low - half, entry.high + half, log=entry.log)

    return {name: distribution(entry) for name, entry in spec.space.items()}


def evaluations(trial: FrozenTrial) -> list[dict[str, float]]:
    """A trial's evaluations in order of their rungs."""
    found = {
        int(key.partition(":")[2]): value for key, value in trial.user_attrs.items() if key.startswith("evaluation:")
    }
    return [found[rung] for rung in sorted(found)]


def front(rows: Sequence[Mapping[str, Any]], objectives: Sequence[Objective]) -> list[Mapping[str, Any]]:
    """The rows that no other row is at least as good as in all objectives, and better in one."""
    costs = np.array([[objective.cost(row) for objective in objectives] for row in rows])
    left = np.arange(len(rows))
    for index in range(len(rows)):
        if index in left:  # what another is better than says nothing that the other doesn't
            here = costs[index]
            left = left[~((costs[left] >= here).all(1) & (costs[left] != here).any(1))]
    return [rows[index] for index in left.tolist()]


def ranked(rows: Sequence[Mapping[str, Any]], spec: Spec) -> list[Mapping[str, Any]]:
    """The rows that have scores and did not fail, best first; of several objectives the front alone."""
    scored = [row for row in rows if spec.trial_objective.metric in row and row["state"] != "failed"]
    if len(spec.objective) > 1:
        scored = front(scored, spec.objective)
    return sorted(scored, key=lambda row: (spec.trial_objective.cost(row), row["trial"]))


def in_view(rows: Sequence[Mapping[str, Any]], spec: Spec) -> list[Mapping[str, Any]]:
    """The rows that a view has room for, by number: all, or of more than 300 the best hundred."""
    return [*rows] if len(rows) <= MANY else sorted(ranked(rows, spec)[:BEST], key=lambda row: int(row["trial"]))


def table(study: Study, spec: Spec) -> list[dict[str, Any]]:
    """A row a trial: number, state, reason, parameters, scores of its best evaluation, gap closed, times.

    What is not known yet is left out. `gap_closed` compares with the baseline's last distance under N(0, I).
    """
    scale = (study.floor, study.baseline)
    return [row_of(trial, spec, *scale) for trial in study.known()]


def row_of(trial: FrozenTrial, spec: Spec, floor: float, baseline: float) -> dict[str, Any]:
    """A trial's row of the table."""
    scored = evaluations(trial)
    best = min(scored, key=spec.trial_objective.cost, default={})
    state, reason = STATES[trial.state], trial.user_attrs.get("reason", "")
    state = UNFINISHED if reason and trial.state == TrialState.RUNNING else state
    row: dict[str, Any] = {"trial": trial.number, "state": state, "reason": reason}
    row |= {"epoch": best["epoch"]} if best else {}
    row["epochs_trained"] = scored[-1]["epoch"] if scored else 0
    row |= trial.user_attrs["parameters"]
    row |= {metric: best[metric] for metric in METRICS if metric in best}
    if best and math.isfinite(floor) and math.isfinite(baseline):
        row["gap_closed"] = gap_closed(best["frechet_distance"], floor, baseline)
    for name in ("seconds_train", "seconds_score"):
        row[name] = round(sum(scores[name] for scores in scored), 3)
    times = {"started": trial.datetime_start, "ended": trial.datetime_complete}
    return row | {name: time.isoformat(timespec="milliseconds") for name, time in times.items() if time}
