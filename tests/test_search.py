"""The main job on the real digits: what a finished run holds, and that the command goes on where it was cut off."""

import csv
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from optuna.trial import FrozenTrial
from PIL import Image
from processes import processes_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tuner.job import load_spec, new_run_lines
from tuner.run import RunFiles
from tuner.search import main, parse, request
from tuner.study import BASELINE, RETRAIN, SEARCH, evaluations, read_study
from tuner.vae import codec
from tuner.vae.metrics import FINAL_METRICS, METRICS

ROOT = Path(__file__).parents[1]
STAGES = {"extractor", "search", "promote", "retrain", "priors", "export"}
SCORED = METRICS.keys() - {"nll"}  # with a Gaussian decoder


def rows_of(run: RunFiles) -> list[dict[str, str]]:
    """The rows of trials.csv as text."""
    with run.trials.open(newline="") as file:
        return list(csv.DictReader(file))


def scores(row: dict[str, str]) -> dict[str, float]:
    return {name: float(row[name]) for name in METRICS if row.get(name)}


def trials_of(run: RunFiles, name: str = SEARCH) -> list[FrozenTrial]:
    study = read_study(run.journal, name)
    assert study
    return study.known()


# A finished run


@pytest.fixture(scope="module")
def summary(finished_run):
    return finished_run.summary()


def test_a_finished_run_holds_every_part(finished_run):
    files = {"spec.yaml", "study.journal", "trials.csv", "summary.json", "report.html"}
    folders = {"extractors", "checkpoints", "tensorboard", "ray", "retrain", "export"}
    assert files <= {path.name for path in finished_run.path.iterdir() if path.is_file()}
    assert folders <= {path.name for path in finished_run.path.iterdir() if path.is_dir()}
    for folder in folders:
        assert any(path.is_file() for path in (finished_run.path / folder).rglob("*")), folder
    assert not list(finished_run.path.rglob("*.tmp"))


def test_that_a_run_is_new_is_the_first_thing_it_says(finished_run):
    first, *others = (finished_run.path.parent / "stderr.txt").read_text().splitlines()
    assert first == f"new run  {finished_run.path}: digits"
    assert not any("new run" in line for line in others)


def test_points_for_which_there_are_too_few_trials_are_counted_where_a_run_begins():
    run, points = RunFiles(Path("runs/x")), [{"latent_dim": latents} for latents in range(4, 9)]
    for trials, flag in ((6, []), (3, ["2 of 5"]), (1, ["0 of 5"])):
        asked = request(parse(["mnist", f"--trials={trials}", f"--set=points_to_evaluate={points}"]))
        first, *notes = new_run_lines(run, load_spec(run, asked), asked)
        assert first == "new run  runs/x: mnist"
        said = f"points_to_evaluate are run: trials is {trials}, the baseline among them"
        assert notes == [f"note     {count} {said}" for count in flag]


def test_one_checkpoint_is_kept_for_the_baseline_and_each_trial_that_was_promoted(finished_run, summary):
    kept = {BASELINE} | {entry.trial for entry in summary.promotion}
    assert len(kept) >= 2
    assert sorted(path.name for path in finished_run.checkpoints.iterdir()) == [f"{n:04d}.pt" for n in sorted(kept)]


def test_the_best_trial_lies_between_floor_and_baseline(summary):
    best, scored = summary.best, summary.validation
    real, found, baseline = (scores.frechet_distance for scores in (scored.real, scored.best, scored.baseline))
    assert 0 < real < found < baseline
    closed = 1 - (found - real) / (baseline - real)
    assert scored.best.gap_closed == pytest.approx(closed)
    assert 0 < closed < 1
    assert best.trial in range(5)
    assert best.epoch in {1, 2, 4}
    assert {"latent_dim", "learning_rate", "kl_weight"} < best.parameters.keys()


def test_every_trial_is_counted_once(summary, finished_run):
    rows = rows_of(finished_run)
    assert [int(row["trial"]) for row in rows] == [0, 1, 2, 3, 4]
    counts = Counter(row["state"] for row in rows)
    assert summary.trials == {state: counts[state] for state in ("complete", "pruned", "failed", "unfinished")}
    assert sum(summary.trials.values()) == 5


def test_what_was_retrained_closes_as_much_of_the_gap_as_the_best_trial_within_its_error(summary):
    retrained, validation = summary.retrain, summary.validation
    assert retrained.epochs == 4
    assert 0 < retrained.kept_epoch <= 4
    assert retrained.trial in [entry.trial for entry in summary.promotion[:2]]
    assert list(validation.models) == ["baseline", "best", "refitted", "retrained"]
    assert validation.exported.gap_closed > validation.best.gap_closed - 2 * validation.exported.gap_closed_error


