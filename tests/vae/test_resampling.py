"""Standard errors against closed forms, scipy's bootstrap and the spread of many simulated sets."""

from itertools import combinations

import numpy as np
import pytest
import scipy.stats
import torch

from tuner.vae.distance import frechet_distance, moments
from tuner.vae.resampling import SPLITS, distances, gap_closed_error, resampled, standard_error

MIXING = torch.randn(6, 6, generator=torch.Generator().manual_seed(100), dtype=torch.float64)


def _features(count: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    noise = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * noise @ MIXING + shift


def test_replicates_are_the_moments_of_the_whole_of_halves_and_of_their_complements():
    points = _features(6, 1)
    whole, *halves = zip(*resampled(points, seed=3), strict=True)
    torch.testing.assert_close(whole, moments(points))
    found = set()
    for split in range(SPLITS):
        chosen = next(
            index
            for index in combinations(range(6), 3)
            if torch.allclose(points[list(index)].mean(0), halves[split][0], rtol=0, atol=1e-12)
        )
        rest = [index for index in range(6) if index not in chosen]
        for half, replicate in ((list(chosen), split), (rest, SPLITS + split)):
            torch.testing.assert_close(halves[replicate], moments(points[half]))
        found.add(chosen)
    assert len(found) == 8  # one of each of three pairs


def test_halves_of_an_odd_number_differ_by_one_point():
    points = torch.eye(7, dtype=torch.float64)  # a mean is 1 / count where a point is in
    sizes = (1 / resampled(points, seed=0)[0][1:].amax(1)).round()
    assert set(sizes.tolist()) == {3, 4}
    assert (sizes[:SPLITS] + sizes[SPLITS:] == 7).all()


def test_the_same_points_are_chosen_by_seed_and_number_alone():
    a, b = _features(50, 1), _features(50, 2)
    chosen = resampled(torch.cat([a, b], 1), seed=5)[0]
    assert torch.equal(resampled(a, seed=5)[0], chosen[:, :6])
    assert torch.equal(resampled(b, seed=5)[0], chosen[:, 6:])
    assert not torch.allclose(resampled(a, seed=6)[0], chosen[:, :6])


def test_groups_are_resampled_each_by_itself_and_their_distances_averaged():
    a, b = (torch.stack([_features(60, seed) for seed in seeds], 1) for seeds in ((1, 2, 3), (5, 6, 7)))
    singles = [(resampled(x, 4), resampled(y, 4)) for x, y in zip(a.unbind(1), b.unbind(1), strict=True)]
    means, covariances = resampled(a, 4)
    assert torch.equal(means[:, 1], singles[1][0][0])
    assert torch.equal(covariances[:, 1], singles[1][0][1])
    expected = torch.stack([distances(x, y) for x, y in singles]).mean(0)
    assert torch.equal(distances((means, covariances), resampled(b, 4)), expected)


@pytest.mark.parametrize("groups", [(), (3,)])
def test_distances_are_the_frechet_distances_of_replicates_also_where_features_are_dead(groups):
    a, b = (_features(60, seed).view(60, *groups, -1).clone() for seed in (1, 2))
    a[..., 1] = b[..., 1] = 0
    if groups:
        a[:, 0] = 0  # as the packets of enlarged images
    stacked_a, stacked_b, plain_a, plain_b = resampled(a, 0), resampled(b, 0), moments(a), moments(b)
    both = [
        frechet_distance(x, y) for x, y in zip(zip(*stacked_a, strict=True), zip(*stacked_b, strict=True), strict=True)
    ]
    torch.testing.assert_close(distances(stacked_a, stacked_b), torch.stack(both), rtol=1e-5, atol=1e-5)
    fixed = [frechet_distance(x, plain_b) for x in zip(*stacked_a, strict=True)]
    torch.testing.assert_close(distances(stacked_a, plain_b), torch.stack(fixed), rtol=1e-5, atol=1e-5)
    fixed = [frechet_distance(plain_a, y) for y in zip(*stacked_b, strict=True)]
    torch.testing.assert_close(distances(plain_a, stacked_b), torch.stack(fixed), rtol=1e-5, atol=1e-5)


def test_a_shift_of_both_sets_changes_no_replicate():
    a, b = _features(60, 1), _features(60, 2, scale=1.5)
    here, there = (distances(resampled(a + shift, 0), resampled(b + shift, 0)) for shift in (0, 1e4))
    torch.testing.assert_close(here, there, rtol=1e-8, atol=0)


def test_standard_error_is_the_root_of_minus_the_covariance_of_halves_or_of_half_the_variance_of_differences():
    assert standard_error(torch.tensor([9.0, 1, 3, 3, 1])) == pytest.approx(2**0.5)
    assert standard_error(torch.tensor([9.0, 0, 2, 4, 0, 0, 0])) == pytest.approx(0.5**0.5)  # their covariance is 0
    assert standard_error(torch.full((5,), 7.0)) == 0


def test_standard_error_of_a_mean_is_the_deviation_over_the_root_of_the_count():
    points = torch.cat([_features(400, seed) for seed in range(10)], 1)
    means, _ = resampled(points, 1)
    ratios = [standard_error(mean) for mean in means.T] / (points.std(0) / 20).numpy()
    assert ratios.mean() == pytest.approx(1, abs=3 * 0.1 / 10**0.5)  # 7 % for 100 splits, 7 % for 100 pairs
    assert ratios.std() < 0.2


@pytest.mark.parametrize("shift", [0.0, 0.05, 1.0])
def test_variance_of_a_squared_mean_is_linear_and_quadratic_part(shift):
    """|m|^2 of N points of N(s, I) in D dimensions has the variance 4 D s^2 / N + 2 D / N^2."""
    draw = torch.Generator().manual_seed(2)
    sets = [torch.randn(200, 40, generator=draw, dtype=torch.float64) + shift for _ in range(40)]
    errors = [standard_error(resampled(points, seed)[0].square().sum(1)) for seed, points in enumerate(sets)]
    expected = (4 * 40 * shift**2 / 200 + 2 * 40 / 200**2) ** 0.5
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(expected, rel=0.15)  # the bootstrap is 73 % off for 0


def test_standard_error_is_that_of_scipys_bootstrap_where_sets_are_far_apart():
    a, b = _features(300, 1), _features(300, 2, shift=2.0, scale=1.5)
    error = standard_error(distances(resampled(a, 0), resampled(b, 0)))

    def statistic(first, second):
        return frechet_distance(moments(a[first]), moments(b[second])).item()

    reference = scipy.stats.bootstrap(
        (np.arange(300), np.arange(300)), statistic, n_resamples=400, vectorized=False, method="basic", rng=0
    )
    assert error == pytest.approx(reference.standard_error, rel=3 * 0.11)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (1.0, 1.5)])
