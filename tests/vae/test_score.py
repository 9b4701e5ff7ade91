"""Scores against closed forms and invariants."""

import copy
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import nn

from tuner.vae.data import pixels
from tuner.vae.distance import frechet_distance, moments
from tuner.vae.losses import PIXELS
from tuner.vae.model import VAE, build
from tuner.vae.parameters import Parameters
from tuner.vae.prior import standard_normal
from tuner.vae.score import (
    METRICS,
    Scorer,
    gap_closed,
    grey_share,
    matching_contrast,
)
from tuner.vae.train import Diverged

VARIATIONAL = Parameters(latent_dim=4, width=4)
PLAIN = Parameters(latent_dim=4, width=4, model="autoencoder")


def _score(scorer: Scorer, model: VAE, parameters: Parameters) -> dict[str, float]:
    return scorer(model, parameters, scorer.fit(model, parameters))


def _silent(parameters: Parameters) -> VAE:
    """All weights zero: latents N(0, I) for every image, every picture grey 0.5."""
    model = build(parameters, seed=4)
    for weight in model.parameters():
        nn.init.zeros_(weight)
    return model


def test_gap_closed_is_zero_at_the_baseline_and_one_at_the_floor():
    distances = (131, 66.5, 2, 260)
    assert [gap_closed(distance, 2, 131) for distance in distances] == pytest.approx([0, 0.5, 1, -1])


def test_grey_is_what_lies_strictly_between_a_tenth_and_nine_tenths():
    assert grey_share(torch.tensor([0.0, 0.05, 0.11, 0.5, 0.89, 0.95, 1.0, 1.0])) == 3 / 8


def test_the_floor_is_positive_and_far_below_an_untrained_model(scorer):
    untrained = _score(scorer, build(VARIATIONAL, seed=4), VARIATIONAL)["frechet_distance"]
    assert 0 < scorer.floor < 0.1 * untrained


def test_held_out_images_have_distance_zero_and_real_ones_less_than_an_untrained_models(scorer, digits):
    untrained = scorer.distance(scorer.samples(build(VARIATIONAL, seed=4), standard_normal(4), 400))
    assert scorer.distance(pixels(digits.validation.images)) == pytest.approx(0, abs=1e-3)
    assert 0 < scorer.distance(pixels(digits.train.images[:400])) < untrained


def test_the_floor_is_the_distance_of_as_many_real_training_images(extractor, digits):
    few = Scorer(extractor, digits.train, digits.validation, seed=0, count=100, prior_count=50)
    features = extractor.features(pixels(digits.train.images))
    held_out = moments(extractor.features(pixels(digits.validation.images)))
    orders = [torch.randperm(997, generator=torch.Generator().manual_seed(seed))[:100] for seed in range(20)]
    draws = [frechet_distance(held_out, moments(features[order])).item() for order in orders]
    assert min(draws) * 0.8 < few.floor < max(draws) * 1.2


@pytest.mark.parametrize("parameters", [VARIATIONAL, VARIATIONAL.model_copy(update={"prior": "gaussian_mixture"})])
def test_the_same_model_gets_the_same_scores_twice(scorer, parameters):
    model = build(parameters, seed=4)
    first = _score(scorer, model, parameters)
    torch.manual_seed(3)
    assert _score(scorer, model, parameters) == first


def test_another_seed_draws_other_samples(scorer, extractor, digits):
    model = build(VARIATIONAL, seed=4)
    other = Scorer(extractor, digits.train, digits.validation, seed=1, count=400, prior_count=997)
    assert (
        _score(scorer, model, VARIATIONAL)["frechet_distance"] != _score(other, model, VARIATIONAL)["frechet_distance"]
    )


