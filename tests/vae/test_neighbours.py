"""Nearest-neighbour yardsticks against brute force and cases that can be counted by hand."""

import pytest
import torch

from tuner.vae.neighbours import copied, coverage, knn_accuracy, nearest, radii, recall


def _points(count: int, seed: int, width: int = 3) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def _line(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


@pytest.mark.parametrize(("ours", "theirs"), [(1_200, 70), (40, 10_300)])
def test_nearest_is_what_brute_force_finds(ours, theirs):
    points, references = _points(ours, 0), _points(theirs, 1)  # more than one chunk
    distances, indices = nearest(points, references, 4)
    everything = (points.unsqueeze(1) - references).square().sum(2).sqrt()
    expected, order = everything.sort(1)
    torch.testing.assert_close(distances, expected[:, :4], rtol=1e-4, atol=1e-5)
    assert (indices == order[:, :4]).double().mean() > 0.999


def test_bytes_are_numbers_from_0_to_1():
    references = torch.randint(256, (10_300, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    points = references[[4, 10_200]].float() / 255
    distances, indices = nearest(points, references, 3)
    assert indices[:, 0].tolist() == [4, 10_200]
    torch.testing.assert_close((distances, indices), nearest(points, references.float() / 255, 3))
    assert copied(points, references) == 1


def test_a_radius_leaves_out_the_point_itself():
    assert radii(_line(0, 1, 3, 7), 1).tolist() == pytest.approx([1, 1, 2, 4])
    assert radii(_line(0, 1, 3, 7), 2).tolist() == pytest.approx([3, 2, 3, 6])


def test_recall_counts_real_points_within_reach_of_a_sample():
    samples = _line(0, 1, 2)  # each reaches 1 with k = 1
    assert recall(_line(-2, -1, 0.5, 3, 3.5), samples, 1) == pytest.approx(3 / 5)


def test_coverage_counts_real_points_with_a_sample_in_their_neighbourhood():
    real = _line(0, 1, 3, 7)  # neighbourhoods of 1, 1, 2 and 4
    assert coverage(real, _line(0.5), 1) == pytest.approx(2 / 4)
    assert coverage(real, _line(0.5, 4, 10), 1) == 1
    assert coverage(real, _line(-2, 8), 1) == pytest.approx(1 / 4)


def test_draws_from_one_distribution_cover_each_other():
    real, samples = _points(2_000, 0), _points(2_000, 1)
    # A real point's 5 nearest real points and its nearest sample are 6 of 12 neighbours in random order, about:
    # no sample is among the first five with probability 1/2^5.
    assert coverage(real, samples, 5) == pytest.approx(1 - 2**-5, abs=0.015)
    assert recall(real, samples, 5) > 0.95


def test_samples_of_half_the_data_cover_half_of_it():
    real, samples = _points(2_000, 0, width=1), _points(2_000, 1, width=1).abs()
    assert coverage(real, samples, 5) == pytest.approx(0.5, abs=0.03)
    assert recall(real, samples, 5) == pytest.approx(0.5, abs=0.03)


def test_copied_counts_samples_nearer_than_the_nearest_training_neighbour():
    train = _line(0, 1, 10)  # own nearest neighbours at 1, 1 and 9
    assert copied(_line(0.1, 2.5, 15, 30, 1.9), train) == pytest.approx(3 / 5)


def test_copies_are_copied_and_held_out_points_have_one_share():
    train, held_out = _points(3_000, 0), _points(3_000, 1)
    assert copied(train[:100] + 1e-3, train) > 0.95
    again = copied(_points(3_000, 2), train)
    assert copied(held_out, train) == pytest.approx(again, abs=0.04)


def test_neighbours_vote_for_a_label():
    references, known = _line(0, 0.1, 0.2, 5, 5.1, 5.2), torch.tensor([3, 3, 4, 7, 7, 3])
    labels = torch.tensor([3, 7, 4])
    assert knn_accuracy(_line(0.05, 5.05, 0.3), labels, references, known, 3) == pytest.approx(2 / 3)


def test_a_tie_goes_to_the_smaller_label_and_there_can_be_any_number_of_labels():
    references, known = _line(0, 0.1, 0.2, 0.3), torch.tensor([40_000, 2, 40_000, 2])
    assert knn_accuracy(_line(0.15), torch.tensor([2]), references, known, 4) == 1
    assert knn_accuracy(_line(0.1), torch.tensor([40_000]), references, known, 3) == 1
