"""Losses against closed forms and torch.distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Normal
from torch.distributions import kl_divergence as reference_kl

from tuner.vae.losses import RECONSTRUCTION, bernoulli_nll, calibrated_distortion, kl_divergence, squared_error

PIXELS = 28 * 28


def _reference(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    mean, log_variance = mean.double(), log_variance.double()
    posterior = Normal(mean, torch.exp(0.5 * log_variance))
    return reference_kl(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1)


def test_kl_of_the_prior_is_zero():
    assert kl_divergence(torch.zeros(3, 5), torch.zeros(3, 5)).tolist() == [0, 0, 0]


def test_kl_of_one_mean_at_one_is_a_half():
    mean = torch.zeros(2, 5)
    mean[1, 3] = 1
    assert kl_divergence(mean, torch.zeros(2, 5)).tolist() == [0, 0.5]


def test_kl_of_a_doubled_variance_is_in_closed_form():
    log_variance = torch.full((1, 4), math.log(2.0))
    assert kl_divergence(torch.zeros(1, 4), log_variance).item() == pytest.approx(4 * (1 - math.log(2)) / 2, rel=1e-6)


@pytest.mark.parametrize("log_variance", [-30.0, -10.0, -1.0, 1e-2, 1.0, 10.0])
def test_kl_equals_torch_distributions(log_variance):
    mean = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    spread = torch.full((6, 7), log_variance)
    torch.testing.assert_close(kl_divergence(mean, spread).double(), _reference(mean, spread), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tiny", [1e-3, -1e-3, 1e-4, -1e-4])
def test_kl_near_zero_keeps_its_digits_in_single_precision(tiny):
    zero = torch.zeros(1, 1)
    assert kl_divergence(zero, zero + tiny).item() == pytest.approx(tiny**2 / 4, rel=2e-3)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.floats(-5, 5, width=32, allow_subnormal=False), st.floats(-20, 10, width=32, allow_subnormal=False)
        ),
        min_size=1,
        max_size=8,
    )
)
def test_kl_is_never_negative(latents):
    mean, log_variance = torch.tensor(latents).T.unsqueeze(1).unbind(0)
    assert kl_divergence(mean, log_variance).item() >= 0


def test_kl_gradient_of_the_mean_is_the_mean_and_of_the_log_variance_half_expm1():
    mean = torch.tensor([[0.5, -2.0]], requires_grad=True)
    log_variance = torch.tensor([[1.0, -30.0]], requires_grad=True)
    kl_divergence(mean, log_variance).sum().backward()
    torch.testing.assert_close(mean.grad, mean.detach())
    torch.testing.assert_close(log_variance.grad, torch.tensor([[(math.e - 1) / 2, -0.5]]))


def test_squared_error_sums_over_the_pixels_of_each_image():
    images = torch.zeros(3, 1, 28, 28)
    images[1] = 1
    images[2] = 0.5
    expected = torch.tensor([PIXELS / 4, PIXELS / 4, 0])  # sigmoid(0) = 0.5
    torch.testing.assert_close(squared_error(torch.zeros_like(images), images), expected)


def test_squared_error_is_twice_the_unit_gaussian_nll_less_its_constant():
    generator = torch.Generator().manual_seed(1)
    logits, images = torch.randn(4, 1, 28, 28, generator=generator), torch.rand(4, 1, 28, 28, generator=generator)
    nll = -Normal(torch.sigmoid(logits), 1.0).log_prob(images).flatten(1).sum(1)
    expected = 2 * (nll - PIXELS / 2 * math.log(2 * math.pi))
    torch.testing.assert_close(squared_error(logits, images), expected, rtol=1e-5, atol=1e-3)


def test_bernoulli_nll_of_logit_zero_is_log_two_a_pixel():
    images = torch.rand(2, 1, 28, 28)
    nll = bernoulli_nll(torch.zeros_like(images), images)
    torch.testing.assert_close(nll, torch.full((2,), PIXELS * math.log(2)))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_bernoulli_nll_equals_torch_distributions(scale):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 1, 28, 28, generator=generator) * scale
    images = torch.rand(5, 1, 28, 28, generator=generator).round()
    expected = -Bernoulli(logits=logits.double()).log_prob(images.double()).flatten(1).sum(1)
    torch.testing.assert_close(bernoulli_nll(logits, images).double(), expected, rtol=1e-5, atol=1e-3)


def test_each_likelihood_has_its_loss():
    assert {"gaussian": squared_error, "bernoulli": bernoulli_nll} == RECONSTRUCTION


def test_calibrated_distortion_is_the_gaussian_nll_with_the_fitted_variance():
    generator = torch.Generator().manual_seed(3)
    images, drawn = torch.rand(2, 20, 1, 28, 28, generator=generator, dtype=torch.float64)
    mse = (images - drawn).square().mean()
    expected = -Normal(drawn, mse.sqrt()).log_prob(images).flatten(1).sum(1).mean().item()
    assert calibrated_distortion(mse.item(), PIXELS) == pytest.approx(expected, rel=1e-12)


def test_an_image_of_twice_the_pixels_has_twice_the_distortion():
    assert calibrated_distortion(0.02, 2 * PIXELS) == pytest.approx(2 * calibrated_distortion(0.02, PIXELS))


def test_no_other_variance_beats_the_fitted_one():
    mse = 0.02
    others = [PIXELS / 2 * (math.log(2 * math.pi * v) + mse / v) for v in (0.01, 0.019, 0.021, 0.04)]
    assert calibrated_distortion(mse, PIXELS) < min(others)


def test_a_perfect_reconstruction_has_no_finite_distortion():
    assert calibrated_distortion(0.0, PIXELS) == -math.inf
