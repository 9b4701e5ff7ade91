"""Standard errors of Frechet distances, over images and over draws alike, from random halves of each set.

The bootstrap is wrong here: it counts the variance of what is quadratic in the points, all of the noise where model and
images agree, three times, the jackknife twice (Efron & Stein 1981, "The jackknife estimate of variance"). The distances
of two halves have no point in common; minus their covariance over splits is the variance, without bias (Wang & Lindsay
2014, "Variance estimation of a general U-statistic with application to cross-validation").

Axes: N points, D features, G groups of features, R = 1 + 2 SPLITS replicates: the whole set, the halves, then in the
same order their complements. Halves have twice the bias of the whole set: of theirs, only the spread means something.
"""

import torch
from torch import Tensor

from tuner.vae.distance import Moments
from tuner.vae.metrics import gap_closed

SPLITS = 100
PAIRS = 100  # pairs of blocks of points, of each of which a half has one; as many splits: an error is known to 10 %
RIDGE = 1e-12  # of a covariance's trace: dead features have no Cholesky factor


def resampled(features: Tensor, seed: int) -> Moments:
    """Means and unbiased covariances of the whole set, of SPLITS random halves and of their complements, in float64.

    (N, D) -> (R, D) and (R, D, D); groups (N, G, D) -> (R, G, D) and (R, G, D, D). Which points are in which half
    depends on (`seed`, N) alone, so that errors of distances from the same points can be subtracted. A half gets one
    of each pair of blocks, whose sums are taken once. Raises ValueError for less than 4 points.
    """
    if len(features) < 4:
        raise ValueError(f"{len(features)} points; expected 4 or more, for two halves with a covariance each")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features), generator=generator)
    first = torch.randint(2, (SPLITS, PAIRS), generator=generator).double()
    half = torch.stack([first, 1 - first], 2).flatten(1)
    weights = torch.cat([torch.ones(1, 2 * PAIRS), half, 1 - half])  # (R, 2 PAIRS), 0 or 1

    def of_group(points: Tensor) -> Moments:
        points = points.double()
        centre = points.mean(0)  # else rounding of the squares would show where means are large
        blocks = (points - centre)[order].tensor_split(2 * PAIRS)
        counts = weights @ torch.tensor([len(block) for block in blocks], dtype=torch.float64)
        means = weights @ torch.stack([block.sum(0) for block in blocks]) / counts[:, None]
        squares = weights @ torch.stack([(block.mT @ block).flatten() for block in blocks])
        covariances = squares.view(-1, *points.shape[1:] * 2)
        covariances -= counts[:, None, None] * means[:, :, None] * means[:, None]
        return means + centre, covariances.div_(counts[:, None, None] - 1)

    if features.dim() == 2:
        return of_group(features)
    means, covariances = zip(*map(of_group, features.unbind(1)), strict=True)
    return torch.stack(means, 1), torch.stack(covariances, 1)


def distances(a: Moments, b: Moments) -> Tensor:
    """Frechet distances (R,), means over groups. One of a and b may be plain `moments`, of a set that is held fixed.

    As `frechet_distance`, but with a Cholesky factor L of C_a in place of its root, in a tenth of the time: C_a C_b has
    the eigenvalues of L^T C_b L.
    """
    if a[1].dim() == 4 or b[1].dim() == 4:  # a group at a time: packets are many and large
        groups = range(a[0].shape[-2])
        each = [distances(*((mean[..., g, :], cov[..., g, :, :]) for mean, cov in (a, b))) for g in groups]
        return torch.stack(each).mean(0)
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    trace_a, trace_b = (cov.diagonal(dim1=-2, dim2=-1).sum(-1) for cov in (cov_a, cov_b))
    ridge = (RIDGE * trace_a).clamp(min=torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(cov_a + ridge[..., None, None] * torch.eye(cov_a.shape[-1], dtype=torch.float64))
    cross = torch.linalg.eigvalsh(factor.mT @ cov_b @ factor).clamp(min=0).sqrt().sum(-1)
    found: Tensor = (mean_a - mean_b).square().sum(-1) + trace_a + trace_b - 2 * cross
    return found


def standard_error(replicates: Tensor) -> float:
    """Standard error of the whole sets' value, from replicates (R,) of a distance, or of a sum or difference of some.

    A ratio is no such sum, and halves have another mean: to first order, that of x / y is
    `standard_error(x - x[0] / y[0] * y) / y[0]`.
    """
    half, other = replicates[1:].chunk(2)
    odd, even = ((half - other) / 2).var(), ((half + other) / 2).var()
    # Minus their covariance. In expectation `odd` holds the quadratic variance twice, the linear once, so that it is
    # at most twice what is wanted; the difference alone is at times below zero.
    return torch.maximum(odd - even, odd / 2).sqrt().item()


def gap_closed_error(distance: Tensor, floor: Tensor, baseline: Tensor) -> float:
    """Standard error of the gap closed, to first order, of replicates (R,) each; noise in common cancels."""
    left = 1 - gap_closed(distance[0].item(), floor[0].item(), baseline[0].item())
    return standard_error(distance - floor - left * (baseline - floor)) / abs(baseline[0] - floor[0]).item()
