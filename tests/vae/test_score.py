"""Scores against closed forms and invariants."""

import copy
import math
import statistics
from itertools import pairwise

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import nn

from tuner.vae.data import Split, as_floats
from tuner.vae.distance import frechet_distance, moments
from tuner.vae.extractor import WaveletPackets
from tuner.vae.fitted import FittedModel
from tuner.vae.losses import Diverged
from tuner.vae.metrics import METRICS
from tuner.vae.model import VAE, Builder, Model
from tuner.vae.parameters import Parameters
from tuner.vae.prior import standard_normal
from tuner.vae.score import Scorer, laplacian_variance
from tuner.vae.shape import ImageShape

build = Builder(ImageShape(1, 28, 28))

PIXELS = 28 * 28
VARIATIONAL = Parameters(latent_dim=4, width=4)
PLAIN = Parameters(latent_dim=4, width=4, model="autoencoder")


@pytest.fixture(scope="module")
def score(scorer, fitter):
    """The scores of a model that is fitted as its parameters ask for."""

    def score(model: Model, parameters: Parameters) -> dict[str, float]:
        return scorer(fitter(model, parameters))

    return score


@pytest.fixture(scope="module")
def score_few(extractor, digits, fitter):
    """The same by a scorer of fewer images: the likelihood's bound takes a while."""
    scorer = Scorer(extractor, digits.train, digits.validation, seed=0, count=60)

    def score(model: Model, parameters: Parameters) -> dict[str, float]:
        return scorer(fitter(model, parameters))

    return score


def _plain(seed: int = 4) -> FittedModel:
    return FittedModel(build(VARIATIONAL, seed), VARIATIONAL, standard_normal(VARIATIONAL.latent_dim))


def _silent(parameters: Parameters) -> VAE:
    """All weights zero: latents N(0, I) for every image, every picture grey 0.5."""
    model = build(parameters, seed=4)
    for weight in model.parameters():
        nn.init.zeros_(weight)
    return model


def test_the_floor_is_positive_and_far_below_an_untrained_model(score, scorer):
    untrained = score(build(VARIATIONAL, seed=4), VARIATIONAL)["frechet_distance"]
    assert 0 < scorer.floor < 0.1 * untrained


def test_held_out_images_have_distance_zero_and_real_ones_less_than_an_untrained_models(scorer, digits):
    untrained = scorer.distance(scorer.samples(_plain(), 400))
    assert scorer.distance(as_floats(digits.validation.images)) == pytest.approx(0, abs=1e-3)
    assert 0 < scorer.distance(as_floats(digits.train.images[:400])) < untrained


def test_the_floor_is_the_distance_of_as_many_real_training_images(extractor, digits):
    few = Scorer(extractor, digits.train, digits.validation, seed=0, count=100)
    features = extractor.features(as_floats(digits.train.images))
    held_out = moments(extractor.features(as_floats(digits.validation.images)))
    orders = [torch.randperm(997, generator=torch.Generator().manual_seed(seed))[:100] for seed in range(20)]
    draws = [frechet_distance(held_out, moments(features[order])).item() for order in orders]
    assert min(draws) * 0.8 < few.floor < max(draws) * 1.2


@pytest.mark.parametrize("parameters", [VARIATIONAL, VARIATIONAL.model_copy(update={"prior": "gaussian_mixture"})])
def test_the_same_model_gets_the_same_scores_twice(score, parameters):
    model = build(parameters, seed=4)
    first = score(model, parameters)
    torch.manual_seed(3)
    assert score(model, parameters) == first


def test_another_seed_draws_other_samples(scorer, extractor, digits):
    other = Scorer(extractor, digits.train, digits.validation, seed=1, count=400)
    assert scorer(_plain())["frechet_distance"] != other(_plain())["frechet_distance"]


@pytest.mark.parametrize("quasi_random", [False, True])
def test_measuring_gives_the_scores_and_replicates_that_depend_on_the_seed_alone(extractor, digits, quasi_random):
    scorers = [
        Scorer(extractor, digits.train, digits.validation, seed=seed, count=60, quasi_random=quasi_random)
        for seed in (0, 0, 1)
    ]
    (scores, replicates), (again, same), (_, others) = (scorer.measure(_plain()) for scorer in scorers)
    assert scores == again == scorers[0](_plain())
    assert replicates.ndim == 1
    assert torch.equal(replicates, same)
    assert not torch.equal(replicates, others)
    assert replicates.isfinite().all()
    floors = [scorer.floor_replicates for scorer in scorers]
    assert floors[0].shape == replicates.shape, "they are compared one by one"
    assert torch.equal(floors[0], floors[1])


