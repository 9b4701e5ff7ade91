"""Flows are invertible, know their volume, and fit what a mixture can't."""

import math

import pytest
import torch

from tuner.vae.flow import Flow
from tuner.vae.prior import Prior, fit_flow, fit_mixture


def _stirred(latent_dim: int = 5) -> Flow:
    """A flow whose every number is random."""
    generator = torch.Generator().manual_seed(1)
    flow = Flow(latent_dim, hidden=8).double().requires_grad_(False)
    for weight in (*flow.weights, *flow.biases):
        weight.copy_(torch.randn(weight.shape, generator=generator))
    flow.scale.copy_(torch.rand(latent_dim, generator=generator) + 0.5)
    flow.shift.copy_(torch.randn(latent_dim, generator=generator))
    return flow


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
def test_there_and_back_is_where_it_began(latent_dim):
    flow = _stirred(latent_dim)
    points = torch.randn(30, latent_dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    latents = flow(points)
    assert (latents - points).abs().max() > 0.1
    torch.testing.assert_close(flow.inverse(latents)[0], points)


def test_the_log_determinant_is_that_of_the_jacobian():
    flow = _stirred()
    latents = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for row, logdet in zip(latents, flow.inverse(latents)[1], strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: flow.inverse(x.unsqueeze(0))[0][0], row)
        assert logdet == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item())


def test_a_fresh_flow_only_scales_and_shifts():
    flow = Flow(3)
    flow.scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
    flow.shift.fill_(7)
    torch.testing.assert_close(flow(torch.ones(1, 3)), torch.tensor([[8.0, 9.0, 10.0]]))
    assert flow.inverse(torch.ones(1, 3))[1].item() == pytest.approx(-math.log(6))


@pytest.fixture(scope="module")
def banana() -> torch.Tensor:
    """Means (2000, 2) along a parabola; the noise is added by the fit."""
    x = torch.randn(2_000, generator=torch.Generator().manual_seed(4))
    return torch.stack([x, x.square()], 1)


NOISE = 0.1
STEPS = 500  # two latents are fitted sooner than thirty


@pytest.fixture(scope="module")
def bent(banana) -> Prior:
    return fit_flow(banana, torch.full_like(banana, NOISE), components=2, seed=0, steps=STEPS)


def test_a_bent_mixture_is_closer_to_a_curve_than_a_mixture_of_as_many(banana, bent):
    plain = fit_mixture(banana, components=2, seed=0)
    off = {}
    for name, fitted in (("plain", plain), ("bent", bent)):
        x, y = fitted.sample(4_000, torch.Generator().manual_seed(5)).T
        off[name] = (y - x.square()).square().mean().item()
    # Of true points: the noise of y, and that of x^2 under N(x, s^2), 4 x^2 s^2 + 3 s^4 with E x^2 = 1.
    true = NOISE**2 + 4 * NOISE**2 + 3 * NOISE**4
    assert off["bent"] < 2.5 * true
    assert off["plain"] > 4 * true


def test_a_bent_mixture_has_the_moments_of_the_latents(banana, bent):
    samples = bent.sample(20_000, torch.Generator().manual_seed(6))
    torch.testing.assert_close(samples.mean(0), banana.mean(0), rtol=0, atol=0.15)
    torch.testing.assert_close(torch.cov(samples.T), torch.cov(banana.T), rtol=0.2, atol=0.15)


def test_the_density_of_a_bent_mixture_integrates_to_one(bent):
    side = torch.linspace(-6, 18, 601)  # the noise is two and a half such steps wide
    grid = torch.cartesian_prod(torch.linspace(-6, 6, 301), side)
    assert bent.log_density(grid).exp().sum().item() * 0.04 * 0.04 == pytest.approx(1, abs=0.01)


def test_a_bent_mixture_comes_back_from_plain_arrays(bent):
    saved = {name: torch.from_numpy(tensor.numpy().copy()) for name, tensor in bent.state_dict().items()}
    again = Prior.from_state_dict(saved)
    drawn = [which.sample(50, torch.Generator().manual_seed(7)) for which in (bent, again)]
    assert torch.equal(*drawn)
    assert not any(weight.requires_grad for weight in saved.values())


def test_the_same_seed_fits_the_same_flow(banana):
    first, again, other = (
        fit_flow(banana, torch.full_like(banana, NOISE), components=2, seed=seed, steps=20).state_dict()
        for seed in (0, 0, 1)
    )
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(other["flow.weights.2"], first["flow.weights.2"])


def test_points_that_are_all_the_same_are_refused():
    with pytest.raises(ValueError, match="not finite or all the same"):
        fit_flow(torch.ones(50, 3), torch.zeros(50, 3), components=2, seed=0)
