"""The main job: what a finished run on the real digits holds, and runs of other data, models and objectives."""

import io
import json
import math
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from runs import command, rows_of, trials_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tuner.job import load_spec, new_run_lines
from tuner.run import RunFiles
from tuner.search import main, parse, request
from tuner.study import BASELINE, RETRAIN, evaluations
from tuner.vae import codec
from tuner.vae.metrics import FINAL_METRICS, METRICS

ROOT = Path(__file__).parents[1]
STAGES = {"extractor", "search", "promote", "retrain", "priors", "export"}
SCORED = METRICS.keys() - {"nll"}  # with a Gaussian decoder


def scores(row: dict[str, str]) -> dict[str, float]:
    return {name: float(row[name]) for name in METRICS if row.get(name)}


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


def test_points_for_which_there_are_too_few_trials_are_counted_where_a_run_begins(workspace):
    run, points = RunFiles(Path("runs/x")), [{"latent_dim": latents} for latents in range(4, 9)]
    for trials, flag in ((6, []), (3, ["2 of 5"]), (1, ["0 of 5"])):
        asked = request(parse(["mnist", f"--trials={trials}", f"--set=points_to_evaluate={points}"]))
        first, images, *notes = new_run_lines(run, load_spec(run, asked), asked, workspace.data)
        assert first == "new run  runs/x: mnist"
        assert images == "images   997 to train on, 400 to choose by; classes: 10"
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
    rows = rows_of(finished_run.of_retrain())
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


# Other data, models and objectives


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


@pytest.mark.long
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
    searched = command(run.path, str(tmp_path / "spec.yaml"))
    done = subprocess.run(searched, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = run.summary()
    kinds = {name: info.kind for name, info in summary.extractors.items()}
    assert kinds == {"search": "untrained", "second": "wavelets", "guide": "rotations"}
    assert summary.promotion[0].again.keys() == {"search", "second"}
    assert summary.retrain.parameters["prior"] == "matched_mixture"
    assert (run.export / "config.json").exists()
    assert "knn_accuracy" not in summary.test.retrained.model_dump()
