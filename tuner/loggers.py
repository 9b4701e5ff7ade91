"""Trials and the export in experiment trackers that people have, MLflow and Weights & Biases, from the driver alone.

Where they keep what they get, and as whom, is theirs to know: MLFLOW_TRACKING_URI, WANDB_MODE and so on.
"""

import hashlib
import io
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from tuner.run import RunFiles
from tuner.spec import Spec
from tuner.vae.errors import Refused, one_line

PROJECT = "vae-tuner"

Pictures = Mapping[str, Image.Image]


class MLflowTracker:
    """A run of MLflow a trial, in the experiment `vae-tuner`; a trial that goes on is the same run again."""

    def __init__(self, run: RunFiles):
        from mlflow import MlflowClient

        self.client, self.run = MlflowClient(), run.place
        self.ids: dict[str, str] = {}
        known = self.client.get_experiment_by_name(PROJECT)
        self.experiment = known.experiment_id if known else self.client.create_experiment(PROJECT)

    def start(self, name: str, parameters: Mapping[str, Any]) -> None:
        quote = '"' if "'" in self.run else "'"
        ours = f"tags.run = {quote}{self.run}{quote} and tags.trial = '{name}'"
        known = {key: str(value) for key, value in parameters.items()}
        runs = self.client.search_runs([self.experiment], ours)
        found = [run for run in runs if run.data.params.items() <= known.items()]  # another retrain has other finalists
        tags = {"run": self.run, "trial": name}
        run = found[0] if found else self.client.create_run(self.experiment, run_name=name, tags=tags)
        self.ids[name] = run.info.run_id
        for key, value in parameters.items():
            self.client.log_param(run.info.run_id, key, value)

    def scores(self, name: str, scores: Mapping[str, float], pictures: Pictures) -> None:
        from mlflow.entities import Metric

        now, step = int(1000 * time.time()), round(1000 * scores["epoch"])
        self.client.log_batch(self.ids[name], [Metric(key, value, now, step) for key, value in scores.items()])
        for title, picture in pictures.items():
            self.client.log_image(self.ids[name], picture, f"{title}/epoch-{scores['epoch']:g}.png")

    def end(self, name: str, state: str, reason: str) -> None:
        self.client.set_tag(self.ids[name], "outcome", f"{state}: {reason}" if reason else state)
        self.client.set_terminated(self.ids.pop(name), "FAILED" if state == "failed" else "FINISHED")

    def export(self, folder: Path, scores: Mapping[str, float]) -> None:
        self.start("export", {})
        for key, value in scores.items():
            self.client.log_metric(self.ids["export"], key, value)
        self.client.log_artifacts(self.ids["export"], str(folder), "export")
        self.end("export", "complete", "")


class WandbTracker:
    """A run of Weights & Biases a trial, in the project `vae-tuner`, grouped by the run directory; a trial that goes on
    is the same run again."""

    def __init__(self, run: RunFiles):
        import wandb

        self.wandb, self.run = wandb, run
        self.runs: dict[str, Any] = {}

    def start(self, name: str, parameters: Mapping[str, Any]) -> None:
        if name in self.runs:
            return
        place = f"{self.run.place}/{name}"
        self.runs[name] = self.wandb.init(
            project=PROJECT,
            group=self.run.name,
            name=name,
            id=hashlib.sha256(place.encode()).hexdigest()[:16],
            resume="allow",
            config=dict(parameters),
            dir=str(self.run.path),
            reinit="create_new",
            settings=self.wandb.Settings(silent=True, console="off"),
        )

    def scores(self, name: str, scores: Mapping[str, float], pictures: Pictures) -> None:
        shown = {title: self.wandb.Image(picture) for title, picture in pictures.items()}
        self.runs[name].log({**scores, **shown})

    def end(self, name: str, state: str, reason: str) -> None:
        run = self.runs.pop(name)
        run.summary.update({"outcome": state, "reason": reason})
        run.finish(exit_code=int(state == "failed"))

    def export(self, folder: Path, scores: Mapping[str, float]) -> None:
        self.start("export", {})
        artifact = self.wandb.Artifact(re.sub(r"[^\w.-]", "-", f"{self.run.name}-export", flags=re.ASCII), "model")
        artifact.add_dir(str(folder))
        self.runs["export"].log_artifact(artifact)
        self.runs["export"].summary.update(dict(scores))
        self.end("export", "complete", "")


Tracker = MLflowTracker | WandbTracker
TRACKERS: dict[str, type[Tracker]] = {"mlflow": MLflowTracker, "wandb": WandbTracker}


class Trackers:
    """All trackers of a run, told of the trials of one of its stages as TensorBoard is.

    One that fails is told of once and left out: it must not stop a search.
    """

    def __init__(self, run: RunFiles, spec: Spec, stage: str):
        self.stage = stage
        self.left: dict[str, Tracker] = {}
        for name in spec.loggers:
            with self._guarded(name):
                self.left[name] = TRACKERS[name](run)

    def start_trial(self, number: int, parameters: Mapping[str, Any]) -> None:
        self._tell(lambda tracker: tracker.start(self._name(number), parameters))

    def add_trial(self, number: int, evaluation: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
        """Pictures are PNG files."""
        found = numbers(evaluation)
        shown = {name: Image.open(io.BytesIO(png)) for name, png in pictures.items()} if self.left else {}
        self._tell(lambda tracker: tracker.scores(self._name(number), found, shown))

    def end_trial(self, number: int, state: str, reason: str) -> None:
        self._tell(lambda tracker: tracker.end(self._name(number), state, reason))

    def export(self, folder: Path, scores: Mapping[str, Any]) -> None:
        self._tell(lambda tracker: tracker.export(folder, numbers(scores)))

    def _name(self, number: int) -> str:
        return f"{self.stage}-{number:04d}"

    def _tell(self, told: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.left.items()):
            with self._guarded(name):
                told(tracker)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever theirs raise
            self.left.pop(name, None)
            print(f"warning: {name} is told no more: {type(error).__name__}: {one_line(error)}", file=sys.stderr)


def numbers(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """What of an evaluation is a finite number."""
    return {
        name: float(value)
        for name, value in evaluation.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def require_installed(loggers: Sequence[str]) -> None:
    """Raises Refused where one is not."""
    for name in loggers:
        if find_spec(name) is None:
            raise Refused(f"loggers: {name} is not installed: pip install {name}")
