"""Fitted models: priors have the moments of the codes, temperatures make samples as grey as images, a tie stays."""

import io
import math
from statistics import NormalDist

import pytest
import torch
from torch import nn

from tuner.vae.data import as_floats, binarize
from tuner.vae.fitted import (
    FittedModel,
    Fitter,
    as_seen,
    encode,
    grey_share,
    matching_temperature,
    tempered,
)
from tuner.vae.losses import Diverged
from tuner.vae.model import VAE, Builder
from tuner.vae.parameters import Parameters
from tuner.vae.prior import standard_normal
from tuner.vae.seeds import Scoring, Stream, generator
from tuner.vae.shape import ImageShape

build = Builder(ImageShape(1, 28, 28))

VARIATIONAL = Parameters(latent_dim=4, width=4)
PLAIN = Parameters(latent_dim=4, width=4, model="autoencoder")
FITTED = VARIATIONAL.model_copy(update={"temperature": "fitted"})
LATENTS = torch.randn(130, 4, generator=torch.Generator().manual_seed(1))  # more than one batch


def _silent(parameters: Parameters) -> VAE:
    """All weights zero: latents N(0, I) for every image, every picture grey 0.5."""
    model = build(parameters, seed=4)
    for weight in model.parameters():
        nn.init.zeros_(weight)
    return model


def _strong(parameters: Parameters) -> VAE:
    """Its logits are large, as a trained model's are."""
    model = build(parameters, seed=4)
    nn.init.normal_(model.up[-1].weight, 0, 1, generator=torch.Generator().manual_seed(0))
    return model


def _fitted(temperature: float = 1.0, **parts) -> FittedModel:
    return FittedModel(build(VARIATIONAL, seed=4), VARIATIONAL, standard_normal(4), temperature, **parts)


