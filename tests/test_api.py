"""The tuner from Python: what it gives is what the run's files hold, and bad input is one line."""

import errno
import inspect
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
import yaml
from mlflow import MlflowClient
from poor_file_system import poor_file_system, with_compiler
from processes import AS_NOBODY, in_namespaces
from sklearn.datasets import load_digits

import tuner
from tuner.api import keep
from tuner.loggers import PROJECT
from tuner.run import RunFiles
from tuner.spec import Spec
from tuner.study import read_study
from tuner.tensorboard import TAGS

SPEC = {
    "space": {"latent_dim": {"choices": [4, 8]}, "learning_rate": {"type": "float", "low": 0.002, "high": 0.004}},
    "fixed": {"width": 4, "batch_size": 32, "prior": "gaussian_mixture", "prior_components": 3},
}


def test_what_is_public_is_named_and_says_what_it_does():
    assert tuner.__all__ == ["Result", "Spec", "open", "tune"]
    for name in tuner.__all__:
        assert inspect.getdoc(getattr(tuner, name))
    named = inspect.signature(tuner.tune).parameters
    assert all(name in inspect.getdoc(tuner.tune) for name in named)
    with pytest.raises(AttributeError, match="no attribute 'tuner'"):
        tuner.tuner  # noqa: B018


@pytest.fixture(scope="module")
def result(finished_run: RunFiles) -> tuner.Result:
    return tuner.open(finished_run.path)


def test_trials_are_a_table_with_types(result, finished_run):
    trials = result.trials
    summary = finished_run.summary()
    assert trials["trial"].tolist() == list(range(len(trials)))
    assert (trials["state"] == "complete").sum() == summary.trials["complete"]
    kinds = {
        name: trials[name].dtype.kind for name in ("trial", "latent_dim", "kl_weight", "frechet_distance", "started")
    }
    assert kinds == {"trial": "i", "latent_dim": "i", "kl_weight": "f", "frechet_distance": "f", "started": "M"}
    assert (trials["ended"] >= trials["started"]).all()


def test_a_study_is_optunas_and_a_copy(result, finished_run):
    known = read_study(finished_run.journal).known()
    study = result.study
    assert isinstance(study, optuna.Study)
    assert [trial.values for trial in study.trials] == [trial.values for trial in known]
    study.add_trial(optuna.trial.create_trial(value=0.0))
    assert len(result.study.trials) == len(known)


def test_the_best_and_the_model_are_those_of_the_run(result, finished_run):
    assert result.path == finished_run.path
    assert result.best == finished_run.summary().best == result.summary.best
    model = result.model()
    images = model.sample(3)
    latents = model.encode(images)
    assert latents.shape == (3, model.fitted.model.latent_dim)
    assert model.decode(latents).shape == images.shape == (3, 1, 28, 28)


def test_a_notebook_shows_the_report(result, finished_run):
    report = result.report()
    assert report.path == finished_run.report
    shown = report._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "&lt;html" in shown
    assert "<html" not in shown


