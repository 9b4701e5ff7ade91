"""Distances between two sets of features, in float64. Axes: N and M points, D features, G groups of features.

Groups are compared each by itself; the distance is the mean over them.
"""

import torch
from torch import Tensor

Moments = tuple[Tensor, Tensor]  # mean (D,) and covariance (D, D), or of groups (G, D) and (G, D, D)


def moments(features: Tensor) -> Moments:
    """Mean and unbiased covariance of features (N, D), or of each group of (N, G, D)."""
    if features.dim() == 3:
        means, covariances = zip(*map(moments, features.unbind(1)), strict=True)
        return torch.stack(means), torch.stack(covariances)
    points = features.double()
    return points.mean(0), points.mT.cov().reshape(2 * points.shape[1:])  # of a single feature it gives a number


def frechet_distance(a: Moments, b: Moments) -> Tensor:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two Gaussians: a number. Heusel et al. 2017, eq. 6.

    The trace of the root is taken from the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric. Can be
    differentiated by b.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    if mean_a.dim() == 2:
        groups = zip(mean_a, cov_a, mean_b, cov_b, strict=True)
        return torch.stack([frechet_distance((m_a, c_a), (m_b, c_b)) for m_a, c_a, m_b, c_b in groups]).mean()
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    squares = torch.linalg.eigvalsh(root @ cov_b @ root)
    cross = squares[squares > 0].sqrt().sum()  # what rounding has put below zero has no root and no slope
    distance: Tensor = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD of features (N, D) and (M, D), kernel (x.y / D + 1)^3. Binkowski et al. 2018, eq. 4."""
    if a.dim() == 3:
        groups = list(map(kernel_distance, a.unbind(1), b.unbind(1)))
        return sum(groups) / len(groups)
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal_mean(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return (off_diagonal_mean(kernel(a, a)) + off_diagonal_mean(kernel(b, b)) - 2 * kernel(a, b).mean()).item()
