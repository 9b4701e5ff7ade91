"""What a benchmark says of its own figures."""

import pytest

from benchmarks.search import verdict

SLOW = {"0.5": None, "0.8": None, "0.9": None}


@pytest.mark.parametrize(
    ("ours", "peer", "last"),
    [
        ({"0.5": 5.0, "0.8": 8.0, "0.9": 10.0}, {"0.5": 6.0, "0.8": 9.0, "0.9": 15.0}, "ratio 1.50"),
        ({"0.5": 5.0, "0.8": 8.0, "0.9": None}, {"0.5": 6.0, "0.8": 4.0, "0.9": 15.0}, "ratio 0.50"),
        (
            {"0.5": 5.0, "0.8": None, "0.9": None},
            SLOW,
            "ratio 4.00, at the least: no peer got there within 20 s",
        ),
        (
            SLOW,
            {"0.5": 6.0, "0.8": 9.0, "0.9": 15.0},
            "no ratio: ours did not close half of the gap within 20 s, so there is nothing to compare",
        ),
    ],
    ids=["both", "a lower goal", "ours alone", "not ours"],
)
def test_a_ratio_says_when_it_has_nothing_to_compare(ours, peer, last):
    *_, said = verdict({"ours": ours, "optuna, tutorial": peer}, ["optuna"], ["tutorial"], 20)
    assert said == last
