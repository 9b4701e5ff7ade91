"""What the driver does as results come in, one thing a class: it alone writes a run's files.

Tune calls these from its loop. What goes wrong in them ends the command, not a trial.
"""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ray import tune

from tuner.cluster import require_ray
from tuner.exits import fatal
from tuner.extractors import FeatureExtractors
from tuner.loggers import Trackers
from tuner.promote import promising
from tuner.run import RunFiles, write_atomic
from tuner.spec import Spec
from tuner.study import BASELINE, BEST, ENDED, MANY, SEARCH, Study, evaluations, ranked, row_of, table
from tuner.tensorboard import TAGS, TensorBoard
from tuner.terminal import Progress, finalists_line, search_line
from tuner.vae.metrics import METRICS

WRITE_SECONDS, WRITE_SHARE = 5, 0.02  # between two writings of trials.csv, and what they may take of the time


class SearchCallback(tune.Callback):
    """Base of the callbacks of a search: one method for every way in which a trial leaves its worker."""

    def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
        """Ray pickles callbacks for a restore of its own, which the journal replaces."""
        return tune.Callback, ()

    @fatal
    def on_trial_complete(self, trial: Any, **info: Any) -> None:
        self.on_trial_left(trial.config["trial"])

    on_trial_error = on_trial_complete

    def on_trial_left(self, number: int) -> None:
        """The trial has ended, or lost its worker."""


class KeepTable(SearchCallback):
    """Keeps the rows of the study, which serve the callbacks after it, and at intervals writes `trials.csv`."""

    def __init__(self, run: RunFiles, spec: Spec, study: Study):
        self.run, self.spec, self.study = run, spec, study
        self.scale = (math.nan, math.nan)  # the floor and the baseline, once they are known
        self.write()

    @fatal
    def on_trial_start(self, trial: Any, **info: Any) -> None:
        self.on_trial_left(trial.config["trial"])

    on_trial_result = on_trial_start

    def on_trial_left(self, number: int) -> None:
        """Make the row of one trial anew, and all once it is known what they are compared with."""
        self.changed = True
        if not all(map(math.isfinite, self.scale)):
            self.scale = self.study.floor, self.study.baseline
            if all(map(math.isfinite, self.scale)):
                self.rows = table(self.study, self.spec)
        for place in (*range(len(self.rows), number), number):
            self.rows[place : place + 1] = [row_of(self.study.at(place), self.spec, *self.scale)]

    @fatal
    def on_step_end(self, **info: Any) -> None:
        if self.changed and time.monotonic() >= self.due:
            self._write()

    def write(self) -> None:
        """All anew."""
        self.scale = self.study.floor, self.study.baseline
        self.rows = table(self.study, self.spec)
        self._write()

    def _write(self) -> None:
        started = time.monotonic()
        self.run.write_trials(self.rows)
        self.due = time.monotonic() + max(WRITE_SECONDS, (time.monotonic() - started) / WRITE_SHARE)
        self.changed = False


class KeepCheckpoints(SearchCallback):
    """Writes each checkpoint and traceback that comes in."""

    def __init__(self, run: RunFiles):
        self.run = run

    @fatal
    def on_trial_result(self, result: dict[str, Any], **info: Any) -> None:
        for key, path in (("checkpoint", self.run.checkpoint), ("traceback", self.run.error)):
            content = result.pop(key, None)
            if content is not None:
                write_atomic(path(result["trial"]), content)


