"""Nothing is lost: the short form of `make chaos`."""

import pytest
from chaos import Chaos


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_ends_as_if_nothing_had_happened(tmp_path):
    chaos = Chaos(1, tmp_path)
    chaos.undisturbed()
    chaos.round("search")
    report = chaos.report()
    assert not report["faults"], report
    assert report["kills"] >= 1, report
    assert report["trials_lost"] == 0
    assert report["evaluations_repeated"]["worst_per_kill"] <= 2, "two trials ran at once, one evaluation each"
    assert report["numbers_compared"] > 20