def test_even_samples_are_scored_with_less_noise_and_beside_a_floor_of_more_images(extractor, digits):
    model, prior = build(VARIATIONAL, seed=4), standard_normal(VARIATIONAL.latent_dim)
    deviation, floors = [], []
    for even in (False, True):
        scorers = [
            Scorer(extractor, digits.train, digits.validation, seed=seed, count=300, prior_count=50, quasi_random=even)
            for seed in range(12)
        ]
        deviation.append(np.std([scorer.distance(scorer.samples(model, prior, 300)) for scorer in scorers]))
        floors.append(scorers[0].floor)
    assert deviation[1] < deviation[0] / 2
    every = Scorer(extractor, digits.train, digits.validation, seed=0, count=997, prior_count=50).floor
    assert floors[1] == pytest.approx(every)
    assert floors[1] < floors[0]


def test_a_score_holds_every_metric_but_the_training_loss(scorer):
    bernoulli = VARIATIONAL.model_copy(update={"likelihood": "bernoulli"})
    assert _score(scorer, build(VARIATIONAL, seed=4), VARIATIONAL).keys() == METRICS.keys() - {"loss", "nll"}
    assert _score(scorer, build(bernoulli, seed=4), bernoulli).keys() == METRICS.keys() - {"loss"}


def test_a_likelihood_bound_is_below_the_elbo_and_binary_pixels_are_scored_as_such(scorer):
    binary = VARIATIONAL.model_copy(update={"likelihood": "bernoulli", "pixels": "binary"})
    scores = _score(scorer, _silent(binary), binary)
    # The decoder says 1/2 and the posterior is N(0, I), so the bound is the likelihood.
    assert scores["nll"] == pytest.approx(PIXELS * math.log(2), rel=1e-4)
    assert scores["distortion"] == pytest.approx(PIXELS * math.log(2), rel=1e-6)
    assert scores["mse"] == pytest.approx(0.25)  # of 0 and 1 against 1/2
    model = build(binary, seed=4)
    nn.init.constant_(model.mean.bias, 1)
    scores = _score(scorer, model, binary)
    assert scores["nll"] < scores["calibrated_nll"]


def test_a_plain_autoencoder_lacks_exactly_the_metrics_that_need_a_vae(scorer):
    scores = _score(scorer, build(PLAIN, seed=4), PLAIN)
    assert METRICS.keys() - {"loss"} - scores.keys() == {name for name, metric in METRICS.items() if metric.needs_vae}


def test_under_the_standard_normal_prior_both_frechet_distances_are_one(scorer):
    scores = _score(scorer, build(VARIATIONAL, seed=4), VARIATIONAL)
    assert scores["frechet_distance"] == scores["frechet_distance_standard_normal"]


def test_a_fitted_prior_leaves_the_standard_normal_figure_as_it_is(scorer):
    model = build(VARIATIONAL, seed=4)
    mixture = _score(scorer, model, VARIATIONAL.model_copy(update={"prior": "gaussian_mixture"}))
    plain = _score(scorer, model, VARIATIONAL)
    assert mixture["frechet_distance_standard_normal"] == plain["frechet_distance_standard_normal"]
    assert mixture["frechet_distance"] != plain["frechet_distance"]