def test_the_test_split_was_scored_for_baseline_best_and_retrained(summary):
    test = summary.test
    assert list(test.models) == ["baseline", "best", "refitted", "retrained"]
    assert (test.real.gap_closed, test.real.gap_closed_error) == (1, 0)
    assert (test.baseline.gap_closed, test.baseline.gap_closed_error) == (0, 0)
    assert all(0.9 < found.gap_closed < 1 for found in (test.best, test.refitted, test.retrained))
    assert 0 < test.real.frechet_distance < test.retrained.frechet_distance
    errors = {"frechet_distance_error", "gap_closed_error"}
    for name, found in test.models.items():
        final = FINAL_METRICS.keys() if name == "retrained" else set()
        assert found.model_dump().keys() == SCORED - {"loss"} | {"gap_closed"} | errors | final
        assert all(math.isfinite(value) for value in found.model_dump().values())


def test_every_stage_has_its_seconds(summary):
    assert summary.seconds.keys() >= STAGES
    assert all(seconds > 0 for seconds in summary.seconds.values())


def test_trials_csv_says_what_the_journal_says(finished_run, workspace):
    for row, trial in zip(rows_of(finished_run), trials_of(finished_run), strict=True):
        best = min(evaluations(trial), key=lambda scored: scored["frechet_distance"])
        assert scores(row) == {name: best[name] for name in SCORED}
        assert float(row["epoch"]) == best["epoch"]
        classic = {name: getattr(workspace.spec.baseline, name) for name in workspace.spec.space}
        assert {name: float(row[name]) for name in workspace.spec.space} == (trial.params or classic)
        assert bool(trial.params) == (trial.number != BASELINE)  # temperature one is no point of the space
        rungs = range(1, 1 + len(trial.intermediate_values))
        assert list(trial.intermediate_values) == list(rungs)


def test_that_of_the_retrain_says_how_it_ended(finished_run):
    with (finished_run.retrain / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    finalists = trials_of(finished_run, RETRAIN)
    assert [(row["state"], row["epochs_trained"]) for row in rows] == [("complete", "4.0")] * len(finalists)
    for row, trial in zip(rows, finalists, strict=True):
        assert float(row["frechet_distance"]) == min(found["frechet_distance"] for found in evaluations(trial))


def test_tensorboard_has_scalars_and_pictures_of_each_trial(finished_run):
    scored = [row for row in rows_of(finished_run) if row["state"] != "failed"]
    assert len(scored) >= 2
    for row in scored:
        (directory,) = finished_run.tensorboard.glob(f"{int(row['trial']):04d}*")
        events = EventAccumulator(str(directory), size_guidance={"images": 0, "scalars": 0}).Reload()
        tags = events.Tags()
        (distance,) = (tag for tag in tags["scalars"] if tag.endswith("/frechet_distance"))
        values = [event.value for event in events.Scalars(distance)]
        assert min(values) == pytest.approx(float(row["frechet_distance"]), rel=1e-6)
        samples = [tag for tag in tags["images"] if tag.startswith("samples")]
        assert samples
        for tag in samples:
            pictures = events.Images(tag)
            assert len(pictures) == len(values)
            picture = np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string)))
            assert min(picture.shape[:2]) > 100
            assert picture.std() > 10


def test_the_same_command_again_shows_the_result_and_touches_nothing(finished_run, small_flags, capsys):
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished_run.path.rglob("*") if path.is_file()}

    before = files()
    assert main(["--run", str(finished_run.path), *small_flags]) == 0
    assert files() == before
    shown = capsys.readouterr()
    assert str(finished_run.export) in shown.out + shown.err
    assert f" {finished_run.summary().test.retrained.gap_closed:.3f} ± 0." in shown.out + shown.err