class KeepContenders(KeepCheckpoints):
    """The same, but only the baseline, those that may be promoted and trials that go on keep theirs."""

    def __init__(self, run: RunFiles, spec: Spec, table: KeepTable):
        super().__init__(run)
        self.spec, self.table = spec, table
        self.best: list[Mapping[str, Any]] = []
        self.compare(table.rows)

    def compare(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Remove the checkpoints of those among `rows` and the best so far that ended and are out of it."""
        ended = [*self.best, *(row for row in rows if row["state"] in ENDED)]
        self.best = promising(ended, self.spec)
        for number in {row["trial"] for row in ended} - {row["trial"] for row in self.best} - {BASELINE}:
            self.run.checkpoint(number).unlink(missing_ok=True)

    @fatal
    def on_trial_result(self, result: dict[str, Any], **info: Any) -> None:
        if result.get("done") and "checkpoint" in result and not self.is_promising(result):
            del result["checkpoint"]  # it would be removed at once
        super().on_trial_result(result=result)

    def is_promising(self, result: Mapping[str, Any]) -> bool:
        """Whether a trial that ends with this result may be promoted."""
        row, cost = self.table.rows[result["trial"]], self.spec.trial_objective.cost
        if self.spec.trial_objective.metric not in row or cost(result) < cost(row):
            row = row | {metric: result[metric] for metric in METRICS if metric in result}
        row = row | {"state": "complete"}
        return row["trial"] == BASELINE or row in promising([*self.best, row], self.spec)

    def on_trial_left(self, number: int) -> None:
        self.compare([self.table.rows[number]])


class KeepExtractors(SearchCallback):
    """Writes the extractors as the workers have made them; the first tells the floor."""

    def __init__(self, spec: Spec, study: Study, extractors: FeatureExtractors):
        self.spec, self.study, self.extractors = spec, study, extractors
        self.tell_floor()
        self.on_step_end()

    @fatal
    def on_trial_start(self, trial: Any, **info: Any) -> None:
        if 4 * (trial.config["trial"] + 1) >= 3 * self.spec.budget.trials:
            self.extractors.begin_all()  # begun with the last trial, the promotion would wait for them

    @fatal
    def on_step_end(self, **info: Any) -> None:
        if self.extractors.keep_done():
            self.tell_floor()

    def tell_floor(self) -> None:
        """Trials wait for the first; the floor is known as soon as it is, which is before the first result."""
        described = self.extractors.run.summary().extractors.get("search")
        if described and math.isnan(self.study.floor):
            self.study.set_user_attr("floor", described.floor)


class AttachSheets(SearchCallback):
    """Keeps the samples of each evaluation for optuna-dashboard; to come before what takes the pictures."""

    def __init__(self, run: RunFiles, study: Study):
        self.run, self.study = run, study

    @fatal
    def on_trial_result(self, result: dict[str, Any], **info: Any) -> None:
        if result.get("pictures"):
            name, sheet = f"samples-epoch-{result['epoch']:g}.png", result["pictures"]["samples/fitted_prior"]
            self.study.attach(result["trial"], self.run.artifacts, name, sheet)


class ShowBest(SearchCallback):
    """Of a search of many trials lets through only the pictures of the best hundred so far and of the baseline, and has
    TensorBoard forget trials that are no longer among them; to come before what takes the pictures."""

    def __init__(self, spec: Spec, table: KeepTable, board: TensorBoard):
        self.cost, self.board = spec.trial_objective.cost, board
        self.costs = {row["trial"]: self.cost(row) for row in ranked(table.rows, spec)[:BEST]}
        self.board.keep(self.costs.keys() | {BASELINE})

    @fatal
    def on_trial_result(self, result: dict[str, Any], **info: Any) -> None:
        number = result["trial"]
        if number == BASELINE or not result.get("pictures"):
            return
        self.costs[number] = min(self.cost(result), self.costs.get(number, math.inf))
        if len(self.costs) > BEST:
            worst = max(self.costs, key=self.costs.__getitem__)
            del self.costs[worst]
            self.board.keep(self.costs.keys() | {BASELINE})
            if worst == number:
                result["pictures"] = {}


class ShowTrials(SearchCallback):
    """TensorBoard's files, experiment trackers, the line on the terminal; and where Ray has died, the end."""

    def __init__(self, spec: Spec, table: KeepTable, board: TensorBoard, trackers: Trackers, progress: Progress):
        self.spec, self.table, self.board, self.trackers, self.progress = spec, table, board, trackers, progress
        self.searches = board.stage == SEARCH
        self.before = sum(row["state"] in ENDED for row in table.rows)
        self.started: set[int] = set()

    @fatal
    def on_trial_start(self, trial: Any, **info: Any) -> None:
        self.start(trial.config["trial"], trial.config["parameters"])

    def start(self, number: int, parameters: Mapping[str, Any]) -> None:
        self.started.add(number)
        if self.spec.budget.trials <= MANY:  # else once it is among the best
            self.board.start_trial(number, parameters)
        self.trackers.start_trial(number, parameters)

    @fatal
    def on_trial_result(self, trial: Any, result: dict[str, Any], **info: Any) -> None:
        number, pictures = result["trial"], result.pop("pictures", None)
        if pictures is None:  # a repeated result
            return
        self.trackers.add_trial(number, {key: result[key] for key in ("epoch", *TAGS) if key in result}, pictures)
        if not pictures:  # not among the best
            return
        if not self.board.shows(number):
            self.board.start_trial(number, trial.config["parameters"])
            for earlier in evaluations(self.table.study.at(number)):
                if earlier["epoch"] < result["epoch"]:
                    self.board.add_trial(number, earlier, {})
        self.board.add_trial(number, result, pictures)

    def on_trial_left(self, number: int) -> None:
        row = self.table.rows[number]
        if row["state"] in ENDED:  # else its worker was lost, and it is put back
            if number not in self.started:  # its worker never came to start it
                self.start(number, {name: row[name] for name in self.spec.searched(row)})
            if self.board.shows(number):
                self.board.end_trial(number, row["state"], row["reason"])
            self.trackers.end_trial(number, row["state"], row["reason"])

    @fatal
    def on_step_end(self, **info: Any) -> None:
        require_ray()
        if self.progress.due:
            self.progress.show(self.line())

    def line(self) -> str:
        if not self.searches:
            return finalists_line(self.table.rows, self.spec)
        return search_line(self.table.rows, self.spec, self.progress.seconds, self.before)


def search_callbacks(
    table: KeepTable, extractors: FeatureExtractors, board: TensorBoard, shown: ShowTrials
) -> list[SearchCallback]:
    """What listens to a search: rows before who reads them, who lets pictures through before who takes them."""
    run, spec, study = table.run, table.spec, table.study
    best = [ShowBest(spec, table, board)] if spec.budget.trials > MANY else []
    kept = [KeepContenders(run, spec, table), KeepExtractors(spec, study, extractors)]
    return [table, *kept, *best, AttachSheets(run, study), shown]
