"""What a parameter is searched in: a range of whole or real numbers, or choices."""

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Strict, Tag, model_validator

from tuner.data_spec import Frozen, Whole

Value = bool | int | float | str
Real = Annotated[float, Strict()]
NEAR = 0.05  # of a range


class _Entry(Frozen):
    when: dict[str, Value] = Field({})
    """searched only where other searched parameters have these values; elsewhere the parameter has its fixed or default
    value"""


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
        if step is not None and not math.isclose((high - low) / step, round((high - low) / step), abs_tol=1e-9):
            raise ValueError(f"high {high:g} is not low {low:g} plus whole steps of {step:g}")
        return self

    def ends(self) -> list[Value]:
        return [self.low, self.high]  # type: ignore[attr-defined]

    def contains(self, value: Value) -> bool:
        """Whether a search can propose `value`."""
        low, high, step = self.low, self.high, self.step  # type: ignore[attr-defined]
        if isinstance(value, bool | str) or not low <= value <= high:
            return False
        if isinstance(low, int):
            return bool((value - low) % (step or 1) == 0)
        return step is None or abs((value - low) / step - round((value - low) / step)) < 1e-8

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


class Choices(_Entry):
    """One of a list of values."""

    choices: tuple[Value, ...] = Field(min_length=1, description="the values")

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