def test_groups_of_features_are_scored_by_the_mean_over_them(digits):
    extractor = WaveletPackets(digits.shape)
    scorer = Scorer(extractor, digits.train, digits.validation, seed=0, count=100)
    scores, images = scorer(_plain()), as_floats(digits.validation.images)
    drawn, real = (extractor.features(shown).unbind(1) for shown in (scorer.samples(_plain(), 100), images))
    singles = [frechet_distance(moments(b), moments(a)).item() for a, b in zip(drawn, real, strict=True)]
    assert scores.keys() == METRICS.keys() - {"loss", "nll"}
    assert scores["frechet_distance"] == pytest.approx(np.mean(singles))


def test_quasi_random_samples_are_scored_with_less_noise_and_beside_a_floor_of_more_images(extractor, digits):
    deviation, floors = [], []
    for quasi_random in (False, True):
        scorers = [
            Scorer(extractor, digits.train, digits.validation, seed=seed, count=300, quasi_random=quasi_random)
            for seed in range(12)
        ]
        deviation.append(np.std([scorer.distance(scorer.samples(_plain(), 300)) for scorer in scorers]))
        floors.append(scorers[0].floor)
    assert deviation[1] < deviation[0] / 2
    every = Scorer(extractor, digits.train, digits.validation, seed=0, count=997).floor
    assert floors[1] == pytest.approx(every)
    assert floors[1] < floors[0]


def test_a_score_holds_every_metric_but_the_training_loss(score_few):
    bernoulli = VARIATIONAL.model_copy(update={"likelihood": "bernoulli"})
    assert score_few(build(VARIATIONAL, seed=4), VARIATIONAL).keys() == METRICS.keys() - {"loss", "nll"}
    assert score_few(build(bernoulli, seed=4), bernoulli).keys() == METRICS.keys() - {"loss"}


def test_a_likelihood_bound_is_below_the_elbo_and_binary_pixels_are_scored_as_such(score_few):
    binary = VARIATIONAL.model_copy(update={"likelihood": "bernoulli", "pixels": "binary"})
    scores = score_few(_silent(binary), binary)
    # The decoder says 1/2 and the posterior is N(0, I), so the bound is the likelihood.
    assert scores["nll"] == pytest.approx(PIXELS * math.log(2), rel=1e-4)
    assert scores["distortion"] == pytest.approx(PIXELS * math.log(2), rel=1e-6)
    assert scores["mse"] == pytest.approx(0.25)  # of 0 and 1 against 1/2
    model = build(binary, seed=4)
    nn.init.constant_(model.mean.bias, 1)
    scores = score_few(model, binary)
    assert scores["nll"] < scores["calibrated_nll"]


def test_a_plain_autoencoder_lacks_exactly_the_metrics_that_need_a_vae(score):
    scores = score(build(PLAIN, seed=4), PLAIN)
    assert METRICS.keys() - {"loss"} - scores.keys() == {name for name, metric in METRICS.items() if metric.needs_vae}


def test_under_the_standard_normal_prior_both_frechet_distances_are_one(score):
    scores = score(build(VARIATIONAL, seed=4), VARIATIONAL)
    assert scores["frechet_distance"] == scores["frechet_distance_standard_normal"]


def test_a_fitted_prior_leaves_the_standard_normal_figure_as_it_is(score):
    model = build(VARIATIONAL, seed=4)
    mixture = score(model, VARIATIONAL.model_copy(update={"prior": "gaussian_mixture"}))
    plain = score(model, VARIATIONAL)
    assert mixture["frechet_distance_standard_normal"] == plain["frechet_distance_standard_normal"]
    assert mixture["frechet_distance"] != plain["frechet_distance"]


