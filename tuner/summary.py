"""What `summary.json` of a run holds: each part is there once the stage that writes it is done."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from tuner.vae.parameters import Parameters


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# What no trial can have is damage.
TrialParameters = Annotated[dict[str, Any], AfterValidator(lambda found: Parameters.model_validate(found).model_dump())]


class ExtractorInfo(_Part):
    """A frozen feature extractor: its kind, its file's hash, and how often a classifier is right on validation."""

    kind: Literal["classifier", "untrained", "wavelets", "program"]
    sha256: str
    accuracy: float | None = None

    @property
    def words(self) -> str:
        """What it is: for people."""
        if self.accuracy is not None:
            return f"a classifier, {self.accuracy:.1%} right"
        return {"untrained": "untrained networks", "wavelets": "wavelet packets"}.get(self.kind, f"a {self.kind}")


class Scores(_Part):
    """Every score of a model by its name; these two are always there."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, float] = Field(init=False)

    frechet_distance: float
    gap_closed: float


class Promoted(_Part):
    """A trial that the promotion scored again; `again` and `gap_closed` are by extractor."""

    trial: int
    epoch: float
    searched: float
    again: dict[str, float]
    gap_closed: dict[str, float]
    rank: float


class Best(_Part):
    """The trial that the promotion chose, with the floor and the baseline's distance that its gap is measured by."""

    trial: int
    epoch: float
    parameters: TrialParameters
    scores: Scores
    floor: float
    baseline: float


class Retrained(_Part):
    """What the retrain kept."""

    epochs: int
    kept_epoch: float
    parameters: TrialParameters
    scores: Scores


class Tested(_Part):
    """Scores on the test split, read once."""

    floor: float
    baseline: Scores
    best: Scores
    retrained: Scores | None = None

    @property
    def models(self) -> dict[str, Scores]:
        """By name, in the order in which they came about; the last is the exported one."""
        named = {"baseline": self.baseline, "best": self.best}
        return named | ({"retrained": self.retrained} if self.retrained else {})

    @property
    def exported(self) -> Scores:
        return self.retrained or self.best


class Summary(_Part):
    """The results of a run so far: on the validation split, but for `test`."""

    extractors: dict[str, ExtractorInfo] = {}
    trials: dict[str, int] = {}
    promotion: tuple[Promoted, ...] = ()
    best: Best | None = None
    retrain: Retrained | None = None
    test: Tested | None = None
    seconds: dict[str, float] = {}

    @model_validator(mode="after")
    def _whole(self) -> "Summary":
        by = [names.keys() for entry in self.promotion for names in (entry.again, entry.gap_closed)]
        if self.best and not (self.extractors and by and all(names == self.extractors.keys() for names in by)):
            raise ValueError("has a best trial, but not what it was chosen by")
        return self
