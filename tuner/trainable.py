"""One trial as a Ray Tune Trainable: it turns the training generator's records into results."""

import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import ray
import torch
from ray import ObjectRef, tune
from ray.actor import ActorHandle

from tuner.fusion import evaluate_fused, train_fused
from tuner.scoring import SEARCH_SAMPLES, Evaluator
from tuner.spec import Spec
from tuner.study import BASELINE
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.data import as_floats
from tuner.vae.extractor import from_bytes
from tuner.vae.image_grid import evenly_spaced, image_grids, png
from tuner.vae.losses import Diverged
from tuner.vae.model import Builder, OwnModel
from tuner.vae.parameters import Parameters
from tuner.vae.process import device_of, settle
from tuner.vae.step import State
from tuner.vae.train import Record, train

NO_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory")  # how PyTorch's RuntimeErrors say it


class Content(bytes):
    """A file in a result, short where it is shown: Tune formats every result twice for logs that nobody keeps, which
    takes the driver a fifth of a second for a checkpoint's plain bytes."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


@dataclass(frozen=True)
class Shared:
    """What the trials of a search share: handles and references, small wherever they are sent."""

    spec: Spec
    files: ActorHandle  # of FileServer
    data: ObjectRef  # to Data
    arrays: tuple[ActorHandle, ...] = ()  # where trials are fused; without any, each trains in its own process
    arrays_score: bool = False
    own: OwnModel | None = None  # the code of a user's own model
    errors: str = "errors"  # where in the run tracebacks lie


class TrialTrainable(tune.Trainable):
    """Trains to the next rung at each step and gives its scores, sample pictures and a checkpoint as the result.

    Actors are reused: data, extractor and scorer are set up once, `reset_config` starts the next trial. A trial
    that has a checkpoint goes on from it and first repeats the checkpoint's evaluation, so that a result that was
    lost on its way is not missing. What goes wrong in a trial is its outcome, with the reason; Ray sees an error
    only where the process itself dies.
    """

    def setup(self, config: dict[str, Any], shared: Shared) -> None:
        settle()
        self.shared, self.spec = shared, shared.spec
        self.data = ray.get(shared.data).to(device_of(ray.get_gpu_ids()))
        self.reset_config(config)

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.spec, self.data, lambda: from_bytes(ray.get(self.extractor)))

    @cached_property
    def extractor(self) -> ObjectRef:
        """To the file of the one that the search scores with, waited for: at first it may still be in training."""
        while ray.get(found := self.shared.files.extractor.remote()) is None:
            time.sleep(0.1)
        return found

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.number = new_config["trial"]
        self.parameters = Parameters.model_validate(new_config["parameters"])
        self.checkpoint: Checkpoint | None = None
        return True

    def step(self) -> dict[str, Any]:
        try:
            if self.checkpoint is None:
                self.checkpoint = self._begin()
                self.records = self._train(self.checkpoint.state)
                if self.checkpoint.evaluation:
                    return dict(self.checkpoint.evaluation)
            return self._evaluate(self.checkpoint)
        except Diverged as error:
            return self._failed("diverged", str(error))
        except ray.exceptions.RayError:
            raise  # a node or an actor was lost: Tune takes the trial up again
        except (MemoryError, torch.OutOfMemoryError) as error:
            return self._failed("out of memory", _first_line(error))
        except Exception as error:  # whatever a model, PyTorch or a library under it raises fails this trial alone
            if any(words in str(error) for words in NO_MEMORY):
                return self._failed("out of memory", _first_line(error))
            named = f"{self.shared.errors}/{self.number:04d}.txt"
            reason = f"{type(error).__name__}: {_first_line(error)} (traceback in {named})"
            return self._failed("error", reason) | {"traceback": traceback.format_exc()}

    def _begin(self) -> Checkpoint:
        """The trial's checkpoint where it has a good one, else its start."""
        content = ray.get(self.shared.files.checkpoint.remote(self.number))
        if content is not None:
            try:
                saved = Checkpoint.from_bytes(content, self.shared.own)
            except ValueError:  # damaged: training again gives the same numbers
                saved = None
            if saved and saved.parameters == self.parameters:
                return saved
        build = Builder(self.data.shape, self.shared.own)
        return Checkpoint(self.parameters, State.fresh(build, self.parameters, self.spec.seed, self.number))

    def _train(self, state: State) -> Iterator[Record]:
        images, spec = self.data.train.images, self.spec
        if self.shared.arrays:
            return train_fused(self._host, len(images), state, self.parameters, spec, self.number)
        return train(
            state,
            self.parameters,
            images,
            spec.budget.rungs,
            seed=spec.seed,
            trial=self.number,
            total_epochs=spec.budget.max_epochs,
        )

    @property
    def _host(self) -> ActorHandle:
        return self.shared.arrays[self.number % len(self.shared.arrays)]

    def _evaluate(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Train to the next rung and score -> the result."""
        record = next(self.records)
        started = time.perf_counter()
        evaluate = partial(evaluate_fused, self._host, self.extractor) if self.shared.arrays_score else self.evaluator
        fitted = evaluate(checkpoint.state.model, self.parameters, record.epoch)
        fitted = replace(fitted, scores=fitted.scores | {"loss": record.loss})
        rungs = self.spec.budget.rungs
        last = record.epoch == rungs[-1]
        evaluation: dict[str, Any] = fitted.scores | {
            "trial": self.number,
            "rung": rungs.index(record.epoch) + 1,
            "epoch": record.epoch,
            "images_per_second": record.images / record.seconds,
            "seconds_train": record.seconds,
            "seconds_score": time.perf_counter() - started,
            "outcome": "complete" if last else "running",
            "done": last,
        }
        shown = as_floats(evenly_spaced(self.data.validation.images[:SEARCH_SAMPLES])).cpu()
        pictures = {name: Content(png(grid)) for name, grid in image_grids(fitted, shown, self.spec.data.ink).items()}
        past_grace = last or record.epoch > self.spec.budget.grace_epochs  # till then latents that sleep often wake up
        # a code of nothing is where a front of rates ends
        exempt = self.number == BASELINE or any(objective.metric == "rate" for objective in self.spec.objective)
        if past_grace and not fitted.scores["active_units"] and not exempt:
            reason = f"no active latent unit at epoch {record.epoch:g}"
            return self._failed("collapsed", reason, evaluation) | {"pictures": pictures}
        checkpoint.evaluation = evaluation
        checkpoint.keep(fitted, self.spec.trial_objective.cost)
        return evaluation | {"checkpoint": Content(checkpoint.to_bytes()), "pictures": pictures}

    def _failed(self, outcome: str, reason: str, evaluation: dict[str, Any] | None = None) -> dict[str, Any]:
        """The last result of a trial that can't go on, with its scores if it has any."""
        scores = evaluation or {objective.metric: float("nan") for objective in self.spec.objective}  # Tune insists
        return scores | {"trial": self.number, "outcome": outcome, "reason": f"{outcome}: {reason}", "done": True}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
