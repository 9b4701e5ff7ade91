"""Move a fitted mixture until what the model draws from it looks like training images.

EM gives a mixture the density of the codes, and still its samples decode to other images than the codes do: likelihood
counts directions alike that the decoder hardly sees. So images are compared, in the last hidden layer of networks that
see what matters in them, as generative moment matching networks do (Li, Swersky & Zemel 2015, section 4).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tuner.vae.distance import Moments, frechet_distance, moments
from tuner.vae.prior import Prior, Sampler, least_covariance, quasi_random_noise

Observer = Callable[[Tensor], Tensor]  # images (B, C, H, W) in [0, 1] -> features (B, D)

STEPS, RATE = 80, 0.012  # samples twice as many come no closer
BATCH = 500  # images at a time: their activations stay in the cache


def match(
    prior: Prior,
    draw: Callable[[Tensor], Tensor],
    images: Tensor,
    observers: Sequence[Observer],
    count: int,
    seed: int,
) -> Prior:
    """Move means and covariances of a mixture until its samples look like `images` (N, C, H, W) -> the moved one.

    `draw` makes images of latents (B, Z), and can be differentiated as the observers can. Adam lowers the Frechet
    distance between their features of `count` samples, fresh and even at each step, and those of the images, summed
    over the observers, each in units of where it begins. A component is moved and bent in units of its own covariance,
    so that it stays a Gaussian; its weight stays.
    """
    with torch.no_grad():
        goals = _seen(images.split(BATCH), observers)
    start = Sampler(prior)
    shifts = torch.zeros_like(prior.means, requires_grad=True)
    bends = torch.zeros_like(prior.covariances, requires_grad=True)
    optimizer = torch.optim.Adam([shifts, bends], lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    units: Tensor | None = None
    noises, uniforms = quasi_random_noise(STEPS * count, prior.means.shape[1], seed)
    for noise, uniform in zip(noises.split(count), uniforms.split(count), strict=True):
        component = start.component(uniform.to(shifts.device))
        means, factors = _moved(start, shifts, bends)
        drawn = means[component] + (factors[component] @ noise.to(shifts.device).unsqueeze(2)).squeeze(2)
        seen = _seen(map(draw, drawn.split(BATCH)), observers)
        distances = torch.stack([frechet_distance(goal, now) for goal, now in zip(goals, seen, strict=True)])
        units = distances.detach().clamp(min=torch.finfo(distances.dtype).tiny) if units is None else units
        shifts.grad, bends.grad = torch.autograd.grad((distances / units).sum(), [shifts, bends])  # and no network's
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        means, factors = _moved(start, shifts, bends)
        covariances = (factors.double() @ factors.mT.double() + least_covariance(drawn)).float()
        return replace(prior, means=means, covariances=covariances)


def _moved(start: Sampler, shifts: Tensor, bends: Tensor) -> tuple[Tensor, Tensor]:
    """Means (K, Z) and factors (K, Z, Z) of the covariances."""
    means = start.means + (start.factors @ shifts.unsqueeze(2)).squeeze(2)
    return means, start.factors @ (torch.eye(means.shape[1], device=means.device) + bends.tril())


def _seen(batches: Iterable[Tensor], observers: Sequence[Observer]) -> list[Moments]:
    """The moments of what each observer makes of batches of images."""
    parts = [[observer(batch) for observer in observers] for batch in batches]
    return [moments(torch.cat(features)) for features in zip(*parts, strict=True)]