def test_standard_errors_are_the_spread_over_sets(shift, scale):
    """Also of sets that are alike, whose distance is noise alone, and of the difference to such a distance."""

    draw = torch.Generator().manual_seed(4)

    def three():
        held_out, real, drawn = torch.randn(3, 200, 20, generator=draw, dtype=torch.float64)
        return held_out, real, drawn * scale + shift

    values = []
    for _ in range(600):
        held_out, real, drawn = map(moments, three())
        values.append([frechet_distance(held_out, x).item() for x in (drawn, real)])
    spread = [*np.std(values, 0, ddof=1), np.diff(values).std(ddof=1)]
    errors = []
    for seed in range(40):
        held_out, real, drawn = (resampled(x, seed) for x in three())
        distance, floor = distances(held_out, drawn), distances(held_out, real)
        errors.append([standard_error(x) for x in (distance, floor, distance - floor)])
    # an error varies by a quarter at most, the mean of 40 by 4 %, the spread of 600 by 3 %: 3 of both, together
    assert np.sqrt(np.square(errors).mean(0)) / spread == pytest.approx(1, abs=0.15)


def test_gap_closed_error_leaves_out_what_is_common_and_is_in_units_of_the_gap():
    replicates, noise = _features(1 + 2 * SPLITS, 1)[:, 0], _features(1 + 2 * SPLITS, 2)[:, 0]
    floor, baseline = torch.full_like(noise, 3.0), torch.full_like(noise, 23.0)
    assert gap_closed_error(replicates, floor, baseline) == pytest.approx(standard_error(replicates) / 20)
    assert gap_closed_error(5 + noise, floor + noise, baseline + noise) == pytest.approx(0, abs=1e-12)


def test_gap_closed_error_is_to_first_order_whatever_bias_halves_have():
    """By the derivatives of 1 - (d - f) / (b - f) at d 8, f 3 and b 23: -1/20, 15/400 and 5/400."""
    noise = [1e-3 * _features(1 + 2 * SPLITS, seed)[:, 0] for seed in (1, 2, 3)]
    for part in noise:
        part[0] = 0
    error = gap_closed_error(*(value + part for value, part in zip((8, 3, 23), noise, strict=True)))
    assert error == pytest.approx(standard_error(-noise[0] / 20 + noise[1] * 15 / 400 + noise[2] * 5 / 400))
    bias = torch.ones(1 + 2 * SPLITS, dtype=torch.float64)
    bias[0] = 0
    biased = [value + part + value * bias for value, part in zip((8, 3, 23), noise, strict=True)]
    assert gap_closed_error(*biased) == pytest.approx(error)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 2)])
def test_too_few_points_have_no_halves(shape):
    with pytest.raises(ValueError, match="3 points; expected 4 or more"):
        resampled(torch.zeros(shape), 0)
    assert resampled(torch.zeros(4, *shape[1:]), 0)[1].isfinite().all()
