"""Progress in a plain log, and the status of a run from its files alone."""

import subprocess
import sys

import pytest

from tuner.run import RunFiles
from tuner.search import main
from tuner.spec import Spec
from tuner.terminal import Progress, duration, search_line

SPEC = Spec.model_validate({"space": {"latent_dim": {"choices": [4, 8]}}, "budget": {"trials": 10}})


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (75, "1m15s"), (3600, "1h00m"), (9000, "2h30m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_search_line_counts_and_extrapolates():
    rows = [
        {"trial": 0, "state": "complete", "frechet_distance": 40.0, "gap_closed": 0.5},
        {"trial": 1, "state": "pruned", "frechet_distance": 60.0},
        {"trial": 2, "state": "running"},
    ]
    line = search_line(rows, SPEC, seconds=30)
    assert line == (
        "2/10 trials | 1 running, 1 complete, 1 pruned | best frechet_distance 40 (trial 0, gap closed 0.500) | "
        "4.0 trials/min, 2m00s left"
    )
    assert search_line(rows, SPEC, seconds=30, before=1).endswith("2.0 trials/min, 4m00s left")
    assert search_line(rows, SPEC, seconds=30, before=2).endswith("gap closed 0.500)")


def test_a_plain_log_gets_lines_without_control_characters(capsys):
    with Progress("search") as progress:
        for step in range(100):
            progress.show(f"step {step}")
        progress.done("ended")
    error = capsys.readouterr().err
    assert [line.split()[2:] for line in error.splitlines()] == [["step", "0"], ["ended"]]
    assert error.isprintable() or set(error) - set(map(chr, range(32, 127))) == {"\n"}


def test_status_shows_stages_trials_and_result(finished_run: RunFiles, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished_run.path.rglob("*")}
    assert main(["--status", str(finished_run.path)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "stages",
        "5/5 trials",
        "best frechet_distance",
        "kl_weight",
        "classic settings",
        "after 4 more epochs",
    ):
        assert words in shown
    assert {path: path.stat().st_mtime_ns for path in finished_run.path.rglob("*")} == before


def test_status_needs_neither_ray_nor_torch(finished_run: RunFiles):
    code = (
        "import sys; from tuner.search import main; "
        f"assert main(['--status', {str(finished_run.path)!r}]) == 0; "
        "assert not {'ray', 'torch', 'sklearn'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_status_of_no_run_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--status", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: not a run directory (no spec.yaml)\n"
