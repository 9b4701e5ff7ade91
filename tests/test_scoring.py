"""The bench on which models are scored and fitted, and what is made of its measurements."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tuner.scoring import MOST_FEATURES, Evaluator, Measured, compared, scores_of, search_scorer
from tuner.vae.extractor import FeatureExtractor, draw_untrained
from tuner.vae.fitted import FittedModel
from tuner.vae.metrics import METRICS
from tuner.vae.prior import standard_normal
from tuner.vae.seeds import Stream, derive_seed
from tuner.workspace import Checkpoints

ERRORS = {"frechet_distance_error", "gap_closed_error"}


@pytest.fixture(scope="module")
def best(finished_run) -> FittedModel:
    return Checkpoints(finished_run).best(finished_run.checkpoint(finished_run.summary().best.trial))


# The bench


def alike(extractor: FeatureExtractor, other: FeatureExtractor) -> bool:
    """Whether they see the same; one may be a copy on a device."""
    ours, theirs = extractor.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name]) for name in ours)


def test_validation_is_scored_with_noise_that_no_trial_had_and_the_test_split_with_independent_samples(bench):
    choosing, search = bench.scorer(), search_scorer(bench.spec, bench.data, bench.extractors["search"])
    assert choosing.seed == derive_seed(bench.spec.seed, Stream.PROMOTE) != search.seed
    assert choosing.count >= search.count or choosing.count == len(bench.data.train)
    assert (choosing.quasi_random, search.quasi_random) == (True, True)
    assert alike(choosing.extractor, bench.extractors["search"])
    assert alike(bench.scorer("second").extractor, bench.extractors["second"])
    assert bench.scorer() is choosing, "it is made once"
    final = replace(bench, test=bench.data.train).scorer()
    assert (final.seed, final.quasi_random) == (choosing.seed, False)
    assert len(final.features) == len(bench.data.train)


def test_what_is_exported_is_guided_by_the_extractor_that_scores_nothing_any_more(bench):
    assert alike(bench.fitter.guide, bench.extractors["second"])
    assert not alike(bench.fitter.guide, bench.extractors["search"])
    assert Evaluator(bench.spec, bench.data, lambda: bench.extractors["search"]).fitter.guide is None
    own = draw_untrained(bench.data.shape, seed=0)
    assert alike(replace(bench, extractors=bench.extractors | {"guide": own}).fitter.guide, own)


def test_real_training_images_are_scored_as_the_floor(bench):
    real = bench.score(None)
    assert real.scores == {"frechet_distance": bench.scorer().floor}
    assert torch.equal(real.replicates, bench.scorer().floor_replicates)
    assert bench.score(None, "second").scores["frechet_distance"] == bench.scorer("second").floor


class Pixels(FeatureExtractor):
    """As many features as pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Flatten()


def test_errors_are_those_in_the_searchs_extractor_where_its_features_are_few(bench, best):
    for fitted in (None, best):
        assert bench.score(fitted, "second").replicates is None
    wide = replace(bench, extractors={"search": Pixels()})
    assert wide.scorer().features.shape[-1] > MOST_FEATURES
    real = wide.score(None)
    assert real == Measured({"frechet_distance": wide.scorer().floor})


def test_a_model_has_every_score_and_as_many_replicates_as_real_images_have(bench, best):
    measured = bench.score(best)
    assert measured.scores == bench.scorer()(best)
    assert measured.scores.keys() == METRICS.keys() - {"loss", "nll"}
    assert measured.replicates.shape == bench.score(None).replicates.shape


def test_a_model_that_is_fitted_again_keeps_its_weights_and_has_the_scores_of_its_new_prior(bench, best):
    wanted = best.parameters.model_copy(update={"prior": "gaussian_mixture", "prior_components": 3})
    fitted, measured = bench.refit(best, wanted)
    assert fitted.model is best.model
    assert (fitted.parameters, fitted.epoch) == (wanted, best.epoch)
    assert len(fitted.prior.weights) == 3
    assert fitted.scores == measured.scores == bench.score(fitted).scores


def test_what_can_not_be_fitted_or_scored_is_nothing(bench, best):
    wild = best.snapshot()
    for weight in wild.model.parameters():
        weight.data.fill_(torch.nan)
    assert bench.refit(wild, wild.parameters) is None
    plain = wild.parameters.model_copy(update={"prior": "standard_normal", "temperature": "one"})
    assert bench.refit(replace(wild, prior=standard_normal(wild.model.latent_dim)), plain) is None


# Gaps and errors


def measured(distance: float, error: float = 0.0, **more: float) -> Measured:
    """What one half has more than the whole, the other has less: by about the error."""
    half = error * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(100)
    replicates = distance + torch.cat([torch.zeros(1, dtype=torch.float64), half, -half])
    return Measured({"frechet_distance": distance} | more, replicates)


def test_real_images_close_the_whole_gap_and_the_baseline_none_of_it_both_without_error():
    real, baseline = measured(2, 1), measured(10, 3)
    for found, gap in ((real, 1), (baseline, 0)):
        scores = scores_of(found, real, baseline)
        assert (scores.gap_closed, scores.gap_closed_error) == (gap, pytest.approx(0, abs=1e-12))
        assert scores.frechet_distance == found.scores["frechet_distance"]
        assert scores.frechet_distance_error > 0


def test_the_gap_is_a_share_and_errors_scale_as_it_does():
    real, baseline = measured(2), measured(10)
    scores = scores_of(measured(4, 0.5, mse=0.25), real, baseline)
    assert (scores.gap_closed, scores.mse) == (0.75, 0.25)
    assert scores.gap_closed_error == pytest.approx(scores.frechet_distance_error / 8)
    assert scores.frechet_distance_error == pytest.approx(0.5, rel=0.01)
    twice = scores_of(measured(4, 1.0), real, baseline)
    assert twice.frechet_distance_error == pytest.approx(2 * scores.frechet_distance_error)


def test_what_moves_all_distances_alike_is_no_error_of_the_gap():
    """As the resampling of the same held-out images does."""
    real, found, baseline = (measured(distance, 1) for distance in (2, 4, 10))
    assert scores_of(found, real, baseline).gap_closed_error == pytest.approx(0, abs=1e-12)
    assert scores_of(found, real, baseline).frechet_distance_error > 0


def test_where_replicates_are_not_known_errors_are_not():
    found, real, baseline = (Measured({"frechet_distance": distance}) for distance in (4.0, 2.0, 10.0))
    scores = scores_of(found, real, baseline)
    assert (scores.gap_closed, scores.gap_closed_error, scores.frechet_distance_error) == (0.75, None, None)


def test_models_are_compared_by_name_against_real_images_and_the_baseline(bench, finished_run, best):
    models = {"real": None, "baseline": Checkpoints(finished_run).baseline(), "best": best}
    found = compared({name: bench.score(fitted) for name, fitted in models.items()})
    assert list(found.models) == ["baseline", "best"]
    assert found.real.model_dump().keys() == {"frechet_distance", "gap_closed"} | ERRORS
    assert (found.real.gap_closed, found.baseline.gap_closed) == (1, 0)
    assert 0 < found.best.gap_closed < 1
    assert found.best.gap_closed_error > 0
