"""What MLflow's file store, wandb's offline files and optuna-dashboard have of a search."""

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import wandb
from mlflow import MlflowClient
from runs import trials_of
from wandb.proto.wandb_internal_pb2 import Record

from tuner.loggers import PROJECT, Trackers
from tuner.run import RunFiles
from tuner.search import main
from tuner.spec import Spec
from tuner.study import SEARCH, evaluations
from tuner.vae.image_grid import png

PICTURE = png(np.arange(48, dtype=np.uint8).reshape(6, 8))
RUN = "bob's [run]"  # no text of theirs is a query, or a name by their rules
BLOCK, FULL, LAST = 32768, 1, 4
SPACE = {"latent_dim": {"choices": [4, 8]}}


@pytest.fixture
def places(mlflow_store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / RUN).mkdir()
    return tmp_path


def told(folder: Path, *loggers: str) -> Trackers:
    return Trackers(RunFiles(folder / RUN), Spec.model_validate({"space": SPACE, "loggers": loggers}), "search")


def tell(trackers: Trackers, export: Path) -> None:
    trackers.start_trial(3, {"latent_dim": 8, "kl_weight": 0.1})
    trackers.add_trial(3, {"epoch": 1.5, "mse": 0.25, "loss": float("nan")}, {"samples": PICTURE})
    trackers.end_trial(3, "failed", "diverged: at epoch 2")
    export.mkdir()
    (export / "config.json").write_text("{}")
    trackers.export(export, {"frechet_distance": 3.5, "gap_closed_error": None})


def test_mlflow_has_parameters_scores_outcome_pictures_and_the_export(places, tmp_path):
    tell(told(places, "mlflow"), tmp_path / "export")
    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    assert len(runs) == 2
    by_name = {run.info.run_name: run for run in runs}
    trial, export = by_name["search-0003"], by_name["export"]
    assert trial.data.params == {"latent_dim": "8", "kl_weight": "0.1"}
    assert trial.data.metrics == {"epoch": 1.5, "mse": 0.25}
    assert trial.info.status == "FAILED"
    assert trial.data.tags["outcome"] == "failed: diverged: at epoch 2"
    assert [file.path for file in client.list_artifacts(trial.info.run_id, "samples")] == ["samples/epoch-1.5.png"]
    assert export.data.metrics == {"frechet_distance": 3.5}
    assert [file.path for file in client.list_artifacts(export.info.run_id, "export")] == ["export/config.json"]


def test_a_trial_that_goes_on_is_the_same_run_again(places):
    for epoch in (1.0, 2.0):
        trackers = told(places, "mlflow")
        trackers.start_trial(1, {"latent_dim": 4})
        trackers.add_trial(1, {"epoch": epoch, "mse": 1 / epoch}, {})
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    history = client.get_metric_history(run.info.run_id, "mse")
    assert [(metric.step, metric.value) for metric in history] == [(1000, 1.0), (2000, 0.5)]


def test_a_trial_of_a_run_at_a_url_is_the_same_run_again_though_its_copy_lies_elsewhere(places):
    spec = Spec.model_validate({"space": SPACE, "loggers": ("mlflow",)})
    for folder in ("first", "second"):
        run = RunFiles(places / folder, shown="s3://bucket/mine")
        Trackers(run, spec, "search").start_trial(1, {"latent_dim": 4})
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    assert run.data.tags["run"] == "s3://bucket/mine"


def test_another_trial_of_the_same_number_is_another_run(places, capsys):
    for latents in (4, 8, 4):
        told(places, "mlflow").start_trial(1, {"latent_dim": latents})
    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    assert sorted(run.data.params["latent_dim"] for run in runs) == ["4", "8"]
    assert capsys.readouterr().err == ""


def records(path: Path) -> Iterator[Record]:
    """Of wandb's offline file: a header of seven bytes, then LevelDB's log format."""
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:  # no header fits
            at += BLOCK - at % BLOCK
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_has_them_in_its_offline_files_inside_the_run(places, tmp_path):
    tell(told(places, "wandb"), tmp_path / "export")
    wandb.teardown()  # waits for its service to have written all
    found = [list(records(path)) for path in (places / RUN / "wandb").glob("offline-run-*/*.wandb")]
    assert len(found) == 2
    trial, export = sorted(found, key=lambda run: -sum(record.HasField("history") for record in run))
    (begun,) = (record.run for record in trial if record.HasField("run"))
    assert (begun.project, begun.run_group, begun.display_name) == (PROJECT, RUN, "search-0003")
    assert {item.key: json.loads(item.value_json) for item in begun.config.update}["latent_dim"] == 8
    (scores,) = (record.history for record in trial if record.HasField("history"))
    numbers = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in scores.item}
    assert (numbers["epoch"], numbers["mse"]) == (1.5, 0.25)
    assert "loss" not in numbers
    assert "samples" in numbers
    (ended,) = (record.exit for record in trial if record.HasField("exit"))
    assert ended.exit_code == 1
    (artifact,) = (record.artifact for record in export if record.HasField("artifact"))
    assert (artifact.name, artifact.type) == ("bob-s--run--export", "model")
    assert [entry.path for entry in artifact.manifest.contents] == ["config.json"]


def test_one_that_fails_is_told_of_once_and_left_out(places, monkeypatch, capsys):
    (places / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{places}/file/mlruns")
    trackers = told(places, "mlflow")
    trackers.start_trial(0, {})
    trackers.end_trial(0, "complete", "")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: mlflow is told no more: ")


def test_one_that_is_not_installed_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing that was not imported yet is found
    monkeypatch.delitem(sys.modules, "wandb")
    with pytest.raises(SystemExit) as ended:
        main(["--run", str(tmp_path / "run"), "--logger", "wandb"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: loggers: wandb is not installed: pip install wandb\n"
    assert not (tmp_path / "run").exists()


def test_optuna_dashboard_shows_a_run_with_its_pictures(run_copy):
    port = 20_000 + os.getpid() % 20_000
    shown = [Path(sys.executable).with_name("optuna-dashboard"), run_copy.journal, "--artifact-dir", run_copy.artifacts]
    at = ["--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*shown, *at], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def get(path: str) -> bytes:
        with urlopen(f"http://127.0.0.1:{port}/{path}") as answer:
            return answer.read()

    try:
        for _ in range(100):
            try:
                studies = json.loads(get("api/studies"))["study_summaries"]
                break
            except OSError:
                time.sleep(0.2)
        (study,) = (found["study_id"] for found in studies if found["study_name"] == SEARCH)
        trials = json.loads(get(f"api/studies/{study}"))["trials"]
        known = trials_of(run_copy)
        assert [trial["state"].upper() for trial in trials] == [trial.state.name for trial in known]
        for trial, ours in zip(trials, known, strict=True):
            names = [f"samples-epoch-{found['epoch']:g}.png" for found in evaluations(ours)]
            assert sorted(artifact["filename"] for artifact in trial["artifacts"]) == sorted(names)
            for artifact in trial["artifacts"]:
                picture = get(f"artifacts/{study}/{trial['trial_id']}/{artifact['artifact_id']}")
                assert picture.startswith(b"\x89PNG")
    finally:
        process.terminate()
        process.wait()
