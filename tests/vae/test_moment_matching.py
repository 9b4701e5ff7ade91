"""A matched mixture against what it promises: the moments of its observers' features, and nothing else changed."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tuner.vae.distance import frechet_distance, moments
from tuner.vae.model import VAE, Builder
from tuner.vae.moment_matching import Observer, match
from tuner.vae.parameters import Parameters
from tuner.vae.prior import Prior, fit_mixture
from tuner.vae.shape import ImageShape

build = Builder(ImageShape(1, 28, 28))

LATENTS = 3


class Scale(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.factor * features


@pytest.fixture(scope="module")
def model() -> VAE:
    return build(Parameters(latent_dim=LATENTS, width=4), seed=1)


def _draw(model: VAE):
    return lambda latents: torch.sigmoid(model.decode(latents))


@pytest.fixture(scope="module")
def codes() -> torch.Tensor:
    """Two Gaussians."""
    noise = torch.randn(2_000, LATENTS, generator=torch.Generator().manual_seed(2))
    return noise + 3 * (torch.arange(2_000) % 2).unsqueeze(1)


@pytest.fixture(scope="module")
def images(model, codes) -> torch.Tensor:
    with torch.no_grad():
        return _draw(model)(codes)


@pytest.fixture(scope="module")
def mixture(codes) -> Prior:
    return fit_mixture(codes, components=2, seed=0)


def _distance(model: VAE, observer: Observer, latents: torch.Tensor, codes: torch.Tensor) -> float:
    with torch.no_grad():
        drawn, goal = (moments(observer(_draw(model)(points))) for points in (latents, codes))
    return frechet_distance(goal, drawn).item()


def test_a_displaced_mixture_comes_closer_in_the_features_of_every_observer(model, codes, images, mixture):
    pixels = nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), Scale(1_000))  # far larger numbers than the encoder's
    displaced = replace(mixture, means=mixture.means + 0.1, covariances=1.2 * mixture.covariances)
    matched = match(displaced, _draw(model), images, [model.features, pixels], 250, seed=3)
    for observer in (model.features, pixels):
        before, after = (
            _distance(model, observer, prior.sample_quasi_random(2_000, seed=4), codes)
            for prior in (displaced, matched)
        )
        assert after < before / 3


def test_groups_of_features_are_matched_too(model, codes, images, mixture):
    groups = nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), nn.Unflatten(1, (2, 8)))
    displaced = replace(mixture, means=mixture.means + 0.1, covariances=1.2 * mixture.covariances)
    matched = match(displaced, _draw(model), images, [groups], 250, seed=3)
    before, after = (
        _distance(model, groups, prior.sample_quasi_random(2_000, seed=4), codes) for prior in (displaced, matched)
    )
    assert after < before / 3


def test_weights_stay_and_components_stay_gaussians(model, images, mixture):
    matched = match(mixture, _draw(model), images, [model.features], 50, seed=3)
    assert torch.equal(matched.weights, mixture.weights)
    assert not torch.equal(matched.means, mixture.means)
    torch.testing.assert_close(matched.covariances, matched.covariances.mT)
    assert torch.linalg.eigvalsh(matched.covariances).min() > 0


def test_the_same_seed_gives_the_same_mixture_and_leaves_the_model_and_the_random_state_alone(model, images, mixture):
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (match(mixture, _draw(model), images, [model.features], 50, seed=3).state_dict() for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)
    assert all(weight.grad is None for weight in model.parameters())


def test_a_mixture_that_is_right_already_stays_where_it_is(model):
    """Codes of one Gaussian: its moments are those of the codes to sampling error, and stay so."""
    codes = torch.randn(4_000, LATENTS, generator=torch.Generator().manual_seed(5))
    fitted = fit_mixture(codes, components=1, seed=0)
    matched = match(fitted, _draw(model), _draw(model)(codes).detach(), [model.features], 250, seed=3)
    torch.testing.assert_close(matched.means, fitted.means, rtol=0, atol=0.02)
    torch.testing.assert_close(matched.covariances, fitted.covariances, rtol=0, atol=0.05)


def test_a_latent_that_all_codes_share_is_no_obstacle(model):
    codes = torch.randn(500, LATENTS, generator=torch.Generator().manual_seed(6))
    codes[:, 1] = 0.5
    fitted = fit_mixture(codes, components=2, seed=0)
    matched = match(fitted, _draw(model), _draw(model)(codes).detach(), [model.features], 50, seed=3)
    assert torch.isfinite(matched.sample(100, torch.Generator().manual_seed(7))).all()


def test_an_observer_that_sees_nothing_changes_nothing(model, images, mixture):
    displaced = replace(mixture, means=mixture.means + 0.1)
    blind = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), Scale(0))
    one, two = (
        match(displaced, _draw(model), images, seen, 50, seed=3) for seen in ([model.features], [model.features, blind])
    )
    assert torch.equal(one.means, two.means)
    assert torch.equal(one.covariances, two.covariances)
    assert not torch.equal(one.means, displaced.means)
