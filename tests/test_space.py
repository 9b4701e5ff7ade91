"""Ranges and choices: what is drawn from them, what is refused, and how near a value is to an end."""

import math
from typing import Any

import optuna
import pytest
import yaml
from optuna.samplers import RandomSampler
from pydantic import ValidationError
from spec_file import written

from tuner import spec as specs
from tuner.space import FloatRange, IntRange
from tuner.spec import Spec
from tuner.study import distributions


def _spec(**parts: Any) -> Spec:
    return Spec.model_validate({"space": {"latent_dim": {"type": "int", "low": 4, "high": 32}}, **parts})


def _drawn(entry: dict[str, Any], name: str, asks: int = 60) -> list[Any]:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    space = distributions(_spec(space={name: entry}))
    return [study.ask(space).params[name] for _ in range(asks)]


@pytest.mark.parametrize(
    ("entry", "ends"),
    [
        (FloatRange(type="float", low=0, high=100), {0: "low", 4.9: "low", 5.1: None, 94.9: None, 95.1: "high"}),
        (
            FloatRange(type="float", low=0.01, high=1, log=True),  # a twentieth is a factor of 10 ** 0.1
            {0.01: "low", 0.0125: "low", 0.0127: None, 0.1: None, 0.79: None, 0.8: "high", 1: "high"},
        ),
        (IntRange(type="int", low=4, high=32, log=True), {4: "low", 5: None, 28: None, 29: "high", 32: "high"}),
        (IntRange(type="int", low=4, high=4), {4: None}),
        (FloatRange(type="float", low=0.5, high=0.5), {0.5: None}),
        # the baseline's may lie outside
        (IntRange(type="int", low=17, high=32), {16: "low"}),
        (IntRange(type="int", low=4, high=8), {16: "high"}),
        (FloatRange(type="float", low=0.1, high=10, log=True), {0: "low", -1: "low"}),
    ],
)
def test_a_value_is_near_an_end_within_a_twentieth_of_the_range_on_its_own_scale(entry, ends):
    assert {value: entry.end_near(value) for value in ends} == ends


# Bounds mean one thing


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"type": "int", "low": 3, "high": 4}, {3, 4}),
        ({"type": "int", "low": 3, "high": 4, "log": True}, {3, 4}),
        ({"type": "int", "low": 4, "high": 12, "step": 4}, {4, 8, 12}),
        ({"type": "int", "low": 7, "high": 7}, {7}),
    ],
)
def test_a_narrow_int_range_yields_both_its_ends(entry, expected):
    assert set(_drawn(entry, "latent_dim")) == expected


@pytest.mark.parametrize(
    ("low", "high", "step", "expected"),
    [
        (0, 1, 0.5, [0, 0.5, 1]),
        (0.1, 0.3, 0.1, [0.1, 0.2, 0.3]),  # 0.3 - 0.1 is not 2 * 0.1, and 0.1 + 2 * 0.1 not 0.3
        (0, 1, 0.3333333333333333, [0, 0.3333333333333333, 0.6666666666666666, 1]),  # three steps end before 1
        (0, 1, 0.09090909090909091, [*(round(at / 11, 15) for at in range(11)), 1]),  # eleven end after 1
        (0, 1, 0.14285714285714285, [*(at / 7 for at in range(7)), 1]),
        (0.25, 0.25, None, [0.25]),
        (0.25, 0.25, 0.1, [0.25]),
    ],
)
def test_a_float_range_with_steps_yields_each_step_as_it_would_be_written_and_both_ends_exactly(
    low, high, step, expected
):
    entry = {"type": "float", "low": low, "high": high} | ({"step": step} if step else {})
    spec = _spec(space={"kl_weight": entry}, points_to_evaluate=[{"kl_weight": value} for value in (low, high)])
    found = sorted({spec.space["kl_weight"].nearest(value) for value in _drawn(entry, "kl_weight", asks=400)})
    assert found == pytest.approx(expected, rel=1e-12)
    assert (found[0], found[-1]) == (low, high)
    assert all(float(f"{value:.15g}") == value for value in found if step == 0.1)
    assert all(spec.space["kl_weight"].contains(value) for value in found)


