"""Move a fitted mixture until, to the model's own encoder, its samples look like what the model draws from real codes.

EM gives a mixture the density of the codes, and still its samples decode to other images than the codes do: likelihood
counts directions alike that the decoder hardly sees. So drawn images are compared, in the encoder's last hidden layer,
as generative moment matching networks compare them (Li, Swersky & Zemel 2015, section 4). No judge takes part.
"""

from dataclasses import replace

import torch
from torch import Tensor

from tuner.vae.distance import frechet_distance, moments
from tuner.vae.model import VAE
from tuner.vae.prior import Prior, Sampler, floor

STEPS, RATE = 25, 0.012  # twice as many, or as long ones, come no closer
BATCH = 500  # images at a time: their activations stay in the cache


def match(prior: Prior, model: VAE, latents: Tensor, count: int, seed: int) -> Prior:
    """Move means and covariances of a mixture, given codes `latents` (N, Z) of training images -> the moved one.

    Adam lowers the Frechet distance between the encoder's features of `count` samples, fresh at each step, and those
    of what is drawn from the codes. A component is moved and bent in units of its own covariance, so that it stays a
    Gaussian; its weight stays.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        goal = moments(_features(model, latents))
    start = Sampler(prior)
    shifts = torch.zeros_like(prior.means, requires_grad=True)
    bends = torch.zeros_like(prior.covariances, requires_grad=True)
    optimizer = torch.optim.Adam([shifts, bends], lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)

    def moved() -> tuple[Tensor, Tensor]:
        means = prior.means + (start.factors @ shifts.unsqueeze(2)).squeeze(2)
        return means, start.factors @ (torch.eye(means.shape[1]) + bends.tril())

    for _ in range(STEPS):
        noise = torch.randn(count, prior.means.shape[1], generator=generator)
        component = start.component(torch.rand(count, generator=generator))
        means, factors = moved()
        drawn = means[component] + (factors[component] @ noise.unsqueeze(2)).squeeze(2)
        loss = frechet_distance(goal, moments(_features(model, drawn)))
        shifts.grad, bends.grad = torch.autograd.grad(loss, [shifts, bends])  # and none of the model's
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        means, factors = moved()
        covariances = (factors.double() @ factors.mT.double()).float() + floor(latents).float()
        return replace(prior, means=means, covariances=covariances)


def _features(model: VAE, latents: Tensor) -> Tensor:
    return torch.cat([model.encoder(model.draw(part)) for part in latents.split(BATCH)])
