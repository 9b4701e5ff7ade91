"""What the driver does as results come in, one thing a class: it alone writes a run's files.

Tune calls these from its loop. What goes wrong in them ends the command, not a trial.
"""

import math
from collections.abc import Mapping
from typing import Any

from ray import tune

from tuner.cluster import require_ray
from tuner.exits import fatal
from tuner.extractors import FeatureExtractors
from tuner.loggers import Trackers
from tuner.promote import contenders
from tuner.run import RunFiles, write_atomic
from tuner.spec import Spec
from tuner.study import BASELINE, ENDED, SEARCH, Study, table
from tuner.tensorboard import TensorBoard
from tuner.terminal import Progress, finalists_line, search_line
from tuner.vae.image_grid import png


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
    """Keeps `trials.csv` up to date; its rows serve the callbacks after it."""

    def __init__(self, run: RunFiles, spec: Spec, study: Study):
        self.run, self.spec, self.study = run, spec, study
        self.write()

    @fatal
    def on_trial_start(self, **info: Any) -> None:
        self.write()

    def on_trial_left(self, number: int) -> None:
        self.write()

    def write(self) -> None:
        self.rows = table(self.study, self.spec)
        self.run.write_trials(self.rows)


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
    """The same, and removes the checkpoints of trials that are out of it."""

    def __init__(self, run: RunFiles, spec: Spec, table: KeepTable):
        super().__init__(run)
        self.spec, self.table = spec, table
        self.on_trial_left(BASELINE)

    def on_trial_left(self, number: int) -> None:
        """Only the baseline, the promotion's contenders and trials that go on keep theirs."""
        kept = {row["trial"] for row in contenders(self.table.rows, self.spec)} | {BASELINE}
        for row in self.table.rows:
            if row["state"] in ENDED and row["trial"] not in kept:
                self.run.checkpoint(row["trial"]).unlink(missing_ok=True)


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
            name, content = f"samples-epoch-{result['epoch']:g}.png", png(result["pictures"]["samples/fitted_prior"])
            self.study.attach(result["trial"], self.run.artifacts, name, content)


class ShowTrials(SearchCallback):
    """TensorBoard's files, experiment trackers, the line on the terminal; and where Ray has died, the end."""

    def __init__(self, spec: Spec, table: KeepTable, board: TensorBoard, trackers: Trackers, progress: Progress):
        self.spec, self.table, self.board, self.trackers, self.progress = spec, table, board, trackers, progress
        self.searches = board.stage == SEARCH
        self.before = sum(row["state"] in ENDED for row in table.rows)

    @fatal
    def on_trial_start(self, trial: Any, **info: Any) -> None:
        self.start(trial.config["trial"], trial.config["parameters"])

    def start(self, number: int, parameters: Mapping[str, Any]) -> None:
        self.board.start_trial(number, parameters)
        self.trackers.start_trial(number, parameters)

    @fatal
    def on_trial_result(self, result: dict[str, Any], **info: Any) -> None:
        pictures = result.pop("pictures", {})
        if pictures:  # a repeated result has none
            self.board.add_trial(result["trial"], result, pictures)
            self.trackers.add_trial(result["trial"], result, pictures)

    def on_trial_left(self, number: int) -> None:
        row = self.table.rows[number]
        if row["state"] in ENDED:  # else its worker was lost, and it is put back
            if number not in self.board.names:  # its worker never came to start it
                self.start(number, {name: row[name] for name in self.spec.searched(row)})
            self.board.end_trial(number, row["state"], row["reason"])
            self.trackers.end_trial(number, row["state"], row["reason"])

    @fatal
    def on_step_end(self, **info: Any) -> None:
        require_ray()
        self.progress.show(self.line())

    def line(self) -> str:
        if not self.searches:
            return finalists_line(table(self.table.study, self.spec), self.spec)  # few, and none leaves for long
        return search_line(self.table.rows, self.spec, self.progress.seconds, self.before)