def test_a_silent_model_has_every_score_in_closed_form(scorer, digits):
    model = _silent(VARIATIONAL)
    nn.init.constant_(model.mean.bias, 1.0)
    scores = _score(scorer, model, VARIATIONAL)
    images = pixels(digits.validation.images)
    mse = (images.double() - 0.5).square().mean().item()
    assert scores["mse"] == pytest.approx(mse, rel=1e-6)
    assert scores["rate"] == 4 * 0.5
    assert scores["distortion"] == pytest.approx(392 * (1 + math.log(2 * math.pi * mse)), rel=1e-6)
    assert scores["calibrated_nll"] == scores["rate"] + scores["distortion"]
    assert scores["active_units"] == 0
    assert scores["sharpness"] == pytest.approx(1 / grey_share(images))
    mean, covariance = moments(scorer.extractor.features(images))
    grey = scorer.extractor.features(torch.full((1, 1, 28, 28), 0.5))[0].double()
    expected = ((grey - mean).square().sum() + covariance.trace()).item()
    assert scores["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert scores["frechet_distance_reconstruction"] == pytest.approx(expected, rel=1e-4)


def test_the_bernoulli_likelihood_is_scored_in_its_own_nats(scorer):
    parameters = VARIATIONAL.model_copy(update={"likelihood": "bernoulli"})
    scores = _score(scorer, _silent(parameters), parameters)
    assert scores["distortion"] == pytest.approx(PIXELS * math.log(2), rel=1e-6)


def test_active_units_are_latents_whose_mean_varies_by_more_than_a_hundredth(scorer):
    model = build(VARIATIONAL, seed=4)
    with torch.no_grad():
        means, _ = model.encode(scorer.images)
        variances = torch.tensor([1.0, 0.011, 0.009, 0.0])
        model.mean.weight *= (variances / means.var(0)).sqrt().unsqueeze(1)
    assert _score(scorer, model, VARIATIONAL)["active_units"] == 2


def test_a_fitted_prior_has_the_moments_of_the_encoded_training_images(scorer, digits):
    parameters = PLAIN.model_copy(update={"prior": "gaussian_mixture", "prior_components": 3})
    model = build(parameters, seed=4)
    prior = scorer.fit(model, parameters)
    with torch.no_grad():
        codes, _ = model.encode(pixels(digits.train.images))
    torch.testing.assert_close(prior.weights @ prior.means, codes.mean(0), rtol=1e-3, atol=1e-4)


def test_a_fitted_prior_of_a_vae_covers_the_posteriors_and_not_only_their_means(scorer):
    parameters = VARIATIONAL.model_copy(update={"prior": "gaussian_mixture", "prior_components": 1})
    model = _silent(parameters)
    nn.init.constant_(model.log_variance.bias, math.log(9))  # every posterior is N(0, 9 I)
    prior = scorer.fit(model, parameters)
    torch.testing.assert_close(prior.covariances[0], 9 * torch.eye(4), rtol=0, atol=9 * 5 * math.sqrt(2 / 997))
    torch.testing.assert_close(prior.means[0], torch.zeros(4), rtol=0, atol=3 * 5 / math.sqrt(997))


def test_reconstructions_are_drawn_from_the_posterior(scorer):
    model = _silent(VARIATIONAL)
    nn.init.constant_(model.log_variance.bias, math.log(9))
    model.decoder = nn.Sequential(nn.Linear(4, PIXELS, bias=False), nn.Unflatten(1, (1, 28, 28)))
    model.decoder[0].weight.data = torch.tensor([1.0, 0, 0, 0]).expand(PIXELS, 4)  # each logit is the first latent
    points, weights = np.polynomial.hermite_e.hermegauss(99)
    square = (weights / (1 + np.exp(-3 * points)) ** 2).sum() / weights.sum()  # of the sigmoid, under N(0, 9)
    images = scorer.images.double()
    expected = square - images.mean().item() + images.square().mean().item()
    assert _score(scorer, model, VARIATIONAL)["mse"] == pytest.approx(expected, abs=0.02)


def test_the_scale_of_the_extractors_features_does_not_change_the_kernel_distance(scorer, digits):
    louder = copy.deepcopy(scorer.extractor)
    for part in (louder.trunk[5].weight, louder.trunk[5].bias):
        part *= 3
    other = Scorer(louder, digits.train, digits.validation, seed=0, count=400, prior_count=997)
    model = build(VARIATIONAL, seed=4)
    quiet, loud = _score(scorer, model, VARIATIONAL), _score(other, model, VARIATIONAL)
    assert loud["kernel_distance"] == pytest.approx(quiet["kernel_distance"], rel=1e-4)
    assert loud["frechet_distance"] == pytest.approx(9 * quiet["frechet_distance"], rel=1e-4)


def test_the_standard_normal_prior_is_not_fitted(scorer):
    fitted, expected = scorer.fit(build(VARIATIONAL, seed=4), VARIATIONAL), standard_normal(4)
    torch.testing.assert_close(fitted.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_matching_contrast_makes_that_share_of_pixels_grey(share):
    logits = 3 * torch.randn(100, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    contrast = matching_contrast(logits, share)
    assert grey_share(torch.sigmoid(contrast * logits)) == pytest.approx(share, abs=1e-4)
    normal = NormalDist(0, 3 * contrast)  # what the logits then are
    assert normal.cdf(math.log(9)) - normal.cdf(-math.log(9)) == pytest.approx(share, abs=0.01)


def test_a_matched_contrast_makes_samples_as_grey_as_training_images_and_leaves_likelihoods(scorer, digits):
    matched = VARIATIONAL.model_copy(update={"contrast": "matched"})
    model = build(matched, seed=4)
    nn.init.normal_(model.decoder[-1].weight, 0, 1, generator=torch.Generator().manual_seed(0))
    plain = _score(scorer, model, VARIATIONAL)
    assert model.contrast == 1
    scores = _score(scorer, model, matched)
    assert model.contrast != 1
    samples = scorer.samples(model, standard_normal(4), 1_000)
    assert grey_share(samples) == pytest.approx(grey_share(pixels(digits.train.images)), rel=0.05)
    assert scores["sharpness"] == pytest.approx(1, rel=0.05)
    assert scores["frechet_distance"] != plain["frechet_distance"]
    assert scores["frechet_distance_reconstruction"] != plain["frechet_distance_reconstruction"]
    for name in ("mse", "distortion", "rate", "calibrated_nll"):
        assert scores[name] == plain[name]


def test_a_matched_mixture_is_guided_by_the_encoder_and_by_the_guide(extractor, digits):
    parameters = VARIATIONAL.model_copy(update={"prior": "matched_mixture", "prior_components": 2})
    model, options = build(parameters, seed=4), {"seed": 0, "count": 100, "prior_count": 400}
    fitted = {
        name: Scorer(extractor, digits.train, digits.validation, **options, guide=guide).fit(model, wanted)
        for name, wanted, guide in (
            ("plain", parameters.model_copy(update={"prior": "gaussian_mixture"}), extractor),
            ("alone", parameters, None),
            ("guided", parameters, extractor),
        )
    }
    assert not torch.equal(fitted["plain"].means, fitted["alone"].means)
    assert not torch.equal(fitted["alone"].means, fitted["guided"].means)


def test_a_contrast_without_bounds_is_a_divergence(scorer):
    matched = VARIATIONAL.model_copy(update={"contrast": "matched"})
    with pytest.raises(Diverged, match="contrast is not finite"):
        scorer.fit(_silent(matched), matched)


def test_samples_are_drawings_of_the_prior_with_the_same_noise_each_time(scorer):
    model, prior = build(VARIATIONAL, seed=4), standard_normal(4)
    images = scorer.samples(model, prior, 130)  # more than one batch
    assert images.shape == (130, 1, 28, 28)
    assert images.min() > 0
    assert images.max() < 1
    assert torch.equal(scorer.samples(model, prior, 130), images)


def test_no_more_images_are_compared_than_there_are_training_images(extractor, digits):
    assert Scorer(extractor, digits.train, digits.validation, seed=0, count=5_000, prior_count=10).count == 997


@pytest.mark.parametrize("prior", ["standard_normal", "gaussian_mixture"])
def test_a_model_with_broken_weights_is_named_diverged(scorer, prior):
    parameters = VARIATIONAL.model_copy(update={"prior": prior})
    model = build(parameters, seed=4)
    nn.init.constant_(model.mean.bias, math.nan)
    with pytest.raises(Diverged, match="not finite"):
        _score(scorer, model, parameters)


def test_a_plain_autoencoder_that_maps_all_images_to_one_point_is_named_diverged(scorer):
    parameters = PLAIN.model_copy(update={"prior": "gaussian_mixture"})
    with pytest.raises(Diverged):
        _score(scorer, _silent(parameters), parameters)


def test_each_metric_says_its_direction_unit_and_meaning():
    assert {metric.direction for metric in METRICS.values()} == {"minimize", "maximize"}
    assert all(metric.unit and metric.meaning for metric in METRICS.values())
