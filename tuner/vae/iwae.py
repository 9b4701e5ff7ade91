"""The importance-weighted bound on the likelihood of a VAE with a Bernoulli decoder."""

import math

import torch
from torch import Tensor

from tuner.vae.losses import bernoulli_nll
from tuner.vae.model import Model
from tuner.vae.prior import Prior

BATCH = 250  # decoded at a time


@torch.no_grad()
def importance_weighted_bound(
    model: Model, prior: Prior, images: Tensor, samples: int, generator: torch.Generator
) -> Tensor:
    """A lower bound on log p(x) in nats for each image: (N, C, H, W) -> (N,). Burda et al. 2016, eq. 8.

    log of the mean over `samples` draws z from q(z|x) of p(x|z) p(z) / q(z|x), with p(z) the given prior's density.
    It rises with `samples` to log p(x); at one draw its mean is the ELBO.
    """
    model.eval()
    bounds = []
    for image in images.split(1):
        mean, log_variance = model.encode(image)
        assert log_variance is not None
        noise = torch.randn(samples, mean.shape[1], generator=generator).to(mean.device)
        latents = mean + torch.exp(0.5 * log_variance) * noise
        posterior = -0.5 * (noise.square() + log_variance + math.log(2 * math.pi)).sum(1)
        likelihood = -torch.cat(
            [bernoulli_nll(model.decode(part), image.expand(len(part), -1, -1, -1)) for part in latents.split(BATCH)]
        )
        weights = likelihood.double() + prior.log_density(latents) - posterior
        bounds.append(weights.logsumexp(0) - math.log(samples))
    return torch.stack(bounds)
