"""Ranges: how near a value is to an end."""

import pytest

from tuner.space import FloatRange, IntRange


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
