"""Scores that look at nearest neighbours: how much of the data samples cover, and whether they are copies.

Points are rows, (N, D) and (M, D): pixels, an extractor's features or latents. Distances are Euclidean. Training images
may be given as bytes, which are made numbers in [0, 1] a part at a time: all at once they may take more than there is.
"""

import torch
from torch import Tensor

from tuner.vae.data import as_floats

CHUNK, MOST = 1_000, 10_000  # points and references at a time


def nearest(points: Tensor, references: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and indices, (N, k) each and nearest first, of the k references nearest to each point."""
    parts = []
    for first in range(0, len(references), MOST):
        some = _numbers(references[first : first + MOST])
        found = [torch.cdist(part, some).topk(min(k, len(some)), largest=False) for part in points.split(CHUNK)]
        parts.append((torch.cat([part.values for part in found]), torch.cat([part.indices for part in found]) + first))
    distances, indices = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    if len(parts) == 1:
        return distances, indices
    distances, order = distances.topk(k, largest=False)
    return distances, indices.gather(1, order)


def _numbers(points: Tensor) -> Tensor:
    return as_floats(points) if points.dtype == torch.uint8 else points


def radii(points: Tensor, k: int) -> Tensor:
    """The distance (N,) from each point to its k-th nearest among the others."""
    return nearest(points, points, k + 1)[0][:, k]


def recall(real: Tensor, samples: Tensor, k: int = 5) -> float:
    """Share of real points within a sample's distance to its k-th nearest sample. Kynkaanniemi et al. 2019, eq. 2."""
    reach = radii(samples, k)
    inside = [(torch.cdist(part, samples) <= reach).any(1) for part in real.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


def coverage(real: Tensor, samples: Tensor, k: int = 5) -> float:
    """Share of real points with a sample nearer than their k-th nearest real point. Naeem et al. 2020, eq. 4."""
    return (nearest(real, samples, 1)[0][:, 0] < radii(real, k)).double().mean().item()


def copied(samples: Tensor, train: Tensor) -> float:
    """Share of samples closer to a training point than that point's own nearest: not authentic, Alaa et al. 2022.

    Held-out data has a share, too, which is what samples' is to be compared with.
    """
    distances, indices = nearest(samples, train, 1)
    closest, where = indices[:, 0].unique(return_inverse=True)
    own = nearest(_numbers(train[closest]), train, 2)[0][:, 1]
    return (distances[:, 0] < own[where]).double().mean().item()


def knn_accuracy(points: Tensor, labels: Tensor, references: Tensor, known: Tensor, k: int = 5) -> float:
    """Share of points (N, D) whose label (N,) is that of most of their k nearest references (M, D), labels (M,).

    A tie goes to the smaller label.
    """
    voted = known[nearest(points, references, k)[1]].mode(1).values
    return float((voted == labels).double().mean())
