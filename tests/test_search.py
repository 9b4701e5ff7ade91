"""The main job on the real digits: what a finished run holds, and that the same seed means the same numbers."""

import csv
import io
import json
import math
import os
import re
import shlex
import shutil
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
from PIL import Image
from processes import processes_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tuner.extractors import FeatureExtractors
from tuner.run import RunFiles
from tuner.search import begin, load_spec, main, parse
from tuner.study import BASELINE, evaluations, open_study
from tuner.trials import search_stage
from tuner.vae import codec
from tuner.vae.parameters import CLASSIC
from tuner.vae.score import FINAL_METRICS, METRICS
from tuner.workspace import keep_extractor

STAGES = {"extractor", "search", "promote", "retrain", "export"}
TIMES = {"seconds_train", "seconds_score", "started", "ended", "worker"}
# One epoch for each of four trials: the baseline, one that diverges, one that is named, one that is proposed.
TINY = [
    "--trials=4",
    "--max-epochs=1",
    "--set=budget.grace_epochs=1",
    "--set=space.learning_rate.high=1e12",
    "--set=points_to_evaluate=[{learning_rate: 1e12}, {latent_dim: 8, learning_rate: 0.002, kl_weight: 0.1}]",
    "--no-retrain",
]


def table(run: RunFiles) -> list[dict[str, str]]:
    """The rows of trials.csv as text, but for times and places."""
    with run.trials.open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


SCORED = METRICS.keys() - {"nll"}  # with a Gaussian decoder


def scores(row: dict[str, str]) -> dict[str, float]:
    return {name: float(row[name]) for name in METRICS if row.get(name)}


# A finished run


@pytest.fixture(scope="module")
def summary(finished_run):
    return finished_run.summary()


def test_a_finished_run_holds_every_part(finished_run):
    files = {"spec.yaml", "study.journal", "trials.csv", "summary.json"}
    folders = {"extractors", "tensorboard", "ray", "retrain", "export"}
    assert files <= {path.name for path in finished_run.path.iterdir() if path.is_file()}
    assert folders <= {path.name for path in finished_run.path.iterdir() if path.is_dir()}
    for folder in folders:
        assert any(path.is_file() for path in (finished_run.path / folder).rglob("*")), folder
    assert not list(finished_run.path.rglob("*.tmp"))


def test_one_checkpoint_is_kept_for_the_baseline_and_each_trial_that_was_promoted(finished_run, summary):
    kept = {0} | {entry["trial"] for entry in summary["promotion"]}
    assert len(kept) >= 2
    assert sorted(path.name for path in finished_run.checkpoints.iterdir()) == [f"{n:04d}.pt" for n in sorted(kept)]


def test_the_best_trial_lies_between_floor_and_baseline(summary):
    best = summary["best"]
    assert 0 < summary["floor"] < best["frechet_distance"] < summary["baseline"]
    closed = 1 - (best["frechet_distance"] - summary["floor"]) / (summary["baseline"] - summary["floor"])
    assert best["gap_closed"] == pytest.approx(closed)
    assert 0 < closed < 1
    assert best["trial"] in range(5)
    assert best["epoch"] in {1, 2, 4}
    assert {"latent_dim", "learning_rate", "kl_weight"} < best["params"].keys()


def test_every_trial_is_counted_once(summary, finished_run):
    rows = table(finished_run)
    assert [int(row["trial"]) for row in rows] == [0, 1, 2, 3, 4]
    counts = Counter(row["state"] for row in rows)
    assert summary["trials"] == {state: counts[state] for state in ("complete", "pruned", "failed")}
    assert sum(summary["trials"].values()) == 5


def test_the_retrained_model_closes_more_of_the_gap_than_the_best_trial(summary):
    assert summary["retrain"]["epochs"] == 4
    assert summary["retrain"]["frechet_distance"] < summary["best"]["frechet_distance"]
    assert summary["best"]["gap_closed"] < summary["retrain"]["gap_closed"] < 1


def test_the_test_split_was_scored_for_baseline_best_and_retrained(summary):
    test = summary["test"]
    assert test.keys() == {"baseline", "best", "retrained"}
    assert test["baseline"]["gap_closed"] == 0
    assert 0 < test["best"]["gap_closed"] < test["retrained"]["gap_closed"] < 1
    for name, part in test.items():
        final = FINAL_METRICS.keys() if name == "retrained" else set()
        assert part.keys() == SCORED - {"loss"} | {"floor", "gap_closed"} | final
        assert all(math.isfinite(value) for value in part.values())


