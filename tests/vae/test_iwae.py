"""The importance-weighted bound against an integral that can be done on a grid."""

import math

import pytest
import torch

from tuner.vae.iwae import importance_weighted_bound
from tuner.vae.losses import bernoulli_nll, kl_divergence
from tuner.vae.model import Model
from tuner.vae.prior import Prior, standard_normal

MOVED = torch.zeros(1, 784)
MOVED[:, :5] = 0.8
BIAS = 2 * torch.rand(784, generator=torch.Generator().manual_seed(3)) - 1
BENT = Prior(torch.tensor([0.4, 0.6]), torch.tensor([[-1.0], [1.5]]), torch.tensor([[[0.5]], [[0.2]]]))


class _Few(Model):
    """One latent, which moves the logits of a few pixels, and a posterior that is wide."""

    latent_dim = 1

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.heads = 0.02 * torch.randn(784, 2, generator=generator)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = (images.flatten(1) @ self.heads).split(1, 1)
        return mean, log_variance + 0.5

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents @ MOVED + BIAS).unflatten(1, (1, 28, 28))


@pytest.fixture(scope="module")
def model() -> Model:
    return _Few()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return (torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)) < 0.5).float()


@torch.no_grad()
def _log_likelihood(model: Model, prior: Prior, image: torch.Tensor) -> float:
    grid = torch.linspace(-9, 9, 4_001).unsqueeze(1)
    joint = prior.log_density(grid) - bernoulli_nll(model.decode(grid), image.expand(len(grid), 1, 28, 28))
    return (joint.logsumexp(0) + math.log(18 / 4_000)).item()


@pytest.mark.parametrize("prior", [standard_normal(1), BENT], ids=["standard normal", "mixture"])
def test_with_many_draws_it_is_the_likelihood(model, images, prior):
    bounds = importance_weighted_bound(model, prior, images, 20_000, torch.Generator().manual_seed(1))
    expected = [_log_likelihood(model, prior, image) for image in images]
    assert bounds.tolist() == pytest.approx(expected, abs=0.05)


@torch.no_grad()
def test_with_one_draw_its_mean_is_the_elbo(model, images):
    draws = [
        importance_weighted_bound(model, standard_normal(1), images, 1, torch.Generator().manual_seed(seed))
        for seed in range(1_000)
    ]
    mean, log_variance = model.encode(images)
    points = mean + (0.5 * log_variance).exp() * torch.linspace(-6, 6, 601)  # (3, 601)
    weights = torch.softmax(-0.5 * torch.linspace(-6, 6, 601) ** 2, 0)
    expected = [
        -(weights @ bernoulli_nll(model.decode(row.unsqueeze(1)), image.expand(601, 1, 28, 28))).item() - kl.item()
        for row, image, kl in zip(points, images, kl_divergence(mean, log_variance), strict=True)
    ]
    assert torch.stack(draws).mean(0).tolist() == pytest.approx(expected, abs=0.15)


def test_more_draws_are_tighter(model, images):
    one, many = (
        importance_weighted_bound(model, BENT, images, samples, torch.Generator().manual_seed(2)).mean()
        for samples in (1, 500)
    )
    assert many > one
