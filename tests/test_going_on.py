"""The command goes on where it was cut off, whatever did that, to the numbers of one that was left alone."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial
from processes import processes_of
from runs import command, in_the_midst_of_the_retrain, rows_of, trials_of, without_retrain

from tuner.run import RunFiles
from tuner.search import main
from tuner.study import RETRAIN, evaluations
from tuner.vae.metrics import METRICS

pytestmark = pytest.mark.long


def stage_of(run: RunFiles) -> str:
    """The stage a run is in, by its files."""
    summary = run.summary()
    if summary.retrain:
        return "export"
    if summary.best:
        return "priors" if "retrain" in summary.seconds else "retrain"
    if summary.trials:
        return "promote"
    return "search" if summary.extractors else "extractor"


def in_the_midst(run: RunFiles, stage: str) -> bool:
    """Whether that stage has begun, and has written something of its own where it writes before its end."""
    if not run.spec.exists() or stage_of(run) != stage:
        return False
    if stage == "search":
        return run.trials.exists() and any(trial.state.is_finished() for trial in trials_of(run))
    if stage == "retrain":
        return in_the_midst_of_the_retrain(run)
    if stage == "priors":
        return run.refitted.exists()
    return any(run.path.glob("*export*/*")) if stage == "export" else True


def test_a_run_that_is_cut_off_ends_with_the_numbers_of_one_that_was_left_alone(run_copy, finished_run, small_flags):
    run = without_retrain(run_copy)
    go_on_to_the_end(run, small_flags, {"retrain": signal.SIGKILL})
    compare(run, finished_run)


def test_so_does_one_that_is_killed_or_stopped_in_each_of_the_other_stages(
    finished_run, small_flags, empty_cache, tmp_path
):
    run = RunFiles(tmp_path / "run")
    signals = dict.fromkeys(("extractor", "search", "promote", "priors", "export"), signal.SIGKILL)
    signals |= {"search": signal.SIGINT, "priors": signal.SIGTERM}
    go_on_to_the_end(run, small_flags, signals)
    compare(run, finished_run)


def go_on_to_the_end(run: RunFiles, flags: list[str], signals: dict[str, signal.Signals]) -> None:
    """The same command again and again, sent a signal in each of these stages and then left alone."""
    again, mark = command(run.path, *flags), uuid.uuid4().hex
    said = shlex.join(["python", *again[1:]])
    for stage, number in signals.items():
        driver = subprocess.Popen(
            again,
            env=os.environ | {"TUNER_TEST": mark},
            cwd=run.path.parent,
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            deadline = time.monotonic() + 300
            while not in_the_midst(run, stage):
                assert driver.poll() is None, f"it ended before {stage}: {driver.communicate()[1]}"
                assert time.monotonic() < deadline, f"{stage} never began"
                time.sleep(0.01)
            os.kill(driver.pid, number)  # it alone: its workers are its own to end
            _, err = driver.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            for pid in processes_of(mark):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if stage != "extractor":  # there a child may just have been reading what was sent to it
            assert "Traceback" not in err
        if number == signal.SIGKILL:
            assert driver.returncode == -signal.SIGKILL
        else:
            assert driver.returncode == 128 + number
            assert err.splitlines()[-1] == f"stopped; go on with: {said}"
        assert stage_of(run) == stage
        assert ("new run" in err) == (stage == "extractor")

    result = subprocess.run(again, cwd=run.path.parent, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert run.report.exists()
    assert not list(run.path.rglob("*.tmp"))


def compare(run: RunFiles, other: RunFiles) -> None:
    """Equal to the last bit: all but which trials were stopped at a rung, which depends on who reached it first."""
    here, there = trials_of(run), trials_of(other)
    assert [trial.user_attrs["parameters"] for trial in here] == [trial.user_attrs["parameters"] for trial in there]
    assert all(trial.state.is_finished() for trial in here)

    def scored(trials: list[FrozenTrial]) -> dict[tuple[int, float], dict[str, float]]:
        return {
            (trial.number, found["epoch"]): {name: found[name] for name in METRICS if name in found}
            for trial in trials
            for found in evaluations(trial)
        }

    ours, theirs = scored(here), scored(there)
    both = ours.keys() & theirs.keys()
    assert len(both) >= 8  # five trials at the first rung, and the baseline and the best at three
    assert {key: ours[key] for key in both} == {key: theirs[key] for key in both}

    summary, expected = run.summary(), other.summary()
    assert sum(summary.trials.values()) == sum(expected.trials.values())
    promoted = {(entry.trial, entry.epoch): entry for entry in expected.promotion}
    known = [entry for entry in summary.promotion if (entry.trial, entry.epoch) in promoted]
    assert len(known) >= 2
    for entry in known:
        assert entry == promoted[entry.trial, entry.epoch]
    ours, theirs = scored(trials_of(run, RETRAIN)), scored(trials_of(other, RETRAIN))
    finalists = [[entry.trial for entry in found.promotion[:2]] for found in (summary, expected)]
    assert finalists[0] == finalists[1]
    assert ours == theirs
    assert len(ours) == 2 * 4
    for part in ("extractors", "best", "retrain", "validation", "test"):
        assert getattr(summary, part) == getattr(expected, part), part
    for name in ("model.safetensors", "prior.safetensors", "samples.png"):
        assert (run.export / name).read_bytes() == (other.export / name).read_bytes(), name


def test_a_finished_run_grows_by_more_trials_and_another_retrain_whatever_befell_its_journal_and_table(
    finished_run, run_copy, small_flags, tmp_path
):
    run = run_copy
    lines, damage = run.journal.read_bytes().splitlines(keepends=True), bytes(50) + b"\n"
    run.journal.write_bytes(b"".join([*lines[:-3], damage, *lines[-3:]]))  # near the end of the retrain
    run.trials.write_text("")
    flags = [*small_flags, "--trials=6", "--set=retrain.epochs=2"]
    done = subprocess.run(command(run.path, *flags), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{run.journal}: line {len(lines) - 2} of {len(lines) + 1} is damaged" in done.stderr
    assert f"{run.path}: goes on with its search, and the stages after it are done anew" in done.stderr
    assert b"\0" in run.journal.with_name("study.journal.damaged").read_bytes()

    before, after = trials_of(finished_run), trials_of(run)
    assert after[:5] == before
    assert len(after) == len(rows_of(run)) == sum(run.summary().trials.values()) == 6
    summary, finalists = run.summary(), trials_of(run, RETRAIN)
    assert (summary.retrain.epochs, [evaluations(trial)[-1]["epoch"] for trial in finalists]) == (2, [2, 2])
    assert summary.test.retrained
    config = json.loads((run.export / "config.json").read_text())
    assert config["lineage"]["trial"] == summary.retrain.trial
    assert {len(list(run.tensorboard.glob(f"retrain-{number},*"))) for number in range(2)} == {1}
    assert main(["--run", str(run.path), *flags]) == 0, "it is finished by the spec that it has grown to"


def test_with_other_priors_its_finalists_are_not_trained_again(finished_run, run_copy, small_flags, tmp_path):
    run = run_copy
    flags = [*small_flags, "--set=retrain.priors=[{prior: gaussian_mixture, prior_components: 3}]"]
    done = subprocess.run(command(run.path, *flags), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{run.path}: goes on with its retrain, and the stages after it are done anew" in done.stderr
    assert trials_of(run, RETRAIN) == trials_of(finished_run, RETRAIN)
    summary, before = run.summary(), finished_run.summary()
    assert (trials_of(run), summary.promotion) == (trials_of(finished_run), before.promotion)
    assert summary.validation.refitted != before.validation.refitted
    assert {len(list(run.tensorboard.glob(f"retrain-{number},*"))) for number in range(2)} == {1}


def test_what_a_time_limit_cut_off_the_same_command_goes_on_with(begin_run, tmp_path, capsys):
    flags = ["digits", "--trials=2", "--max-epochs=1", "--set=budget.grace_epochs=1", "--no-retrain", "--concurrency=1"]
    run = begin_run(tmp_path / "run", *flags)
    again = command(run.path, *flags)
    done = subprocess.run([*again, "--time-limit=0.1s"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: budget.time_limit came before the baseline was scored; the run goes on with a longer one, or with null"
    )
    assert [(row["state"], row["reason"]) for row in rows_of(run)] == [("unfinished", "time limit")]
    assert main(["--status", str(run.path)]) == 0
    assert "0/2 trials | 1 unfinished" in capsys.readouterr().out
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [(row["state"], row["reason"]) for row in rows_of(run)] == [("complete", "")] * 2
    assert run.summary().trials == {"complete": 2, "pruned": 0, "failed": 0, "unfinished": 0}
    assert run.report.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system of its own: needs root")
def test_a_full_disk_ends_a_search_in_one_line_and_with_more_room_the_same_command_ends_well(begin_run, tmp_path):
    flags = ["--trials=1", "--max-epochs=1", "--set=budget.grace_epochs=1", "--no-retrain", "--concurrency=1"]
    begin_run(tmp_path / "begun", *flags)  # with extractors, so that the disk is full when the first checkpoint comes
    (tmp_path / "small").mkdir()
    again = shlex.join(command(Path("small/run"), *flags))
    script = f"""
        mount -t tmpfs -o size=4m none small || exit 77
        cp -r begun small/run
        {again} 2> full.txt
        echo $? > full.status
        mount -o remount,size=400m small
        {again} 2> room.txt
        echo $? > room.status
        cp -r small/run ended
    """
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    if done.returncode == 77 or not (tmp_path / "full.status").exists():
        pytest.skip(f"may not mount: {done.stderr.strip()}")
    said = (tmp_path / "full.txt").read_text()
    assert (tmp_path / "full.status").read_text() == "1\n", said
    (line,) = (line for line in said.splitlines() if not line.startswith("search "))  # its progress
    assert line.startswith(("error: small/run/", "error: the run directory: "))  # whichever write comes first
    assert "No space left on device" in line
    assert line.endswith(f"go on with: {again.replace(sys.executable, 'python', 1)}")
    assert (tmp_path / "room.status").read_text() == "0\n", (tmp_path / "room.txt").read_text()
    ended = RunFiles(tmp_path / "ended")
    assert [row["state"] for row in rows_of(ended)] == ["complete"]
    assert ended.report.exists()
    assert not list(ended.path.rglob("*.tmp"))
