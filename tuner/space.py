"""What a parameter is searched in: a range of whole or real numbers, or choices."""

import math
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Strict, Tag, field_validator, model_validator

from tuner.data_spec import Frozen, Whole
from tuner.vae.errors import refusing

Value = bool | int | float | str
Real = Annotated[float, Strict()]
NEAR = 0.05  # of a range
ROUNDING = 1e-8  # of a step


class _Entry(Frozen):
    when: dict[str, Value] = Field({})
    """searched only where other searched parameters have these values; elsewhere the parameter has its fixed or default
    value"""

    def nearest(self, value: Value) -> Value:
        """What a search proposes where the sampler has drawn `value`."""
        return value


class _Range(_Entry):
    """Numbers from low to high, both included, `step` apart where there is one."""

    log: bool = Field(False, description="sample evenly on a logarithmic scale; needs low above 0, excludes step")

    @model_validator(mode="after")
    def _check(self) -> "_Range":
        low, high, step = self.low, self.high, self.step  # type: ignore[attr-defined]
        if low > high:
            raise ValueError(f"low {low:g} is above high {high:g}")
        if self.log and low <= 0:
            raise ValueError(f"log needs low above 0, not {low:g}")
        if self.log and step is not None:
            raise ValueError("log and step exclude each other")
        steps = (high - low) / (step or 1)
        if step and not (math.isfinite(steps) and math.isclose(steps, round(steps), abs_tol=1e-9)):
            raise ValueError(f"high {high:g} is not low {low:g} plus whole steps of {step:g}")
        return self

    def ends(self) -> list[Value]:
        return [self.low, self.high]  # type: ignore[attr-defined]

    def contains(self, value: Value) -> bool:
        """Whether a search can propose `value`."""
        low, high, step = self.low, self.high, self.step  # type: ignore[attr-defined]
        slack = 0 if isinstance(low, int) else ROUNDING * (step or 0)
        if isinstance(value, bool | str) or not low - slack <= value <= high + slack:
            return False
        if isinstance(low, int):
            return bool((value - low) % (step or 1) == 0)
        return abs(value - float(self.nearest(value))) <= slack

    def end_near(self, value: float) -> str | None:
        """'low' or 'high' where a value is within a twentieth of the range from there, on the range's own scale."""
        low, high = self.ends()
        scale = math.log if self.log else float
        if low == high:
            return None
        if self.log and value <= 0:  # the baseline's, which need not lie inside
            return "low"
        at = (scale(value) - scale(low)) / (scale(high) - scale(low))  # type: ignore[arg-type]
        return "low" if at < NEAR else "high" if at > 1 - NEAR else None


class IntRange(_Range):
    """Whole numbers from low to high, both included."""

    type: Literal["int"] = Field(description="whole numbers")
    # beyond 2^53 a float no longer holds every whole number
    low: Whole = Field(ge=-(2**53), le=2**53, description="the least value, included")
    high: Whole = Field(ge=-(2**53), le=2**53)
    """the greatest value, included; with a step, low plus whole steps"""
    step: Whole | None = Field(None, ge=1, le=2**53, description="the distance between two values; without, 1")


class FloatRange(_Range):
    """Real numbers from low to high, both included."""

    type: Literal["float"] = Field(description="real numbers")
    low: Real = Field(description="the least value, included")
    high: Real = Field(description="the greatest value, included; with a step, low plus whole steps")
    step: Real | None = Field(None, gt=0, description="the distance between two values; without, any value in between")

    def nearest(self, value: Value) -> Value:
        """The nearest whole step as it would be written; the last is high, which steps of 0.3333 miss by rounding."""
        if self.step is None:
            return value
        at, last = (round((number - self.low) / self.step) for number in (float(value), self.high))
        return float(Decimal(str(self.low)) + at * Decimal(str(self.step))) if at < last else self.high


class Choices(_Entry):
    """One of a list of values."""

    choices: tuple[Value, ...] = Field(min_length=1, description="the values, all different and of one kind")

    @field_validator("choices")
    @classmethod
    def _of_one_kind(cls, choices: tuple[Value, ...]) -> tuple[Value, ...]:
        """Among whole and real numbers all are real. Raises ValueError."""
        kinds = {type(value) for value in choices}
        if kinds == {int, float}:
            with refusing("choices", OverflowError):
                choices = tuple(map(float, choices))
        elif len(kinds) > 1:
            raise ValueError("numbers, texts, and true and false don't mix")
        for index, value in enumerate(choices):
            if value in choices[:index]:
                raise ValueError(f"{value!r} is there twice")
        return choices

    def ends(self) -> list[Value]:
        return list(self.choices)

    def contains(self, value: Value) -> bool:
        """Whether a search can propose `value`."""
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.choices)


def _entry_kind(entry: Any) -> str:
    if not isinstance(entry, dict):
        return str(getattr(entry, "type", "choices"))
    return "choices" if "choices" in entry else str(entry.get("type"))


Entry = Annotated[
    Annotated[IntRange, Tag("int")] | Annotated[FloatRange, Tag("float")] | Annotated[Choices, Tag("choices")],
    Discriminator(
        _entry_kind,
        custom_error_type="space_entry",
        custom_error_message="give type: int or float with low and high, or choices: [...]",
    ),
]
