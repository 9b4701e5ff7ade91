"""Distances of features against closed forms, torchmetrics and scipy."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from tuner.vae.distance import frechet_distance, kernel_distance, moments


class _Features(nn.Module):
    """What torchmetrics calls a feature network: here the features themselves."""

    num_features = 6

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def _features(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64) @ mixing + shift


def test_moments_are_the_mean_and_the_unbiased_covariance():
    mean, covariance = moments(torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]]))
    assert mean.tolist() == [3, 2]
    assert covariance.tolist() == [[4, 6], [6, 12]]


def test_frechet_distance_equals_torchmetrics():
    a, b = _features(300, 1), _features(200, 2, shift=0.5)
    reference = FrechetInceptionDistance(feature=_Features()).set_dtype(torch.float64)
    reference.update(a, real=True)
    reference.update(b, real=False)
    assert frechet_distance(moments(a), moments(b)).item() == pytest.approx(reference.compute().item(), rel=1e-6)


def test_frechet_distance_of_a_single_feature_is_that_of_means_and_deviations():
    a, b = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([[0.0], [1.0]])
    (mean, covariance) = moments(a)
    assert (mean.tolist(), covariance.tolist()) == ([3], [[4]])
    assert frechet_distance(moments(a), moments(b)).item() == pytest.approx((3 - 0.5) ** 2 + (2 - 0.5**0.5) ** 2)


def test_frechet_distance_equals_the_formula_with_scipys_matrix_root():
    (mean_a, cov_a), (mean_b, cov_b) = moments(_features(300, 3)), moments(_features(200, 4, shift=1.0))
    root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).real
    expected = ((mean_a - mean_b) ** 2).sum() + torch.trace(cov_a + cov_b) - 2 * np.trace(root)
    assert frechet_distance((mean_a, cov_a), (mean_b, cov_b)).item() == pytest.approx(expected.item(), rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(*[st.floats(-9, 9, allow_subnormal=False)] * 2, *[st.floats(0, 9, allow_subnormal=False)] * 2),
        min_size=1,
        max_size=5,
    )
)
def test_frechet_distance_of_diagonal_gaussians_is_the_distance_of_means_and_deviations(axes):
    mean_a, mean_b, deviation_a, deviation_b = torch.tensor(axes, dtype=torch.float64).T
    expected = ((mean_a - mean_b) ** 2 + (deviation_a - deviation_b) ** 2).sum().item()
    distance = frechet_distance((mean_a, deviation_a.square().diag()), (mean_b, deviation_b.square().diag()))
    assert distance.item() == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_frechet_distance_of_a_set_to_itself_is_zero_also_where_features_are_dead():
    features = _features(50, 5)
    features[:, 2] = 0
    features[:, 3] = features[:, 4]
    assert frechet_distance(moments(features), moments(features)).item() == pytest.approx(0, abs=1e-6)


def test_frechet_distance_is_symmetric():
    a, b = moments(_features(60, 6)), moments(_features(70, 7))
    assert frechet_distance(a, b).item() == pytest.approx(frechet_distance(b, a).item(), rel=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kernel_distance_equals_torchmetrics():
    a, b = _features(80, 1), _features(80, 2, shift=0.5)
    reference = KernelInceptionDistance(feature=_Features(), subsets=1, subset_size=80)  # gamma 1/D, coef 1, degree 3
    reference.update(a, real=True)
    reference.update(b, real=False)
    assert kernel_distance(a, b) == pytest.approx(reference.compute()[0].item(), rel=1e-9)


def test_kernel_distance_of_unequal_counts_is_the_sum_over_pairs():
    a, b = _features(7, 1).numpy(), _features(4, 2).numpy()

    def k(x, y):
        return (x @ y / 6 + 1) ** 3

    def within(points):
        return np.mean([k(x, y) for i, x in enumerate(points) for j, y in enumerate(points) if i != j])

    expected = within(a) + within(b) - 2 * np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_the_same_distribution_averages_to_zero():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, 2, 20, 4, generator=generator)
    distances = np.array([kernel_distance(a, b) for a, b in draws])
    assert abs(distances.mean()) < 3 * distances.std() / math.sqrt(len(distances))
    assert (distances < 0).any()
    assert (distances > 0).any()


def test_kernel_distance_of_two_points_is_in_closed_form():
    a, b = torch.tensor([[2.0], [2.0]]), torch.tensor([[-1.0], [-1.0]])
    assert kernel_distance(a, b) == 5**3 + 2**3 - 2 * (-1) ** 3


def test_frechet_distance_has_the_gradient_of_its_formula_also_where_features_are_dead():
    goal, features = _features(50, 8), _features(40, 9)
    goal[:, 2] = features[:, 2] = 0
    goal = moments(goal)
    features.requires_grad_()
    frechet_distance(goal, moments(features)).backward()
    step = torch.zeros_like(features)
    step[3, 1] = 1e-5
    ahead, behind = (frechet_distance(goal, moments(features.detach() + side * step)) for side in (1, -1))
    assert features.grad[3, 1].item() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-6)


def test_groups_are_compared_each_by_itself_and_their_distances_averaged():
    a = torch.stack([_features(300, seed) for seed in (1, 2, 3)], 1)
    b = torch.stack([_features(200, seed) for seed in (5, 6, 7)], 1)
    singles = [frechet_distance(moments(x), moments(y)).item() for x, y in zip(a.unbind(1), b.unbind(1), strict=True)]
    assert frechet_distance(moments(a), moments(b)).item() == pytest.approx(np.mean(singles), rel=1e-12)
    kernels = [kernel_distance(x, y) for x, y in zip(a.unbind(1), b.unbind(1), strict=True)]
    assert kernel_distance(a, b) == pytest.approx(np.mean(kernels), rel=1e-12)


def test_one_group_alone_is_as_no_group():
    a, b = _features(300, 1), _features(200, 2)
    assert torch.equal(
        frechet_distance(moments(a.unsqueeze(1)), moments(b.unsqueeze(1))), frechet_distance(moments(a), moments(b))
    )


def test_the_distance_of_groups_has_a_gradient():
    goal = moments(_features(50, 8).unflatten(1, (2, 3)))
    features = _features(40, 9).unflatten(1, (2, 3)).requires_grad_()
    frechet_distance(goal, moments(features)).backward()
    step = torch.zeros_like(features)
    step[3, 1, 2] = 1e-5
    ahead, behind = (frechet_distance(goal, moments(features.detach() + side * step)) for side in (1, -1))
    assert features.grad[3, 1, 2].item() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-6)