def test_a_silent_model_has_every_score_in_closed_form(score, scorer, digits):
    model = _silent(VARIATIONAL)
    nn.init.constant_(model.mean.bias, 1.0)
    scores = score(model, VARIATIONAL)
    images = as_floats(digits.validation.images)
    mse = (images.double() - 0.5).square().mean().item()
    assert scores["mse"] == pytest.approx(mse, rel=1e-6)
    assert scores["rate"] == 4 * 0.5
    assert scores["distortion"] == pytest.approx(392 * (1 + math.log(2 * math.pi * mse)), rel=1e-6)
    assert scores["calibrated_nll"] == scores["rate"] + scores["distortion"]
    assert scores["active_units"] == 0
    assert scores["sharpness"] == 0
    mean, covariance = moments(scorer.extractor.features(images))
    grey = scorer.extractor.features(torch.full((1, 1, 28, 28), 0.5))[0].double()
    expected = ((grey - mean).square().sum() + covariance.trace()).item()
    assert scores["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert scores["frechet_distance_reconstruction"] == pytest.approx(expected, rel=1e-4)


def test_the_bernoulli_likelihood_is_scored_in_its_own_nats(score_few):
    parameters = VARIATIONAL.model_copy(update={"likelihood": "bernoulli"})
    scores = score_few(_silent(parameters), parameters)
    assert scores["distortion"] == pytest.approx(PIXELS * math.log(2), rel=1e-6)


def test_active_units_are_latents_whose_mean_varies_by_more_than_a_hundredth(score, scorer):
    model = build(VARIATIONAL, seed=4)
    with torch.no_grad():
        means, _ = model.encode(scorer.images)
        variances = torch.tensor([1.0, 0.011, 0.009, 0.0])
        model.mean.weight *= (variances / means.var(0)).sqrt().unsqueeze(1)
    assert score(model, VARIATIONAL)["active_units"] == 2


class _Foreign(Model):
    """Of no built-in class: every posterior is N(0, 9 I), and each logit is the first latent."""

    latent_dim = 4

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = images.new_zeros(len(images), 4)
        return mean, mean + math.log(9)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :1, None, None].expand(-1, 1, 28, 28)


def test_reconstructions_are_drawn_from_the_posterior(scorer):
    points, weights = np.polynomial.hermite_e.hermegauss(99)
    square = (weights / (1 + np.exp(-3 * points)) ** 2).sum() / weights.sum()  # of the sigmoid, under N(0, 9)
    images = scorer.images.double()
    expected = square - images.mean().item() + images.square().mean().item()
    scores = scorer(FittedModel(_Foreign(), VARIATIONAL, standard_normal(4)))
    assert scores["mse"] == pytest.approx(expected, abs=0.02)


def test_the_scale_of_the_extractors_features_does_not_change_the_kernel_distance(score, scorer, digits):
    louder = copy.deepcopy(scorer.extractor)
    for part in (louder.trunk[5].weight, louder.trunk[5].bias):
        part *= 3
    other = Scorer(louder, digits.train, digits.validation, seed=0, count=400)
    quiet, loud = scorer(_plain()), other(_plain())
    assert loud["kernel_distance"] == pytest.approx(quiet["kernel_distance"], rel=1e-4)
    assert loud["frechet_distance"] == pytest.approx(9 * quiet["frechet_distance"], rel=1e-4)


def test_a_fitted_temperature_changes_what_is_drawn_and_leaves_likelihoods(score):
    tempered = VARIATIONAL.model_copy(update={"temperature": "fitted"})
    model = build(tempered, seed=4)
    nn.init.normal_(model.up[-1].weight, 0, 1, generator=torch.Generator().manual_seed(0))
    plain, scores = score(model, VARIATIONAL), score(model, tempered)
    drawn = {name for name in scores if "distance" in name} | {"sharpness"}
    assert drawn | {"mse", "distortion", "rate", "calibrated_nll", "active_units"} == scores.keys()
    for name in scores:
        assert (scores[name] != plain[name]) == (name in drawn)


def test_samples_are_drawings_of_the_prior_with_the_same_noise_each_time(scorer):
    images = scorer.samples(_plain(), 130)  # more than one batch
    assert images.shape == (130, 1, 28, 28)
    assert images.min() > 0
    assert images.max() < 1
    assert torch.equal(scorer.samples(_plain(), 130), images)


