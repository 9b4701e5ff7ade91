"""One trial in this process: what it reports of itself when it can't go on, and where it starts again."""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from tuner.run import RunFiles, write_atomic
from tuner.searcher import FAILURES
from tuner.spec import Spec
from tuner.study import BASELINE
from tuner.trainable import Files, Shared, TrialTrainable
from tuner.vae.data import Data
from tuner.vae.parameters import Parameters
from tuner.vae.score import METRICS
from tuner.workspace import Workspace, keep_extractor

HALF = {"max_epochs": 1, "grace_epochs": 0.5, "reduction_factor": 2}  # rungs at half an epoch and at one
GOOD = Parameters(latent_dim=8, learning_rate=2e-3, kl_weight=0.1, batch_size=32)
TIMES = {"seconds_train", "seconds_score", "images_per_second"}

Begin = Callable[..., TrialTrainable]


@pytest.fixture
def begin(workspace: Workspace, ray_cluster: str, tmp_path: Path) -> Begin:
    """A function that sets up a trial of a run in tmp_path: its number, its parameters, its data."""

    def make(
        parameters: Parameters = GOOD, number: int = 1, data: Data = workspace.data, **budget: Any
    ) -> TrialTrainable:
        spec = Spec.model_validate({"space": {"latent_dim": {"choices": [4, 8]}}, "budget": HALF | budget})
        run = RunFiles(tmp_path)
        keep_extractor(run, workspace.data, "search", workspace.extractors["search"])
        trial = TrialTrainable.__new__(TrialTrainable)  # Tune's own beginning makes a log folder at home
        trial.setup(
            {"trial": number, "parameters": parameters.model_dump()},
            Shared(spec, ray.remote(Files).options(num_cpus=0).remote(run), ray.put(data)),
        )
        return trial

    return make


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """A report without its times and its tensors."""
    return {key: value for key, value in report.items() if key not in TIMES | {"checkpoint", "image_grids"}}


def check_failure(report: dict[str, Any], outcome: str, number: int = 1) -> None:
    assert (report["trial"], report["outcome"], report["done"]) == (number, outcome, True)
    assert outcome in FAILURES
    assert report["reason"].startswith(f"{outcome}: ")
    assert len(report["reason"].splitlines()) == 1
    assert "checkpoint" not in report
    assert "frechet_distance" in report  # Tune insists on it


# What goes wrong


def test_a_trial_that_uses_no_latent_unit_has_collapsed_but_the_baseline_never_has(begin):
    dead = GOOD.model_copy(update={"kl_weight": 1e6})
    report = begin(dead, grace_epochs=1).step()
    check_failure(report, "collapsed")
    assert report["active_units"] == 0
    assert math.isfinite(report["frechet_distance"])

    report = begin(dead, number=BASELINE, grace_epochs=1).step()
    assert report["active_units"] == 0
    assert (report["outcome"], report["done"]) == ("complete", True)
    assert report["checkpoint"]


def test_a_trial_whose_loss_is_not_finite_has_diverged(begin):
    check_failure(begin(GOOD.model_copy(update={"learning_rate": 1e12})).step(), "diverged")


def test_what_needs_more_memory_than_there_is_is_out_of_memory(begin, workspace):
    """An image is stored once and shown 2^40 times: laid out for training, that is more than any machine has."""
    train = workspace.data.train
    many = replace(train, images=train.images[:1].expand(2**40, 1, 28, 28), labels=train.labels[:1].expand(2**40))
    trial = begin()
    trial.data = replace(workspace.data, train=many)
    check_failure(trial.step(), "out of memory")


def test_any_other_exception_is_told_by_its_type_and_first_line_and_the_worker_takes_the_next_trial(begin, workspace):
    trial = begin()
    train = workspace.data.train
    trial.data = replace(workspace.data, train=replace(train, images=train.images[:, :, :14]))  # fits no network
    report = trial.step()
    check_failure(report, "error")
    assert report["reason"].startswith("error: RuntimeError: ")

    trial.data = workspace.data
    assert trial.reset_config({"trial": 2, "parameters": GOOD.model_dump()})
    report = trial.step()
    assert (report["trial"], report["outcome"], report["rung"]) == (2, "running", 1)


# Where it starts again


@pytest.fixture(scope="module")
def reports() -> dict[int, dict[str, Any]]:
    """The reports of a trial that nothing disturbed, by rung: made by the first test that needs them."""
    return {}


@pytest.fixture
def straight(reports: dict[int, dict[str, Any]], begin: Begin) -> dict[int, dict[str, Any]]:
    if not reports:
        trial = begin()
        reports |= {1: trial.step(), 2: trial.step()}
    return reports


def test_a_trial_with_a_checkpoint_repeats_its_report_and_ends_with_the_same_numbers(begin, straight, tmp_path):
    write_atomic(RunFiles(tmp_path).checkpoint(1), straight[1]["checkpoint"])
    trial = begin()
    repeated = trial.step()
    assert repeated == {key: value for key, value in straight[1].items() if key not in ("checkpoint", "image_grids")}
    assert METRICS.keys() - {"nll"} <= repeated.keys()
    last = trial.step()
    assert numbers(last) == numbers(straight[2])
    assert (last["outcome"], last["rung"]) == ("complete", 2)


def damaged(content: bytes, how: str) -> bytes:
    if how == "cut in half":
        return content[: len(content) // 2]
    if how == "one byte of a tensor turned":
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
    if how == "text":
        return b"no checkpoint"
    saved = torch.load(io.BytesIO(content), weights_only=True)
    if how == "without its moments":
        del saved["last"]["moments"]  # the model is loaded before that is seen
    elif how == "of another model":
        saved["best"]["parameters"]["latent_dim"] = 4
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "how",
    ["cut in half", "one byte of a tensor turned", "text", "without its moments", "of another model"],
)
def test_a_damaged_checkpoint_means_training_again_from_the_start_to_the_same_numbers(begin, straight, tmp_path, how):
    write_atomic(RunFiles(tmp_path).checkpoint(1), damaged(straight[1]["checkpoint"], how))
    report = begin().step()
    assert "checkpoint" in report, "it was repeated, not trained"
    assert numbers(report) == numbers(straight[1])
