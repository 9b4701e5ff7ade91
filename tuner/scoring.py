"""How models are scored and fitted: in the search, and after it with noise that no trial was scored with by a pool."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

from torch import Tensor

from tuner.spec import Spec
from tuner.summary import GUIDE, Compared, Scores
from tuner.vae.data import Data, Split
from tuner.vae.extractor import FeatureExtractor
from tuner.vae.fitted import FittedModel, Fitter
from tuner.vae.losses import Diverged
from tuner.vae.metrics import gap_closed
from tuner.vae.model import Model
from tuner.vae.parameters import Parameters
from tuner.vae.resampling import gap_closed_error, standard_error
from tuner.vae.score import Scorer
from tuner.vae.seeds import Stream, derive_seed

SAMPLES, PRIOR_IMAGES = 10_000, 50_000  # outside of the search a score may cost more
SEARCH_SAMPLES = 2_500  # of each kind per score: keeps scoring below 15 % of training on MNIST
SEARCH_PRIOR_IMAGES = 10_000
MOST_FEATURES = 256

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True)
class Measured:
    """Scores, and the replicates (R,) of the Frechet distance that its standard error is worked out from, if it is."""

    scores: dict[str, float]
    replicates: Tensor | None = None


@dataclass(frozen=True)
class Bench:
    """Fits and scores models: on the validation split, to choose by, or on `test` where that is given. Works on the
    device that its images are on; what it is given and gives is on the CPU."""

    spec: Spec
    data: Data
    extractors: dict[str, FeatureExtractor]
    test: Split | None = None

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        """By extractor; filled as they are asked for."""
        return {}

    def scorer(self, extractor: str = "search") -> Scorer:
        if extractor not in self.scorers:
            self.scorers[extractor] = Scorer(
                self.extractors[extractor],
                self.data.train,
                self.test or self.data.validation,
                seed=self._seed,
                count=SAMPLES,
                quasi_random=self.test is None,
            )
        return self.scorers[extractor]

    @cached_property
    def fitter(self) -> Fitter:
        """Guided by an extractor that scores nothing any more: one for this alone, or the promotion's second."""
        guide = self.extractors.get(GUIDE, self.extractors["second"])
        return Fitter(self.data.train, seed=self._seed, count=PRIOR_IMAGES, samples=SAMPLES, guide=guide)

    def score(self, fitted: FittedModel | None, extractor: str = "search") -> Measured:
        """Of a model; of real training images where there is none: their distance is the floor.

        Errors are those in the search's extractor, and of no more features than a few hundred: of many they take long.
        """
        scorer = self.scorer(extractor)
        if extractor != "search" or scorer.features.shape[-1] > MOST_FEATURES:
            return Measured(scorer(fitted) if fitted else {"frechet_distance": scorer.floor})
        if fitted is None:
            return Measured({"frechet_distance": scorer.floor}, scorer.floor_replicates)
        return Measured(*scorer.measure(fitted))

    def refit(self, fitted: FittedModel, parameters: Parameters) -> tuple[FittedModel, Measured] | None:
        """The same model with the prior that `parameters` ask for, fitted and scored; None where that diverges."""
        try:
            other = self.fitter(fitted.model, parameters, fitted.epoch)
            measured = self.score(other)
            return replace(other, scores=measured.scores), measured
        except Diverged:
            return None

    @property
    def _seed(self) -> int:
        return derive_seed(self.spec.seed, Stream.PROMOTE)


class Workers(Protocol):
    """Many hands at benches that are alike."""

    def map(
        self, work: Callable[..., Result], items: Sequence[tuple[Any, ...]], show: Callable[[int], None] = ...
    ) -> list[Result]:
        """`work(bench, *item)` of each item, side by side, in their order; `show` hears how many are done."""

    def begin(self, work: Callable[..., Result], item: tuple[Any, ...]) -> "Pending[Result]":
        """`work(bench, *item)` beside whatever fills the cluster."""


class Pending(Protocol[Result_co]):
    """What is being worked on."""

    def ready(self) -> bool: ...

    def result(self) -> Result_co:
        """Waits for it."""


Pool = Callable[[Bench], Workers]


class Evaluator:
    """Fits and scores what the trials of a search have trained, where these images are; all face the same noise.

    The extractor is asked for when the first is scored: until then it may still be in training.
    """

    def __init__(self, spec: Spec, data: Data, extractor: Callable[[], FeatureExtractor]):
        self.spec, self.data, self.extractor = spec, data, extractor
        self.fitter = Fitter(data.train, seed=spec.seed, count=SEARCH_PRIOR_IMAGES, samples=SEARCH_SAMPLES)

    @cached_property
    def scorer(self) -> Scorer:
        return search_scorer(self.spec, self.data, self.extractor())

    def __call__(self, model: Model, parameters: Parameters, epoch: float) -> FittedModel:
        """Raises Diverged."""
        fitted = self.fitter(model, parameters, epoch)
        return replace(fitted, scores=self.scorer(fitted))


def search_scorer(spec: Spec, data: Data, extractor: FeatureExtractor) -> Scorer:
    """The scorer that all trials of a search face, with the same noise."""
    return Scorer(extractor, data.train, data.validation, seed=spec.seed, count=SEARCH_SAMPLES, quasi_random=True)


def compared(measured: dict[str, Measured]) -> Compared:
    """By the names of `Compared`: real images and models, the baseline among them."""
    real, baseline = measured["real"], measured["baseline"]
    return Compared(**{name: scores_of(found, real, baseline) for name, found in measured.items()})


def scores_of(found: Measured, real: Measured, baseline: Measured) -> Scores:
    """Scores with the gap closed and the standard errors of both."""
    distances = [each.scores["frechet_distance"] for each in (found, real, baseline)]
    replicates = [each.replicates for each in (found, real, baseline) if each.replicates is not None]
    return Scores(
        **found.scores,
        frechet_distance_error=standard_error(replicates[0]) if replicates else None,
        gap_closed=gap_closed(*distances),
        gap_closed_error=gap_closed_error(*replicates) if replicates else None,
    )