def test_whole_numbers_among_real_choices_are_real():
    space = _spec(space={"learning_rate": {"choices": [0.1, 0.5, 1]}, "latent_dim": {"choices": [1, 2]}}).space
    assert repr(space["learning_rate"].choices) == "(0.1, 0.5, 1.0)"
    assert repr(space["latent_dim"].choices) == "(1, 2)"
    assert space["learning_rate"].contains(1)


@pytest.mark.parametrize("log", [False, True])
def test_both_ends_of_a_float_range_are_inside_of_its_distribution(log):
    space = {"kl_weight": {"type": "float", "low": 0.5, "high": 2, "log": log}}
    for end in (0.5, 2):
        assert _spec(space=space, points_to_evaluate=[{"kl_weight": end}]).points_to_evaluate[0]["kl_weight"] == end
        with pytest.raises(ValidationError, match=r"outside of space.kl_weight"):
            _spec(space=space, points_to_evaluate=[{"kl_weight": math.nextafter(end, end * end)}])
    drawn = _drawn(space["kl_weight"], "kl_weight", asks=400)
    assert 0.5 <= min(drawn) < 0.51
    assert 1.97 < max(drawn) <= 2


def test_choices_are_drawn_as_they_are_written():
    assert set(_drawn({"choices": ["vae", "autoencoder"]}, "model")) == {"vae", "autoencoder"}
    assert set(_drawn({"choices": [32, 64, 256]}, "batch_size")) == {32, 64, 256}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"type": "int", "low": 5, "high": 4}, "low 5 is above high 4"),
        ({"type": "float", "low": 0.3, "high": 0.1}, "low 0.3 is above high 0.1"),
        ({"type": "int", "low": 0, "high": 4, "log": True}, "log needs low above 0, not 0"),
        ({"type": "int", "low": 4, "high": 8, "log": True, "step": 2}, "log and step exclude each other"),
        ({"type": "int", "low": 4, "high": 9, "step": 2}, "high 9 is not low 4 plus whole steps of 2"),
        ({"type": "int", "low": 4, "high": 8, "step": 0}, "greater than or equal to 1"),
        ({"type": "int", "low": 0, "high": 8}, "space.latent_dim: 0: Input should be greater than or equal to 1"),
        ({"type": "int", "low": 8, "high": 513}, "space.latent_dim: 513: Input should be less than or equal to 512"),
        ({"type": "float", "low": 4, "high": 8}, "takes whole numbers"),
        ({"low": 4, "high": 8}, "give type: int or float with low and high, or choices"),
        ({"type": "int", "low": 4}, "space.latent_dim.high: Field required"),
        ({"choices": []}, "at least 1 item"),
        ({"choices": ["many"]}, "space.latent_dim: 'many'"),
        ({"choices": [True]}, "space.latent_dim: True: Input should be a valid integer"),
        ({"choices": [4, "many"]}, "space.latent_dim: numbers, texts, and true and false don't mix"),
        ({"choices": [4, True]}, "space.latent_dim: numbers, texts, and true and false don't mix"),
        ({"choices": [4, 8, 4]}, "space.latent_dim: 4 is there twice"),
        ({"choices": [4, 4.0]}, "space.latent_dim: 4.0 is there twice"),
        ({"choices": ["a", "a"]}, "space.latent_dim: 'a' is there twice"),
        ({"choices": [10**400, 0.5]}, "space.latent_dim: choices: int too large to convert to float"),
        ({"type": "float", "low": -1e308, "high": 1e308, "step": 0.1}, "is not low -1e+308 plus whole steps"),
        ({"type": "int", "low": True, "high": 8}, "space.latent_dim.low: Input should be a valid integer (got True)"),
    ],
)
def test_a_bad_range_is_refused(tmp_path, entry, words):
    with pytest.raises(ValueError, match="latent_dim") as error:
        specs.load(written(tmp_path, yaml.safe_dump({"space": {"latent_dim": entry}})))
    assert words in str(error.value)
