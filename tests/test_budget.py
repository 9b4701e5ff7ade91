"""Budgets: at which epochs trials are scored, and what a time limit can be."""

import pytest
from pydantic import ValidationError

from tuner.budget import Budget, EvenBudget
from tuner.spec import Spec


@pytest.mark.parametrize(
    ("grace", "factor", "most", "rungs"),
    [
        (1, 3, 9, (1, 3, 9)),
        (0.5, 2, 3, (0.5, 1, 2, 3)),
        (1, 3, 10, (1, 3, 9, 10)),
        (3, 3, 9, (1, 3, 9)),
        (3, 5, 9, (1, 3, 9)),
        (6, 3, 18, (1, 6, 18)),
        (2, 3, 2, (2,)),
        (0.1, 10, 0.9, (0.1, 0.9)),
        (2, 1.5, 5, (2, 3, 4.5, 5)),
    ],
)
def test_rungs_are_a_first_look_grace_times_powers_of_the_factor_and_the_end(grace, factor, most, rungs):
    budget = Budget(grace_epochs=grace, reduction_factor=factor, max_epochs=most)
    assert budget.rungs == pytest.approx(rungs)


@pytest.mark.parametrize(
    ("epochs", "rungs"),
    [
        (1, [1]),
        (4, [1, 2, 3, 4]),
        (10, range(1, 11)),
        (50, range(5, 51, 5)),
        (15, [2, 3, 4, 6, 8, 9, 10, 12, 14, 15]),  # halves go to the even one
        (1000, range(100, 1001, 100)),
    ],
)
def test_an_even_budget_has_ten_rungs_as_far_apart_as_whole_epochs_let_them_be(epochs, rungs):
    budget = EvenBudget(trials=2, max_epochs=epochs, grace_epochs=epochs)
    assert budget.rungs == tuple(map(float, rungs))
    assert all(type(rung) is float for rung in budget.rungs)


def test_rungs_are_floats_by_default_too():
    assert [type(rung) for rung in Budget().rungs] == [float] * 3


@pytest.mark.parametrize(
    ("written", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), (45, 45), ("45", 45), (None, None)]
)
def test_time_limits(written, seconds):
    assert Budget(time_limit=written).time_limit == seconds


@pytest.mark.parametrize("written", ["5d", "-5s", "soon", "", 0, -1, float("nan"), float("inf"), "1" * 400, [30], True])
def test_a_time_limit_that_is_none_is_refused(written):
    with pytest.raises(ValidationError, match=r"budget.time_limit"):
        Spec.model_validate({"space": {"latent_dim": {"choices": [4, 8]}}, "budget": {"time_limit": written}})