def test_every_stage_has_its_seconds(summary):
    assert summary["seconds"].keys() >= STAGES
    assert all(seconds > 0 for seconds in summary["seconds"].values())


def test_trials_csv_says_what_the_journal_says(finished_run, workspace):
    trials = open_study(finished_run.journal, workspace.spec).trials
    for row, trial in zip(table(finished_run), trials, strict=True):
        best = min(evaluations(trial), key=lambda scored: scored["frechet_distance"])
        assert scores(row) == {name: best[name] for name in SCORED}
        assert float(row["epoch"]) == best["epoch"]
        classic = {name: getattr(CLASSIC, name) for name in workspace.spec.space}
        assert {name: float(row[name]) for name in workspace.spec.space} == (trial.params or classic)
        assert bool(trial.params) == (trial.number != BASELINE)  # a baseline of plain contrast is no point of the space
        rungs = range(1, 1 + len(trial.intermediate_values))
        assert list(trial.intermediate_values) == list(rungs)


def test_tensorboard_has_scalars_and_pictures_of_each_trial(finished_run):
    scored = [row for row in table(finished_run) if row["state"] != "failed"]
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
    assert f"{finished_run.summary()['test']['retrained']['gap_closed']:.4g}" in shown.out + shown.err


def test_a_run_of_another_seed_is_refused(finished_run, small_flags, capsys):
    before = finished_run.summary_file.read_bytes()
    with pytest.raises(SystemExit) as end:
        main(["--run", str(finished_run.path), *small_flags, "--seed=1"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "seed" in line
    assert str(finished_run.path) in line
    assert finished_run.summary_file.read_bytes() == before


# The same seed


@pytest.fixture(scope="module")
def tiny_run(workspace, ray_cluster, tmp_path_factory):
    """A function that searches a new run with `TINY` and the extractors of the finished run, whose seed it has."""

    def search(concurrency: int) -> RunFiles:
        run = RunFiles(tmp_path_factory.mktemp("tiny"))
        spec = load_spec(run, parse(TINY))
        for name, extractor in workspace.extractors.items():
            keep_extractor(run, workspace.data, name, extractor)
        with FeatureExtractors(run, spec, workspace.data, workspace.data_directory) as extractors:
            search_stage(run, spec, workspace.data, extractors, concurrency)
        return run

    return search


@pytest.fixture(scope="module")
def one_at_a_time(tiny_run):
    return tiny_run(concurrency=1)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table_twice(one_at_a_time, tiny_run):
    assert len(table(one_at_a_time)) == 4
    assert table(tiny_run(concurrency=1)) == table(one_at_a_time)


@pytest.mark.slow
def test_trials_side_by_side_score_as_they_do_alone(one_at_a_time, tiny_run):
    together = table(tiny_run(concurrency=2))
    searched = ("trial", "latent_dim", "learning_rate", "kl_weight")
    same = 0
    for alone, beside in zip(table(one_at_a_time), together, strict=True):
        if all(alone[name] == beside[name] for name in searched):
            assert beside == alone
            same += 1
    assert same >= 3


@pytest.mark.slow
def test_a_diverging_trial_fails_with_its_reason_and_parameters_and_the_search_goes_on(one_at_a_time):
    rows = table(one_at_a_time)
    assert rows[1]["state"] == "failed"
    assert "diverged" in rows[1]["reason"]
    assert float(rows[1]["learning_rate"]) == 1e12
    assert scores(rows[1]) == {}
    for number in (0, 2):
        assert rows[number]["state"] == "complete"
        assert scores(rows[number]).keys() == SCORED
    assert not one_at_a_time.checkpoint(1).exists()


# The command as a process of its own


def command(path: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "tuner.search", "--run", str(path), *flags]


def ended_trials(run: RunFiles) -> int:
    return sum(row["state"] != "running" for row in table(run)) if run.trials.exists() else 0


@pytest.mark.slow
def test_a_search_that_was_stopped_and_killed_again_and_again_ends_as_if_nothing_had_happened(
    one_at_a_time, finished_run, tmp_path
):
    run, mark = RunFiles(tmp_path / "run"), uuid.uuid4().hex
    again = command(run.path, *TINY, "--concurrency=1")
    said = shlex.join(["python", *again[1:]])
    environment = os.environ | {"TUNER_TEST": mark}
    ended = -1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        before = ended
        driver = subprocess.Popen(
            again, env=environment, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True
        )
        try:
            deadline = time.monotonic() + 120
            while not run.trials.exists() or not table(run) or ended_trials(run) <= before:
                assert driver.poll() is None, "it ended before it could be stopped"
                assert time.monotonic() < deadline, "no trial ended"
                time.sleep(0.01)
            if number == signal.SIGINT:
                os.kill(driver.pid, signal.SIGSTOP)
                second = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, timeout=60)
                os.kill(driver.pid, signal.SIGCONT)
                assert (second.returncode, second.stdout) == (2, "")
                assert second.stderr == f"error: {run.path}: another process is working on this run\n"
            assert driver.poll() is None, "it ended before it could be stopped"
            os.kill(driver.pid, number)  # it alone: its workers are its own to end
            _, err = driver.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            for pid in processes_of(mark):
                os.kill(pid, signal.SIGKILL)
        assert "Traceback" not in err
        if number == signal.SIGKILL:
            assert driver.returncode == -signal.SIGKILL
        else:
            assert driver.returncode == 128 + number
            assert err.splitlines()[-1] == f"stopped; go on with: {said}"
        ended = ended_trials(run)
        assert before <= ended < 4
        assert "best" not in run.summary()
        assert not any(row["state"] == "failed" for row in table(run) if row["trial"] != "1")
    assert ended >= 1

    result = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert table(run) == table(one_at_a_time)
    summary = run.summary()
    assert sum(summary["trials"].values()) == 4
    assert summary["extractors"] == finished_run.summary()["extractors"]
    assert summary["test"].keys() == {"baseline", "best"}
    assert (run.export / "model.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system of its own: needs root")
def test_a_full_disk_ends_a_search_in_one_line_and_with_more_room_the_same_command_ends_well(finished_run, tmp_path):
    flags = ["--trials=2", "--max-epochs=1", "--set=budget.grace_epochs=1", "--no-retrain", "--concurrency=1"]
    begun = RunFiles(tmp_path / "begun")
    spec = load_spec(begun, parse(flags))
    begin(begun, spec)  # with extractors, so that the disk is full when the first checkpoint comes
    begun.update_summary(extractors=finished_run.summary()["extractors"])
    shutil.copytree(finished_run.extractors, begun.extractors)
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
    assert [row["state"] for row in table(ended)] == ["complete"] * 2
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
    rows = table(RunFiles(path))
    assert [row["model"] for row in rows] == ["vae", "autoencoder"]  # the baseline stays the classic VAE
    found = scores(rows[1])
    assert found.keys() == SCORED - {"rate", "calibrated_nll"}
    assert found["frechet_distance"] < found["frechet_distance_standard_normal"] < math.inf
    assert RunFiles(path).summary()["best"]["trial"] == 1
    assert "frechet_distance_standard_normal" in RunFiles(path).summary()["test"]["best"]

    autoencoder = codec.load(RunFiles(path).export)
    assert not autoencoder.model.variational
    assert autoencoder.sample(3).shape == (3, 1, 28, 28)
    assert json.loads((RunFiles(path).export / "model.json").read_text())["parameters"]["model"] == "autoencoder"


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["on a cluster of its own", "on the one it is sent to"])
def test_a_trial_that_no_node_can_hold_is_refused_with_what_is_asked_and_what_there_is(other_cluster, tmp_path, own):
    """Also: a search that is sent nowhere starts a cluster of its own beside one that runs already."""
    address, environment = other_cluster
    flags = ["--set=resources={cpu: 0.5, gpu: 100}", "--concurrency=3"] if own else ["--set=resources.cpu=1000"]
    flags += [] if own else [f"--address={address}"]
    result = subprocess.run(
        command(tmp_path / "run", *flags), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert ("0.5 CPU and 100 GPU" if own else "1000 CPU and 0 GPU") in line
    there = re.search(r"(127\.0\.0\.\d) has (\d+) CPU and \d+ GPU", line)
    assert there, line
    assert (there[1], int(there[2])) == ("127.0.0.1", max(3, os.cpu_count() or 1)) if own else ("127.0.0.2", 2)


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
    path = tmp_path / "run"
    subprocess.run(command(path, *flags), cwd=tmp_path, capture_output=True, check=True, timeout=200)
    summary = RunFiles(path).summary()
    trained = {row["trial"]: row["loss"] for row in RunFiles(path).read_trials()}
    assert {entry["trial"]: entry["searched"] for entry in summary["promotion"]} == pytest.approx(trained)
    assert all("search_frechet_distance" in entry for entry in summary["promotion"])
    assert summary["test"].keys() == {"baseline", "best", "retrained"}
