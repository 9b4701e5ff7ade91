"""What `summary.json` of a run holds: each part is there once the stage that writes it is done."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from tuner.data_spec import Frozen
from tuner.vae.parameters import Parameters

EXTRACTORS = ("search", "second")  # the search never sees the second, which sees what the first can't
GUIDE = "guide"  # guides matched mixtures where the second, which needs no labels, sees too little

# What no trial can have is damage.
TrialParameters = Annotated[dict[str, Any], AfterValidator(lambda found: Parameters.model_validate(found).model_dump())]


class ExtractorInfo(Frozen):
    """A frozen feature extractor: its kind, its file's hash, how often a classifier is right on validation, and the
    Frechet distance of real training images in it, scored as trials are."""

    kind: Literal["classifier", "rotations", "untrained", "wavelets", "program"]
    sha256: str
    accuracy: float | None = None
    floor: float

    @property
    def words(self) -> str:
        """What it is: for people."""
        if self.accuracy is not None:
            told = "classifier" if self.kind == "classifier" else "network that tells rotations"
            return f"a {told}, {self.accuracy:.1%} right"
        return {"untrained": "untrained networks", "wavelets": "wavelet packets"}.get(self.kind, f"a {self.kind}")


class Scores(Frozen):
    """Every score of a model by its name; the distance and the gap are always there, with standard errors if known."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)

    frechet_distance: float
    frechet_distance_error: float | None = None
    gap_closed: float
    gap_closed_error: float | None = None


class Promoted(Frozen):
    """A trial that the promotion scored again, by extractor; `error` is that of the gap closed by the search's."""

    trial: int
    epoch: float
    searched: float
    again: dict[str, float]
    gap_closed: dict[str, float]
    error: float | None = None
    rank: float


class Best(Frozen):
    """The trial that the promotion chose."""

    trial: int
    epoch: float
    parameters: TrialParameters

    @property
    def searched(self) -> dict[str, Any]:
        """The parameters that the search found."""
        return self.parameters


class Retrained(Frozen):
    """What the retrain kept: of which trial, after how many epochs more, and its parameters; of these schedule and
    prior are the retrain's, as `searched` they are the trial's own."""

    epochs: int
    trial: int
    kept_epoch: float
    parameters: TrialParameters
    searched: TrialParameters


class Compared(Frozen):
    """Real images and models on one split. `refitted` is the best trial with a prior of the retrain's."""

    real: Scores
    baseline: Scores
    best: Scores
    refitted: Scores | None = None
    retrained: Scores | None = None

    @property
    def models(self) -> dict[str, Scores]:
        """By name, in the order in which they came about; the last is the exported one."""
        named = {"baseline": self.baseline, "best": self.best}
        later = {"refitted": self.refitted, "retrained": self.retrained}
        return named | {name: scores for name, scores in later.items() if scores}

    @property
    def exported(self) -> Scores:
        return [*self.models.values()][-1]


class Summary(Frozen):
    """The results of a run so far."""

    extractors: dict[str, ExtractorInfo] = Field({})
    trials: dict[str, int] = Field({})
    promotion: tuple[Promoted, ...] = ()
    best: Best | None = None
    retrain: Retrained | None = None
    validation: Compared | None = None
    test: Compared | None = None  # read once
    seconds: dict[str, float] = Field({})

    @model_validator(mode="after")
    def _whole(self) -> "Summary":
        score = self.extractors.keys() - {GUIDE}
        by = [names.keys() for entry in self.promotion for names in (entry.again, entry.gap_closed)]
        known = self.validation and self.extractors and by and all(names == score for names in by)
        if self.best and not known:
            raise ValueError("has a best trial, but not what it was chosen by")
        return self

    @property
    def winner(self) -> Best | Retrained | None:
        """The trial that is exported, or would be: that which the retrain kept, else the best of the promotion."""
        return self.retrain or self.best
