"""Reconstruction and KL terms. Axes: B batch, C channels, H/W pixels, Z latent."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Diverged(ValueError):
    """The loss or a score of a trial is not finite."""


def squared_error(logits: Tensor, images: Tensor) -> Tensor:
    """Of sigmoid(logits), summed over pixels: logits and images (B, C, H, W) -> (B,).

    Up to constants this is twice the negative log-likelihood of a Gaussian decoder with unit variance.
    """
    return (torch.sigmoid(logits) - images).square().flatten(1).sum(1)


def bernoulli_nll(logits: Tensor, images: Tensor) -> Tensor:
    """Binary cross-entropy in nats, summed over pixels: logits and images (B, C, H, W) -> (B,)."""
    return F.binary_cross_entropy_with_logits(logits, images, reduction="none").flatten(1).sum(1)


RECONSTRUCTION = {"gaussian": squared_error, "bernoulli": bernoulli_nll}


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, I)) in nats: (B, Z) -> (B,). Kingma & Welling 2014, appendix B.

    expm1 keeps the digits of exp(v) - 1 - v near v = 0, where both are tiny.
    """
    return 0.5 * (mean.square() + torch.expm1(log_variance) - log_variance).sum(1)


def calibrated_distortion(mse: float, pixels: int) -> float:
    """-log p(x|z) in nats per image of a Gaussian decoder whose shared variance is fitted: sigma^2 = mse.

    `mse` is the mean squared error per pixel, `pixels` the numbers in an image. Rybkin et al. 2021, eq. 6 with the
    optimal sigma put in.
    """
    return pixels / 2 * (1 + math.log(2 * math.pi * mse)) if mse > 0 else -math.inf
