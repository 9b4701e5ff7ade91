"""One trial as a Ray Tune Trainable: it turns the training generator's records into reports."""

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray
import torch
from ray import ObjectRef, tune
from ray.actor import ActorHandle

from tuner.fusion import train_fused
from tuner.run import RunFiles
from tuner.spec import Spec
from tuner.study import BASELINE
from tuner.vae.data import Data
from tuner.vae.extractor import FeatureExtractor
from tuner.vae.image_grid import image_grids
from tuner.vae.parameters import Parameters
from tuner.vae.prior import Prior
from tuner.vae.process import settle
from tuner.vae.score import Scorer
from tuner.vae.train import Diverged, Record, State, train
from tuner.workspace import FittedModel, load_extractors, load_tensors

SEARCH_SAMPLES = 2_500  # of each kind per score: keeps scoring below 15 % of training on MNIST
SEARCH_PRIOR_IMAGES = 10_000
GRID_IMAGES = 32
NO_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory")  # how PyTorch's RuntimeErrors say it


def search_scorer(spec: Spec, data: Data, extractor: FeatureExtractor) -> Scorer:
    """The scorer that all trials of a search face, with the same noise."""
    return Scorer(
        extractor,
        data.train,
        data.validation,
        seed=spec.seed,
        count=SEARCH_SAMPLES,
        prior_count=SEARCH_PRIOR_IMAGES,
        quasi_random=True,
    )


class Files:
    """Hands a run's files to workers, which may not see the run directory: an actor beside the driver."""

    def __init__(self, run: RunFiles):
        self.run = run

    def checkpoint(self, trial: int) -> bytes | None:
        """A trial's checkpoint, None where it has none."""
        path = self.run.checkpoint(trial)
        return path.read_bytes() if path.exists() else None

    def extractor(self) -> FeatureExtractor | None:
        """The extractor that the search scores with, None before it is trained."""
        return load_extractors(self.run).get("search")


@dataclass(frozen=True)
class Shared:
    """What the trials of a search share: handles and references, small wherever they are sent."""

    spec: Spec
    files: ActorHandle  # of Files
    data: ObjectRef  # to Data
    arrays: tuple[ActorHandle, ...] = ()  # where trials are fused; without any, each trains in its own process


class TrialTrainable(tune.Trainable):
    """Trains to the next rung at each step and reports its scores, a sample sheet and a checkpoint.

    Actors are reused: data, extractor and scorer are set up once, `reset_config` starts the next trial. A trial
    that has a checkpoint goes on from it and first repeats the checkpoint's report, so that a report that was
    lost on its way is not missing. What goes wrong in a trial is reported as its outcome, with the reason; Ray
    sees an error only where the process itself dies.
    """

    def setup(self, config: dict[str, Any], shared: Shared) -> None:
        settle()
        self.shared, self.spec, self.data = shared, shared.spec, ray.get(shared.data)
        self.reset_config(config)

    @cached_property
    def scorer(self) -> Scorer:
        """Made at the first rung: until then the extractor may still be in training."""
        while (extractor := ray.get(self.shared.files.extractor.remote())) is None:
            time.sleep(0.1)
        return search_scorer(self.spec, self.data, extractor)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.number = new_config["trial"]
        self.parameters = Parameters.model_validate(new_config["parameters"])
        self.started = False
        return True

    def step(self) -> dict[str, Any]:
        try:
            if not self.started:
                self.started = True
                repeated = self._start()
                if repeated is not None:
                    return repeated
            return self._evaluate()
        except Diverged as error:
            return self._failed("diverged", str(error))
        except ray.exceptions.RayError:
            raise  # a node or an actor was lost: Tune takes the trial up again
        except (MemoryError, torch.OutOfMemoryError) as error:
            return self._failed("out of memory", _first_line(error))
        except Exception as error:
            if any(words in str(error) for words in NO_MEMORY):
                return self._failed("out of memory", _first_line(error))
            return self._failed("error", f"{type(error).__name__}: {_first_line(error)}")

    def _start(self) -> dict[str, Any] | None:
        """Begin the trial, at its checkpoint where it has one -> the checkpoint's report."""
        self.state = State.fresh(self.parameters, self.spec.seed, self.number)
        self.best: dict[str, Any] | None = None
        report = None
        content = ray.get(self.shared.files.checkpoint.remote(self.number))
        if content is not None:
            try:
                saved = load_tensors(content)
                if saved["best"]["parameters"] == self.parameters.model_dump():
                    self.state.load_state_dict(saved["last"])
                    self.best, report = saved["best"], saved["report"]
            except Exception:  # torch raises whatever the damage provokes; training again gives the same numbers
                self.state = State.fresh(self.parameters, self.spec.seed, self.number)
        self.records = self._records()
        return report

    def _records(self) -> Iterator[Record]:
        arrays, images, spec = self.shared.arrays, self.data.train.images, self.spec
        if arrays:
            host = arrays[self.number % len(arrays)]
            return train_fused(host, len(images), self.state, self.parameters, spec, self.number)
        device = "cuda" if spec.resources.gpu and torch.cuda.is_available() else "cpu"
        return train(
            self.state,
            self.parameters,
            images.to(device),
            spec.budget.rungs,
            seed=spec.seed,
            trial=self.number,
            total_epochs=spec.budget.max_epochs,
        )

    def _evaluate(self) -> dict[str, Any]:
        record = next(self.records)
        started = time.perf_counter()
        prior = self.scorer.fit(self.state.model, self.parameters)
        scores = self.scorer(self.state.model, self.parameters, prior)
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
        pictures = image_grids(self.state.model, prior, self.scorer.images[:GRID_IMAGES])
        past_grace = last or record.epoch > self.spec.budget.grace_epochs  # till then latents that sleep often wake up
        if past_grace and not scores["active_units"] and self.number != BASELINE:
            reason = f"no active latent unit at epoch {record.epoch:g}"
            return self._failed("collapsed", reason, report) | {"image_grids": pictures}
        self._keep_best(report, prior)
        buffer = io.BytesIO()
        torch.save({"last": self.state.state_dict(), "best": self.best, "report": report}, buffer)
        return report | {"checkpoint": buffer.getvalue(), "image_grids": pictures}

    def _failed(self, outcome: str, reason: str, report: dict[str, Any] | None = None) -> dict[str, Any]:
        """The last report of a trial that can't go on, with its scores if it has any."""
        scores = report or {objective.metric: float("nan") for objective in self.spec.objective}  # Tune insists
        return scores | {"trial": self.number, "outcome": outcome, "reason": f"{outcome}: {reason}", "done": True}

    def _keep_best(self, report: dict[str, Any], prior: Prior) -> None:
        trial_objective = self.spec.trial_objective
        value = trial_objective.sign * report[trial_objective.metric]
        if self.best is None or value < self.best["value"]:
            candidate = FittedModel(self.state.model, self.parameters, prior, report["epoch"])
            self.best = candidate.state_dict() | {"value": value}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
