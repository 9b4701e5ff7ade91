"""The part of a spec that says how much is searched, and at which epochs trials are scored."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tuner.data_spec import Frozen, Whole
from tuner.space import Real

FIRST_LOOK = 3  # epochs of grace from which on a trial is scored before them


def parse_seconds(value: Any) -> Any:
    """'90s', '30m', '1.5h' or a plain number of seconds -> seconds. Raises ValueError on anything else."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", value)
    if not match:
        raise ValueError(f"{value!r} is not a time such as 90s, 30m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


Seconds = Annotated[Real, BeforeValidator(parse_seconds), Field(gt=0, json_schema_extra={"type": ["number", "string"]})]


class Plateau(Frozen):
    """When a search has stopped improving."""

    trials: Whole = Field(ge=1, description="the search ends when so many ended trials in a row brought too little")
    min_improvement: Real = Field(0.01, ge=0, lt=1)
    """what counts as too little: an improvement by less than this share of the best objective before them"""


class Budget(Frozen):
    """How much is searched, and when weak trials are stopped."""

    trials: Whole = Field(24, ge=1, description="trials in all, the baseline among them")
    max_epochs: Real = Field(9, gt=0, description="epochs of a trial that is not stopped; a fraction is allowed")
    grace_epochs: Real = Field(1, gt=0)
    """the first rung at which trials are stopped; a fraction is allowed, max_epochs at most"""
    reduction_factor: Real = Field(3, ge=1.2)
    """one trial in this many goes on at each rung; each rung is this many times the one before"""
    time_limit: Seconds | None = None
    """ends the search after so long: a number of seconds, or 90s, 30m, 1.5h; without, never"""
    plateau: Plateau | None = Field(None, description="ends the search where it has stopped improving; without, never")

    @property
    def rungs(self) -> tuple[float, ...]:
        """Epochs at which a trial is scored: grace * factor^k below max_epochs (by 5 % at least), then max_epochs.

        And after the first epoch, where grace is three or more: a first look, at which nobody is stopped.
        """
        power = 0
        rungs = [1.0] if self.grace_epochs >= FIRST_LOOK else []
        while (epoch := self.grace_epochs * self.reduction_factor**power) < 0.95 * self.max_epochs:
            rungs.append(epoch)
            power += 1
        return (*rungs, self.max_epochs)


class EvenBudget(Budget):
    """Every trial goes to the end, and is scored ten times on the way."""

    @property
    def rungs(self) -> tuple[float, ...]:
        """Whole epochs, as far apart as ten let them be."""
        return tuple(sorted({float(max(1, round(self.max_epochs * tenth / 10))) for tenth in range(1, 11)}))