def _assert_same(a: FittedModel, b: FittedModel) -> None:
    assert (a.parameters, a.temperature, a.epoch, a.scores) == (b.parameters, b.temperature, b.epoch, b.scores)
    for ours, theirs in ((a.model, b.model), (a.prior, b.prior)):
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.25, 3.0])
def test_a_drawing_is_the_sigmoid_of_the_logits_divided_by_the_temperature(temperature):
    fitted = _fitted(temperature)
    with torch.no_grad():
        logits = fitted.model.decode(100 * LATENTS)
    drawn = fitted.draw(100 * LATENTS)
    torch.testing.assert_close(drawn, 1 / (1 + torch.exp(-logits / temperature)))
    torch.testing.assert_close(tempered(logits, temperature), drawn)
    assert not drawn.requires_grad
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_many_images_are_encoded_as_few_are():
    model = build(VARIATIONAL, seed=4)
    images = torch.rand(130, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(encode(model, images), model.encode(images), strict=True):
        torch.testing.assert_close(ours, theirs.detach())
    assert encode(build(PLAIN, seed=4), images)[1] is None


def test_grey_is_what_lies_strictly_between_a_tenth_and_nine_tenths():
    assert grey_share(torch.tensor([0.0, 0.05, 0.11, 0.5, 0.89, 0.95, 1.0, 1.0])) == 3 / 8


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_matching_temperature_makes_that_share_of_pixels_grey(share):
    logits = 3 * torch.randn(100, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    temperature = matching_temperature(logits, share)
    assert grey_share(tempered(logits, temperature)) == pytest.approx(share, abs=1e-4)
    normal = NormalDist(0, 3 / temperature)  # what the logits then are
    assert normal.cdf(math.log(9)) - normal.cdf(-math.log(9)) == pytest.approx(share, abs=0.01)


def test_a_fitted_temperature_makes_samples_as_grey_as_training_images(fitter, digits):
    model = _strong(FITTED)
    plain, fitted = fitter(model, VARIATIONAL), fitter(model, FITTED)
    assert plain.temperature == 1
    assert fitted.temperature != 1
    samples = fitted.draw(fitted.prior.sample(1_000, torch.Generator().manual_seed(3)))
    assert grey_share(samples) == pytest.approx(grey_share(as_floats(digits.train.images)), rel=0.05)


def test_a_temperature_without_bounds_is_a_divergence(fitter):
    with pytest.raises(Diverged, match="temperature is not finite"):
        fitter(_silent(FITTED), FITTED)


def test_a_model_keeps_its_parameters_and_epoch_and_has_no_scores_yet(fitter):
    model = build(VARIATIONAL, seed=4)
    fitted = fitter(model, VARIATIONAL, 2.5)
    assert fitted.model is model
    assert (fitted.parameters, fitted.epoch, fitted.scores) == (VARIATIONAL, 2.5, {})


def test_the_standard_normal_prior_is_not_fitted(fitter):
    fitted, expected = fitter(build(VARIATIONAL, seed=4), VARIATIONAL).prior, standard_normal(4)
    torch.testing.assert_close(fitted.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_fitted_prior_has_the_moments_of_the_encoded_training_images(fitter, digits):
    parameters = PLAIN.model_copy(update={"prior": "gaussian_mixture", "prior_components": 3})
    model = build(parameters, seed=4)
    prior = fitter(model, parameters).prior
    with torch.no_grad():
        codes, _ = model.encode(as_floats(digits.train.images))
    torch.testing.assert_close(prior.weights @ prior.means, codes.mean(0), rtol=1e-3, atol=1e-4)


def test_a_fitted_prior_of_a_vae_covers_the_posteriors_and_not_only_their_means(fitter):
    parameters = VARIATIONAL.model_copy(update={"prior": "gaussian_mixture", "prior_components": 1})
    model = _silent(parameters)
    nn.init.constant_(model.log_variance.bias, math.log(9))  # every posterior is N(0, 9 I)
    prior = fitter(model, parameters).prior
    torch.testing.assert_close(prior.covariances[0], 9 * torch.eye(4), rtol=0, atol=9 * 5 * math.sqrt(2 / 997))
    torch.testing.assert_close(prior.means[0], torch.zeros(4), rtol=0, atol=3 * 5 / math.sqrt(997))


def test_a_matched_mixture_is_guided_by_the_encoder_and_by_the_guide(extractor, digits):
    parameters = VARIATIONAL.model_copy(update={"prior": "matched_mixture", "prior_components": 2})
    model, options = build(parameters, seed=4), {"seed": 0, "count": 200, "samples": 250}
    fitted = {
        name: Fitter(digits.train, **options, guide=guide)(model, wanted).prior
        for name, wanted, guide in (
            ("plain", parameters.model_copy(update={"prior": "gaussian_mixture"}), extractor),
            ("alone", parameters, None),
            ("guided", parameters, extractor),
        )
    }
    assert not torch.equal(fitted["plain"].means, fitted["alone"].means)
    assert not torch.equal(fitted["alone"].means, fitted["guided"].means)


def test_a_matched_mixture_has_a_temperature_of_its_own(digits):
    changes = {"prior": "matched_mixture", "prior_components": 2}
    model, fitter = _strong(FITTED), Fitter(digits.train, seed=0, count=200, samples=250)
    matched = fitter(model, FITTED.model_copy(update=changes))
    samples = matched.draw(matched.prior.sample(1_000, torch.Generator().manual_seed(3)))
    assert grey_share(samples) == pytest.approx(fitter.training_grey, rel=0.05)
    plain = fitter(model, FITTED.model_copy(update=changes | {"prior": "gaussian_mixture"}))
    assert matched.temperature != plain.temperature


def test_the_same_seed_fits_the_same_and_leaves_the_global_random_state_alone(fitter, digits):
    parameters = FITTED.model_copy(update={"prior": "gaussian_mixture"})
    first = fitter(_strong(parameters), parameters)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    again = fitter(_strong(parameters), parameters)
    _assert_same(again, first)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = Fitter(digits.train, seed=1, count=997, samples=250)(_strong(parameters), parameters)
    assert not torch.equal(other.prior.means, first.prior.means)


@pytest.mark.parametrize("prior", ["gaussian_mixture", "matched_mixture", "flow"])
def test_codes_that_are_not_finite_or_all_the_same_are_a_divergence(fitter, prior):
    parameters = PLAIN.model_copy(update={"prior": prior})
    broken = build(parameters, seed=4)
    nn.init.constant_(broken.mean.bias, math.nan)
    for model in (broken, _silent(parameters)):
        with pytest.raises(Diverged, match="not finite or all the same"):
            fitter(model, parameters)


def test_binary_pixels_are_seen_as_one_draw_and_grey_ones_as_they_are(digits):
    images = as_floats(digits.train.images[:20])
    assert as_seen(images, VARIATIONAL, seed=0) is images
    binary = VARIATIONAL.model_copy(update={"pixels": "binary"})
    draw = binarize(digits.train.images[:20], generator(0, Stream.SCORE, Scoring.BINARIZATION))
    assert torch.equal(as_seen(images, binary, seed=0), as_floats(draw))
    assert not torch.equal(as_seen(images, binary, seed=1), as_floats(draw))


def test_a_snapshot_stays_where_the_training_left_it():
    fitted = _fitted(0.5, epoch=3, scores={"mse": 0.1})
    before, kept = fitted.draw(LATENTS), fitted.snapshot()
    for weight in fitted.model.parameters():
        nn.init.zeros_(weight)
    assert torch.equal(kept.draw(LATENTS), before)
    assert not torch.equal(fitted.draw(LATENTS), before)
    assert (kept.temperature, kept.epoch, kept.scores) == (0.5, 3, {"mse": 0.1})


def test_a_file_brings_it_back(fitter):
    parameters = FITTED.model_copy(update={"prior": "gaussian_mixture"})
    fitted = fitter(_strong(parameters), parameters, 1.5)
    fitted.scores["mse"] = 0.25
    file = io.BytesIO()
    torch.save(fitted.state_dict(), file)
    file.seek(0)
    again = FittedModel.from_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again.draw(LATENTS), fitted.draw(LATENTS))
    _assert_same(again, fitted)
    assert not again.model.training


def test_what_is_saved_does_not_change_when_training_goes_on():
    fitted = _fitted()
    saved = fitted.state_dict()
    before = fitted.draw(LATENTS)
    for weight in fitted.model.parameters():
        nn.init.zeros_(weight)
    assert torch.equal(FittedModel.from_state_dict(saved).draw(LATENTS), before)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("parameters", {"latent_dim": 0}),
        ("parameters", VARIATIONAL.model_copy(update={"width": 5}).model_dump()),
        ("parameters", VARIATIONAL.model_copy(update={"latent_dim": 3}).model_dump()),
        ("model", {}),
        ("prior", {}),
        ("prior", standard_normal(5).state_dict()),
        ("prior", standard_normal(4).state_dict() | {"covariances": -torch.eye(4).unsqueeze(0)}),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", "warm"),
        ("temperature", None),
        ("epoch", "late"),
        ("scores", {"mse": "low"}),
    ],
)
def test_what_is_no_fitted_model_is_refused(part, value):
    with pytest.raises((KeyError, TypeError, ValueError, RuntimeError)):
        FittedModel.from_state_dict(_fitted().state_dict() | {part: value})


@pytest.mark.parametrize("missing", ["parameters", "model", "prior", "temperature", "epoch", "scores"])
def test_a_part_that_is_missing_is_named(missing):
    saved = _fitted().state_dict()
    del saved[missing]
    with pytest.raises(KeyError, match=missing):
        FittedModel.from_state_dict(saved)
