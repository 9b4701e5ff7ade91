"""Metrics: each says what it is, the gap has its two anchors, and reading names and numbers waits for no PyTorch."""

import subprocess
import sys
from pathlib import Path

import pytest

import tuner
from tuner.vae.metrics import FINAL_METRICS, METRICS, gap_closed


def test_gap_closed_is_zero_at_the_baseline_and_one_at_the_floor():
    distances = (131, 66.5, 2, 260)
    assert [gap_closed(distance, 2, 131) for distance in distances] == pytest.approx([0, 0.5, 1, -1])


def test_each_metric_says_its_direction_unit_and_meaning():
    every = [*METRICS.values(), *FINAL_METRICS.values()]
    assert {metric.direction for metric in every} == {"minimize", "maximize"}
    assert all(metric.unit and metric.meaning for metric in every)
    assert not METRICS.keys() & FINAL_METRICS.keys()


@pytest.mark.parametrize("module", ["tuner.vae.metrics", "tuner.vae.parameters", "tuner.spec"])
def test_names_and_numbers_are_read_without_torch(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'ray', 'optuna'}} & sys.modules.keys()))"
    root = Path(tuner.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=root)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