def test_few_training_images_limit_quasi_random_samples_and_the_floor_but_no_independent_samples(extractor, digits):
    many, even = (
        Scorer(extractor, digits.train, digits.validation, seed=0, count=5_000, quasi_random=quasi_random)
        for quasi_random in (False, True)
    )
    assert (many.count, even.count) == (5_000, 997)
    assert many.floor == even.floor == pytest.approx(many.distance(as_floats(digits.train.images)), rel=1e-5)


def test_as_many_independent_draws_as_there_are_training_images_add_their_noise_to_that_of_the_images(
    extractor, digits
):
    """Training images drawn anew stand for a model that has learned them to perfection."""
    scorer = Scorer(extractor, digits.train, digits.validation, seed=0, count=10_000)
    images, draws = as_floats(digits.train.images), torch.Generator().manual_seed(0)

    def excess(count: int) -> float:
        return scorer.distance(images[torch.randint(len(images), (count,), generator=draws)]) - scorer.floor

    assert statistics.mean(excess(10_000) for _ in range(5)) < 0.2 * statistics.mean(excess(997) for _ in range(5))


@pytest.mark.parametrize("layer", ["mean", "log_variance", "start"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("prior", ["standard_normal", "gaussian_mixture"])
def test_a_model_with_broken_weights_is_named_diverged(score_few, prior, likelihood, value, layer):
    parameters = VARIATIONAL.model_copy(update={"prior": prior, "likelihood": likelihood})
    model = build(parameters, seed=4)
    nn.init.constant_(getattr(model, layer).bias, value)
    with pytest.raises(Diverged, match="not finite"):
        score_few(model, parameters)


def test_a_plain_autoencoder_that_maps_all_images_to_one_point_is_named_diverged(score):
    parameters = PLAIN.model_copy(update={"prior": "gaussian_mixture"})
    with pytest.raises(Diverged):
        score(_silent(parameters), parameters)


@pytest.fixture(scope="module")
def real(digits) -> torch.Tensor:
    return as_floats(digits.validation.images)


def test_the_laplacian_is_scipys_where_no_neighbour_is_missing(real):
    images = real[:50].double()
    expected = [scipy.ndimage.laplace(image)[1:-1, 1:-1] for image in images[:, 0].numpy()]
    assert laplacian_variance(images) == pytest.approx(np.var(expected), rel=1e-12)


def test_half_the_contrast_has_a_quarter_of_the_laplacian_variance(real):
    assert laplacian_variance(real / 2) == pytest.approx(laplacian_variance(real) / 4, rel=1e-6)
    assert laplacian_variance(1 - real) == pytest.approx(laplacian_variance(real), rel=1e-4)


def test_the_laplacian_variance_falls_with_every_blur(real):
    pictures = real[:50, 0].double().numpy()
    blurred = [scipy.ndimage.gaussian_filter(pictures, (0, sigma, sigma)) for sigma in (0.0, 0.3, 0.6, 1.0, 2.0, 4.0)]
    variances = [laplacian_variance(torch.from_numpy(images).unsqueeze(1)) for images in blurred]
    assert all(sharper > softer for sharper, softer in pairwise(variances))
    assert variances[-1] < variances[0] / 50


class _Printer(Model):
    """Its samples are the 100 images it was given, its reconstructions grey."""

    latent_dim = 4

    def __init__(self, images: torch.Tensor):
        super().__init__()
        self.logits = images.logit()

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return images.new_zeros(len(images), 4), None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.logits if latents.any() else torch.zeros_like(self.logits)


def test_real_images_are_as_sharp_as_themselves_and_blurred_ones_less(extractor, digits, real):
    held_out = Split(digits.validation.images[:100], digits.validation.labels[:100])
    scorer = Scorer(extractor, digits.train, held_out, seed=0, count=100)
    blurred = torch.from_numpy(scipy.ndimage.gaussian_filter(real[:100].numpy(), (0, 0, 1, 1)))
    itself, less = (scorer(FittedModel(_Printer(to), PLAIN, standard_normal(4))) for to in (real[:100], blurred))
    assert itself["sharpness"] == pytest.approx(1, rel=1e-5)
    assert itself["frechet_distance"] == pytest.approx(0, abs=1e-3)
    assert less["sharpness"] == pytest.approx(laplacian_variance(blurred) / laplacian_variance(real[:100]), rel=1e-4)
    assert less["sharpness"] < 0.5
