"""One trial as a Ray Tune Trainable: it turns the training generator's records into reports."""

import io
import time
from typing import Any

import torch
from ray import tune

from tuner.run import Run
from tuner.spec import Spec
from tuner.vae.data import Data
from tuner.vae.judge import Judge
from tuner.vae.parameters import Parameters
from tuner.vae.prior import Prior
from tuner.vae.score import Scorer
from tuner.vae.sheet import sheets
from tuner.vae.train import Diverged, State, train
from tuner.workspace import Candidate

SEARCH_SAMPLES = 2_500  # of each kind per score: keeps scoring below 15 % of training on MNIST
SEARCH_PRIOR_IMAGES = 5_000
SHEET_IMAGES = 32


def search_scorer(spec: Spec, data: Data, judge: Judge) -> Scorer:
    """The scorer that all trials of a search face, with the same noise."""
    return Scorer(
        judge,
        data.train,
        data.validation,
        seed=spec.seed,
        count=SEARCH_SAMPLES,
        prior_count=SEARCH_PRIOR_IMAGES,
    )


class TrialTrainable(tune.Trainable):
    """Trains to the next rung at each step and reports its scores, a sample sheet and a checkpoint.

    Actors are reused: data, judge and scorer are set up once, `reset_config` starts the next trial. A trial
    whose checkpoint is there goes on from it and first repeats the checkpoint's report, so that a report
    that was lost on its way is not missing.
    """

    def setup(self, config: dict[str, Any], spec: Spec, run: Run, data: Data, judge: Judge) -> None:
        torch.set_num_threads(1)  # Ray's workers are processes of their own
        self.spec, self.run, self.images = spec, run, data.train.images
        self.scorer = search_scorer(spec, data, judge)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.number = new_config["trial"]
        self.parameters = Parameters.model_validate(new_config["parameters"])
        self.state = State.fresh(self.parameters, self.spec.seed, self.number)
        self.best: dict[str, Any] | None = None
        self.repeat: dict[str, Any] | None = None
        path = self.run.checkpoint(self.number)
        if path.exists():
            saved = torch.load(path, weights_only=True)
            self.state.load_state_dict(saved["last"])
            self.best, self.repeat = saved["best"], saved["report"]
        self.records = train(
            self.state,
            self.parameters,
            self.images,
            self.spec.budget.rungs,
            seed=self.spec.seed,
            trial=self.number,
            total_epochs=self.spec.budget.max_epochs,
        )
        return True

    def step(self) -> dict[str, Any]:
        if self.repeat is not None:
            repeated, self.repeat = self.repeat, None
            return repeated
        try:
            record = next(self.records)
            started = time.perf_counter()
            prior = self.scorer.fit_prior(self.state.model, self.parameters)
            scores = self.scorer(self.state.model, self.parameters, prior)
        except Diverged as error:
            missing = {objective.metric: float("nan") for objective in self.spec.objective}
            return missing | {"outcome": "diverged", "reason": f"diverged: {error}", "done": True}
        rungs = self.spec.budget.rungs
        last = record.epoch == rungs[-1]
        report: dict[str, Any] = scores | {
            "trial": self.number,
            "rung": rungs.index(record.epoch) + 1,
            "epoch": record.epoch,
            "loss": record.loss,
            "images_per_second": record.images / record.seconds,
            "seconds_train": record.seconds,
            "seconds_score": time.perf_counter() - started,
            "outcome": "complete" if last else "running",
            "done": last,
        }
        self._keep_best(report, prior)
        buffer = io.BytesIO()
        torch.save({"last": self.state.state_dict(), "best": self.best, "report": report}, buffer)
        pictures = sheets(self.state.model, prior, self.scorer.images[:SHEET_IMAGES])
        return report | {"checkpoint": buffer.getvalue(), "sheets": pictures}

    def _keep_best(self, report: dict[str, Any], prior: Prior) -> None:
        objective = self.spec.objective[0]
        value = objective.sign * report[objective.metric]
        if self.best is None or value < self.best["value"]:
            candidate = Candidate(self.state.model, self.parameters, prior, report["epoch"])
            self.best = candidate.state_dict() | {"value": value}