def test_a_run_of_another_seed_is_refused(finished_run, small_flags, capsys):
    before = finished_run.summary_file.read_bytes()
    with pytest.raises(SystemExit) as end:
        main(["--run", str(finished_run.path), *small_flags, "--seed=1"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "seed" in line
    assert str(finished_run.path) in line
    assert finished_run.summary_file.read_bytes() == before


def test_a_run_that_somebody_works_on_is_refused(run_copy, small_flags, capsys):
    run_copy.report.unlink()
    with run_copy.claimed(), pytest.raises(SystemExit) as end:
        main(["--run", str(run_copy.path), *small_flags])
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"error: {run_copy.path}: another process is working on this run\n")


# The command as a process of its own


def command(path: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "tuner.search", "--run", str(path), *flags]


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
        study = read_study(run.journal, RETRAIN)
        return study is not None and any(evaluations(trial) for trial in study.known())
    if stage == "priors":
        return run.refitted.exists()
    return any(run.path.glob("*export*/*")) if stage == "export" else True


@pytest.mark.slow
def test_a_run_that_is_cut_off_ends_with_the_numbers_of_one_that_was_left_alone(
    begin_run, finished_run, small_flags, tmp_path
):
    run = begin_run(tmp_path / "run", *small_flags)
    signals = {"search": signal.SIGINT, "retrain": signal.SIGKILL, "priors": signal.SIGTERM}
    go_on_to_the_end(run, small_flags, signals)
    compare(run, finished_run)


@pytest.mark.long
def test_so_does_one_that_is_killed_in_each_of_the_other_stages(finished_run, small_flags, tmp_path):
    run = RunFiles(tmp_path / "run")
    go_on_to_the_end(run, small_flags, dict.fromkeys(("extractor", "promote", "export"), signal.SIGKILL))
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


@pytest.mark.slow
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
    assert main(["--run", str(run.path), *flags]) == 0, "it is finished by the spec that it has grown to"

    flags.append("--set=retrain.priors=[{prior: gaussian_mixture, prior_components: 3}]")
    done = subprocess.run(command(run.path, *flags), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{run.path}: goes on with its retrain, and the stages after it are done anew" in done.stderr
    assert trials_of(run, RETRAIN) == finalists, "with other priors none is trained again"
    assert (trials_of(run), run.summary().promotion) == (after, summary.promotion)
    assert run.summary().validation.refitted != summary.validation.refitted
    assert {len(list(run.tensorboard.glob(f"retrain-{number},*"))) for number in range(2)} == {1}


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.long
def test_a_plain_autoencoder_goes_all_the_way_on_a_cluster_that_runs_already(other_cluster, tmp_path):
    path, (address, environment) = tmp_path / "run", other_cluster
    flags = [
        "--trials=2",
        "--max-epochs=2",
        "--set=budget.grace_epochs=2",
        "--set=fixed.model=autoencoder",
        "--set=points_to_evaluate=[{latent_dim: 16, learning_rate: 0.003}]",
        "--no-retrain",
        f"--address={address}",
    ]
    result = subprocess.run(
        command(path, *flags), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    rows = rows_of(RunFiles(path))
    assert [row["model"] for row in rows] == ["vae", "autoencoder"]  # the baseline stays the classic VAE
    found = scores(rows[1])
    assert found.keys() == SCORED - {"rate", "calibrated_nll"}
    assert found["frechet_distance"] < found["frechet_distance_standard_normal"] < math.inf
    summary = RunFiles(path).summary()
    assert summary.best.trial == 1
    assert "frechet_distance_standard_normal" in summary.test.best.model_dump()

    autoencoder = codec.load(RunFiles(path).export)
    assert not autoencoder.fitted.model.variational
    assert autoencoder.sample(3).shape == (3, 1, 28, 28)
    assert json.loads((RunFiles(path).export / "config.json").read_text())["parameters"]["model"] == "autoencoder"


@pytest.mark.long
def test_the_training_loss_as_objective_is_searched_and_promotion_looks_at_samples(tmp_path):
    flags = [
        "--trials=2",
        "--max-epochs=1",
        "--set=budget.grace_epochs=1",
        "--set=space={latent_dim: {type: int, low: 4, high: 32}}",
        "--set=points_to_evaluate=[]",
        "--set=fixed.kl_weight=0.1",
        "--set=objective=loss",
        "--set=retrain.epochs=1",
    ]
    run = RunFiles(tmp_path / "run")
    subprocess.run(command(run.path, *flags), cwd=tmp_path, capture_output=True, check=True, timeout=200)
    summary = run.summary()
    trained = {int(row["trial"]): float(row["loss"]) for row in rows_of(run)}
    assert {entry.trial: entry.searched for entry in summary.promotion} == pytest.approx(trained)
    frechet = {entry.trial: entry.again["search"] for entry in summary.promotion}
    scored = summary.validation.best.frechet_distance
    assert frechet[summary.best.trial] == pytest.approx(scored, rel=1e-9)
    assert list(summary.test.models) == ["baseline", "best", "refitted", "retrained"]


@pytest.mark.slow
def test_photos_without_labels_go_through_all_stages(tmp_path):
    """In colour, each a blot of some colour; nothing of them is known but what they show."""
    draws = np.random.default_rng(0)
    rows, columns = np.mgrid[:16, :16]
    for number in range(1_000):
        centre, colour = draws.uniform(4, 12, 2), draws.uniform(0, 255, 3)
        blot = np.exp(-((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2) / 9)
        image = Image.fromarray((blot[..., None] * colour).astype(np.uint8))
        (tmp_path / "photos").mkdir(exist_ok=True)
        image.save(tmp_path / "photos" / f"{number}.png")
    spec = {
        "data": {"name": "folder", "directory": str(tmp_path / "photos"), "size": 16},
        "space": {"latent_dim": {"choices": [3, 4]}},
        "fixed": {"width": 4, "batch_size": 32, "kl_unit": "calibrated"},
        "budget": {"trials": 2, "max_epochs": 2},
        "retrain": {"epochs": 2, "finalists": 1, "priors": [{"prior": "matched_mixture", "prior_components": 2}]},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec | {"fixed": spec["fixed"] | {"prior": "gaussian_mixture"}}))
    run = RunFiles(tmp_path / "run")
    command = [sys.executable, "-m", "tuner.search", tmp_path / "spec.yaml", "--run", run.path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = run.summary()
    kinds = {name: info.kind for name, info in summary.extractors.items()}
    assert kinds == {"search": "untrained", "second": "wavelets", "guide": "rotations"}
    assert summary.promotion[0].again.keys() == {"search", "second"}
    assert summary.retrain.parameters["prior"] == "matched_mixture"
    assert (run.export / "config.json").exists()
    assert "knn_accuracy" not in summary.test.retrained.model_dump()
