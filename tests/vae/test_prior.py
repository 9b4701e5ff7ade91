"""Priors: samples have the moments they should, and a fit finds the mixture it was drawn from."""

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from tuner.vae.prior import Prior, expectation_maximization, fit_mixture, standard_normal

TWO = Prior(
    weights=torch.tensor([0.3, 0.7]),
    means=torch.tensor([[-4.0, 0.0], [4.0, 1.0]]),
    covariances=torch.tensor([[[1.0, 0.6], [0.6, 2.0]], [[0.5, -0.2], [-0.2, 0.3]]]),
)


def _draw(prior: Prior, count: int, seed: int = 0) -> torch.Tensor:
    return prior.sample(count, torch.Generator().manual_seed(seed))


def test_standard_normal_samples_have_mean_zero_and_unit_covariance():
    latents = _draw(standard_normal(4), 40_000)
    torch.testing.assert_close(latents.mean(0), torch.zeros(4), rtol=0, atol=5 / 200)  # 5 standard errors
    torch.testing.assert_close(torch.cov(latents.T), torch.eye(4), rtol=0, atol=5 * 2**0.5 / 200)


def test_sample_moments_are_those_of_the_mixture():
    latents = _draw(TWO, 40_000)
    mean = TWO.weights @ TWO.means
    second = TWO.covariances + torch.einsum("ki,kj->kij", TWO.means, TWO.means)
    covariance = torch.einsum("k,kij->ij", TWO.weights, second) - torch.outer(mean, mean)
    torch.testing.assert_close(latents.mean(0), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(latents.T), covariance, rtol=0.02, atol=0.06)


def test_quasi_random_samples_have_the_mixtures_moments_closer_than_independent_ones_can():
    latents = TWO.sample_quasi_random(4_096, seed=0)
    mean = TWO.weights @ TWO.means
    second = TWO.covariances + torch.einsum("ki,kj->kij", TWO.means, TWO.means)
    covariance = torch.einsum("k,kij->ij", TWO.weights, second) - torch.outer(mean, mean)
    standard_error = (covariance.diagonal() / 4_096).sqrt()
    assert bool(((latents.mean(0) - mean).abs() < standard_error / 5).all())
    torch.testing.assert_close(torch.cov(latents.T), covariance, rtol=0.005, atol=0.005)
    assert (latents[:, 0] > 0).sum().item() == pytest.approx(0.7 * 4_096, abs=2)  # the parts are six deviations apart
    assert torch.equal(latents, TWO.sample_quasi_random(4_096, seed=0))
    assert not torch.equal(latents, TWO.sample_quasi_random(4_096, seed=1))


def test_the_density_of_a_mixture_is_the_weighted_sum_of_scipys_gaussians():
    points = _draw(TWO, 50)
    parts = zip(TWO.weights.double(), TWO.means, TWO.covariances, strict=True)
    density = sum(
        weight * multivariate_normal.pdf(points.double(), mean.double(), covariance.double())
        for weight, mean, covariance in parts
    )
    torch.testing.assert_close(TWO.log_density(points), density.log())


def test_the_density_where_a_latent_is_not_a_number_is_none_either():
    points = torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [torch.inf, 0.0]])
    assert torch.isfinite(TWO.log_density(points)).tolist() == [True, False, False]


def test_samples_are_not_sorted_by_component():
    component = _draw(TWO, 10_000)[:, 0] > 0
    changes = (component[1:] != component[:-1]).double().mean().item()
    assert changes == pytest.approx(2 * 0.3 * 0.7, abs=0.03)


def test_the_same_generator_seed_gives_the_same_samples():
    assert torch.equal(_draw(TWO, 50, seed=3), _draw(TWO, 50, seed=3))
    assert not torch.equal(_draw(TWO, 50, seed=3), _draw(TWO, 50, seed=4))


def test_a_fit_recovers_a_known_mixture():
    fitted = fit_mixture(_draw(TWO, 8_000), components=2, seed=0)
    order = fitted.means[:, 0].argsort()
    torch.testing.assert_close(fitted.weights[order], TWO.weights, rtol=0, atol=0.03)
    torch.testing.assert_close(fitted.means[order], TWO.means, rtol=0, atol=0.15)
    torch.testing.assert_close(fitted.covariances[order], TWO.covariances, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("rounds", [1, 5])
def test_rounds_of_em_are_scikit_learns(rounds):
    points = torch.cat([_draw(TWO, 700), 3 + torch.randn(60, 2, generator=torch.Generator().manual_seed(1))]).double()
    begin = Prior(
        torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
        points[[0, 200, 710]],
        torch.stack([torch.eye(2, dtype=torch.float64) * scale for scale in (1.0, 2.0, 3.0)]),
    )
    reference = GaussianMixture(
        3,
        tol=0,
        reg_covar=1e-3,
        max_iter=rounds,
        weights_init=begin.weights.numpy(),
        means_init=begin.means.numpy(),
        precisions_init=np.linalg.inv(begin.covariances.numpy()),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        reference.fit(points.numpy())
    ours, likelihoods = begin, []
    for _ in range(rounds):
        ours, likelihood = expectation_maximization(points, ours, 1e-3 * torch.eye(2, dtype=torch.float64))
        likelihoods.append(likelihood)
    torch.testing.assert_close(ours.weights, torch.from_numpy(reference.weights_))
    torch.testing.assert_close(ours.means, torch.from_numpy(reference.means_))
    torch.testing.assert_close(ours.covariances, torch.from_numpy(reference.covariances_))
    assert likelihoods == sorted(likelihoods)
    assert likelihoods[-1] == pytest.approx(reference.lower_bound_)


def test_one_component_is_the_mean_and_covariance_of_the_points():
    latents = _draw(TWO, 500)
    fitted = fit_mixture(latents, components=1, seed=0)
    assert fitted.weights.tolist() == [1]
    torch.testing.assert_close(fitted.means[0], latents.mean(0))
    covariance = torch.from_numpy(np.cov(latents.double().T.numpy(), bias=True)).float()
    torch.testing.assert_close(fitted.covariances[0], covariance, rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_fit_whatever_the_global_generators_hold():
    latents = _draw(TWO, 500)
    first = fit_mixture(latents, components=5, seed=2**62 + 3)
    np.random.seed(1)
    torch.manual_seed(1)
    torch.testing.assert_close(
        fit_mixture(latents, components=5, seed=2**62 + 3).state_dict(), first.state_dict(), rtol=0, atol=0
    )


@pytest.mark.parametrize(("points", "components"), [(3, 1), (9, 1), (10, 2), (20, 4), (200, 10)])
def test_each_component_has_at_least_one_point_more_than_there_are_latents(points, components):
    latents = torch.randn(points, 4, generator=torch.Generator().manual_seed(0))
    assert len(fit_mixture(latents, components=10, seed=0).weights) == components


def test_latents_on_a_line_still_give_a_prior_that_can_be_sampled():
    along = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    latents = _draw(fit_mixture(along * direction, components=3, seed=0), 1_000)
    off_the_line = latents - latents @ direction.T / direction.square().sum() @ direction
    assert off_the_line.square().mean() < 1e-4 * latents.square().mean()


@pytest.mark.parametrize("value", [0.0, 0.1, torch.nan])
def test_collapsed_or_broken_latents_are_refused(value):
    with pytest.raises(ValueError, match="all the same"):
        fit_mixture(torch.full((50, 3), value), components=2, seed=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_single_number_that_is_not_finite_is_refused(value):
    latents = torch.randn(50, 3)
    latents[7, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        fit_mixture(latents, components=2, seed=0)