def test_a_run_that_has_only_begun_has_what_is_there(tmp_path):
    run = RunFiles(tmp_path)
    run.spec.write_text(tuner.Spec.model_validate(SPEC).to_yaml())
    begun = tuner.open(tmp_path)
    assert (begun.best, len(begun.trials), len(begun.study.trials)) == (None, 0, 0)
    assert begun.spec == tuner.Spec.model_validate(SPEC)


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    RunFiles(tmp_path / "run").spec.write_text(tuner.Spec.model_validate(SPEC).to_yaml())
    assert tuner.open("~/run").path == tmp_path / "run"
    with pytest.raises(ValueError, match=f"^no MNIST in {tmp_path}/data/MNIST/raw"):
        tuner.tune("mnist", run="~/run/deeper", data_dir="~/data", **{"data.download": False})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"^{tmp_path}/file: exists and is not a run directory"):
        tuner.tune(SPEC, run="~/file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "run", "spec.yaml"]


def test_arrays_are_kept_in_the_run_and_no_others_taken_once_it_has_begun(tmp_path):
    run, images = RunFiles(tmp_path), np.arange(40 * 20 * 20, dtype=np.uint8).reshape(40, 20, 20)
    keep(run, images[:3])
    run.given.write_bytes(run.given.read_bytes()[:100])  # as a kill leaves it
    place = keep(run, (images, list(range(40))))
    run.spec.write_text(Spec.model_validate(SPEC | {"data": {"name": "arrays", "file": "given.npz"}}).to_yaml())
    for _ in range(2):
        with np.load(place) as kept:
            assert np.array_equal(kept["images"], images)
            assert kept["labels"].tolist() == list(range(40))
        assert keep(run, (torch.from_numpy(images), range(40))) == place
        for other in (images, (images, range(1, 41)), (images + 1, range(40))):
            with pytest.raises(ValueError, match=f"^data: {tmp_path} has begun with other images$"):
                keep(run, other)
        run.given.unlink()  # what was given can be given again
        keep(run, (images, range(40)))
    run.given.unlink()
    run.spec.write_text(Spec.model_validate(SPEC).to_yaml())
    with pytest.raises(ValueError, match=f"^data: {tmp_path} has begun with other images$"):
        keep(run, images)
    assert not run.given.exists()


def test_what_is_laid_over_the_data_counts_and_a_run_that_was_moved_has_its_images_still(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.zeros((40, 20, 20), np.uint8)
    with pytest.raises(ValueError, match=r"^spec: data\.invert: .*\(got 'x'\)$"):
        tuner.tune(SPEC, run="mine", data=images, **{"data.invert": "x"})
    run = RunFiles(tmp_path / "moved")
    run.path.mkdir()
    run.spec.write_text(Spec.model_validate(SPEC | {"data": {"name": "arrays", "file": "gone.npz"}}).to_yaml())
    assert run.images_at(None) is None
    run.given.touch()
    assert run.images_at(None) == run.given
    assert run.images_at(tmp_path) == tmp_path


def test_what_can_not_be_a_run_is_refused_before_images_are_kept(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"exists and is not a run directory$"):
        keep(RunFiles(tmp_path), np.zeros((40, 20, 20), np.uint8))
    with pytest.raises(ValueError, match=r"Not a directory$"):
        keep(RunFiles(tmp_path / "mine.txt" / "run"), np.zeros((40, 20, 20), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"spec": {"space": {}}}, "spec: space: "),
        ({"spec": {}}, "spec: space: "),
        ({"spec": SPEC, "budget": 3}, "spec: budget: "),
        ({"spec": "missing.yaml"}, "missing.yaml: No such file or directory"),
        ({"spec": SPEC, "trials": 0}, r"spec: budget\.trials: .*\(got 0\)"),
        ({"spec": SPEC, "concurrency": 0}, "concurrency 0: expected 1 or more"),
        ({"spec": SPEC, "model": "nowhere:build"}, "--model nowhere:build: ModuleNotFoundError"),
        ({"spec": SPEC, "data": np.zeros((40, 20, 21), np.uint8)}, r".*given\.npz: images: shape \(40, 20, 21\)"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{said}") as refused:
        tuner.tune(**options, run=tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not RunFiles(tmp_path / "run").spec.exists()


def test_a_url_is_for_the_command_line(tmp_path):
    with pytest.raises(ValueError, match=r"^run s3://bucket/run: from Python a run is a directory"):
        tuner.tune(SPEC, run="s3://bucket/run")
    with pytest.raises(ValueError, match=r": not a run directory"):
        tuner.open(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("mlflow_store")
def test_arrays_are_tuned_from_python_and_told_to_mlflow_and_the_same_call_finds_them_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small, labels = load_digits(return_X_y=True)
    images = np.kron(small[:900].reshape(-1, 8, 8) / 16, np.ones((1, 2, 2))).clip(0, 1)
    wanted = {"spec": SPEC | {"loggers": ["mlflow"]}, "data": (images, labels[:900]), "trials": 2, "max_epochs": 1}
    with ThreadPoolExecutor(1) as executor:  # as some notebooks and web servers call it
        result = executor.submit(tuner.tune, **wanted, no_retrain=True).result()
    assert result.path.parent == Path("runs")
    assert result.spec.data.name == "arrays"
    assert len(result.trials) == 2
    assert result.summary.test.best.frechet_distance > 0
    assert result.model().sample(2).shape == (2, 1, 16, 16)

    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    told = {known.info.run_name: known.data for known in runs}
    assert set(told) == {"search-0000", "search-0001", "export"}
    assert told["export"].metrics["frechet_distance"] == pytest.approx(result.summary.test.best.frechet_distance)
    for row in result.trials.to_dict("records"):
        trial = told[f"search-{row['trial']:04d}"]
        assert trial.metrics.keys() <= {"epoch", *TAGS}
        assert trial.metrics["frechet_distance"] == pytest.approx(row["frechet_distance"])
        assert trial.params["latent_dim"] == str(row["latent_dim"])
        assert trial.tags["outcome"] == row["state"]

    written = result.files.report.stat().st_mtime_ns
    again = tuner.tune(**wanted, no_retrain=True, run=result.path)
    assert again.summary == result.summary
    assert again.files.report.stat().st_mtime_ns == written


@pytest.mark.long
@in_namespaces
@with_compiler
def test_it_works_from_a_script_without_a_guard_for_a_user_without_a_name_on_a_poor_file_system(begin_run, tmp_path):
    """As in a container with an id of its own and its folder mounted by a network."""
    mount = tmp_path / "mount"
    mount.mkdir()
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    flags = ["--trials=2", "--max-epochs=1", "--set=budget.grace_epochs=1"]
    begin_run(mount / "run", str(tmp_path / "spec.yaml"), *flags)
    (mount / "script.py").write_text(f"""
import tuner
from tuner.search import main
result = tuner.tune({SPEC}, run="run", trials=2, max_epochs=1, no_retrain=True, **{{"budget.grace_epochs": 1}})
print("scored", len(result.trials), result.summary.test is not None, main(["--run", "run", "--no-retrain"]))
""")
    environment = poor_file_system(tmp_path, mount, errno.ENOLCK)
    done = subprocess.run(
        [*AS_NOBODY, sys.executable, "script.py"],
        cwd=mount,
        env=environment | {"PYTHONPATH": str(Path(tuner.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "scored 2 True 0"
    assert [line.rpartition(": ")[0] for line in done.stderr.splitlines() if line.startswith("warning: ")] == [
        "warning: run: its file system has no locks",
        "warning: the run's file system syncs no folders",
    ], done.stderr
