"""The one checkpoint format: where a training stands, the best it has been, and what it last reported."""

import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tuner.vae.errors import refusing
from tuner.vae.fitted import FittedModel
from tuner.vae.model import Builder, OwnModel
from tuner.vae.parameters import Parameters
from tuner.vae.shape import ImageShape
from tuner.vae.step import State


@dataclass
class Checkpoint:
    """All that a trial or the retrain goes on from, and all that later stages read of it."""

    parameters: Parameters
    state: State
    best: FittedModel | None = None  # as it was evaluated
    evaluation: dict[str, Any] = field(default_factory=dict)  # the last: scores, epoch, loss, times

    def keep(self, fitted: FittedModel, cost: Callable[[Mapping[str, float]], float]) -> None:
        """Have an evaluation as the best if it is; the earlier wins a tie."""
        if self.best is None or cost(fitted.scores) < cost(self.best.scores):
            self.best = fitted.snapshot()  # which training on no longer moves

    def to_bytes(self) -> bytes:
        """Tensors, numbers and plain containers in PyTorch's format."""
        buffer = io.BytesIO()
        saved = {
            "shape": list(self.state.model.shape),
            "parameters": self.parameters.model_dump(),
            "state": self.state.state_dict(),
            "best": self.best.state_dict() if self.best else None,
            "evaluation": self.evaluation,
        }
        torch.save(saved, buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, own: OwnModel | None = None) -> "Checkpoint":
        """What `to_bytes` wrote; nothing in it is run. Raises ValueError, one line, on anything else.

        `own` is the code that a user's own model was made by.
        """
        with refusing("not PyTorch's format"):
            damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()  # torch takes no notice of checksums
            saved = {} if damaged else torch.load(io.BytesIO(content), weights_only=True)
        if damaged:
            raise ValueError("a checksum differs")
        with refusing("it holds something else"):
            parameters = Parameters.model_validate(saved["parameters"])
            state = State.of(Builder(ImageShape(*saved["shape"]), own)(parameters, seed=0))
            state.load_state_dict(saved["state"])
            best = None if saved["best"] is None else FittedModel.from_state_dict(saved["best"], own)
            if state.step < 0:
                raise ValueError(f"step is {state.step}")
            return cls(parameters, state, best, dict(saved["evaluation"]))
