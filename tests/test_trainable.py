"""One trial in this process: what it tells of itself when it can't go on, and where it starts again."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray

from tuner.file_server import FileServer
from tuner.run import RunFiles, write_atomic
from tuner.searcher import FAILURES
from tuner.spec import Spec
from tuner.study import BASELINE
from tuner.trainable import Shared, TrialTrainable
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.metrics import METRICS
from tuner.vae.parameters import Parameters
from tuner.workspace import Workspace

HALF = {"max_epochs": 1, "grace_epochs": 0.5, "reduction_factor": 2}  # rungs at half an epoch and at one
GOOD = Parameters(latent_dim=8, width=4, learning_rate=4e-3, kl_weight=0.1, batch_size=32)
DEAD = GOOD.model_copy(update={"kl_weight": 1e6})
TIMES = {"seconds_train", "seconds_score", "images_per_second"}
NUMBER = 1

Begin = Callable[..., TrialTrainable]
Result = dict[str, Any]


@pytest.fixture(scope="module")
def run(lend_extractors: Callable[[RunFiles], None], tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    run = RunFiles(tmp_path_factory.mktemp("trials"))
    lend_extractors(run)
    return run


@pytest.fixture(scope="module")
def begin(workspace: Workspace, ray_cluster: str, run: RunFiles) -> Begin:
    """A function that sets up a trial of the run: its parameters, its number, its budget."""
    files = ray.remote(FileServer).options(num_cpus=0).remote(run)
    data = ray.put(workspace.data)

    def make(
        parameters: Parameters = GOOD, number: int = NUMBER, objective: object = "frechet_distance", **budget: Any
    ) -> TrialTrainable:
        space = {"latent_dim": {"choices": [4, 8]}}
        spec = Spec.model_validate({"space": space, "budget": HALF | budget, "objective": objective})
        trial = TrialTrainable.__new__(TrialTrainable)  # Tune's own beginning makes a log folder at home
        trial.setup({"trial": number, "parameters": parameters.model_dump()}, Shared(spec, files, data))
        return trial

    return make


@pytest.fixture(scope="module")
def straight(begin: Begin) -> tuple[Result, Result]:
    """The results of a trial that nothing disturbed."""
    trial = begin()
    return trial.step(), trial.step()


@pytest.fixture
def saved(run: RunFiles) -> Iterator[Callable[[bytes], None]]:
    """Writes the trial's checkpoint, for one test."""
    yield lambda content: write_atomic(run.checkpoint(NUMBER), content)
    run.checkpoint(NUMBER).unlink()


def numbers(result: Result) -> Result:
    """A result without its times, pictures and bytes."""
    return {key: value for key, value in result.items() if key not in TIMES | {"checkpoint", "pictures"}}


def check_failure(result: Result, outcome: str) -> None:
    assert (result["trial"], result["outcome"], result["done"]) == (NUMBER, outcome, True)
    assert outcome in FAILURES
    assert result["reason"].startswith(f"{outcome}: ")
    assert len(result["reason"].splitlines()) == 1
    assert "checkpoint" not in result
    assert "frechet_distance" in result  # Tune insists on it


# What goes wrong


def test_a_trial_that_uses_no_latent_unit_has_collapsed(begin):
    result = begin(DEAD, grace_epochs=1).step()
    check_failure(result, "collapsed")
    assert result["active_units"] == 0
    assert math.isfinite(result["frechet_distance"])
    assert result["pictures"]


@pytest.mark.parametrize("exempt", [{"number": BASELINE}, {"objective": ["rate", "distortion"]}])
def test_the_baseline_and_trials_that_seek_a_low_rate_never_collapse(begin, exempt):
    result = begin(DEAD, grace_epochs=1, **exempt).step()
    assert result["active_units"] == 0
    assert (result["outcome"], result["done"]) == ("complete", True)
    assert result["checkpoint"]


def test_a_trial_whose_loss_is_not_finite_has_diverged(begin):
    result = begin(GOOD.model_copy(update={"learning_rate": 1e12})).step()
    check_failure(result, "diverged")
    assert "traceback" not in result, "it is no fault of the program"


def test_what_needs_more_memory_than_there_is_is_out_of_memory(begin, workspace):
    """An image is stored once and shown 2^40 times: laid out for training, that is more than any machine has."""
    train = workspace.data.train
    many = replace(train, images=train.images[:1].expand(2**40, 1, 28, 28), labels=train.labels[:1].expand(2**40))
    trial = begin()
    trial.data = replace(workspace.data, train=many)
    check_failure(trial.step(), "out of memory")


def test_any_other_exception_is_told_with_its_traceback_and_the_worker_takes_the_next_trial(begin, workspace, run):
    trial = begin()
    train = workspace.data.train
    trial.data = replace(workspace.data, train=replace(train, images=train.images[:, :, :14]))  # fits no network
    result = trial.step()
    check_failure(result, "error")
    assert result["reason"].startswith("error: RuntimeError: ")
    assert result["reason"].endswith("(traceback in errors/0001.txt)")
    assert run.error(NUMBER) == run.path / "errors" / "0001.txt"
    assert result["traceback"].startswith("Traceback (most recent call last):\n")
    assert "RuntimeError: " in result["traceback"].splitlines()[-1]

    trial.data = workspace.data
    assert trial.reset_config({"trial": 2, "parameters": GOOD.model_dump()})
    result = trial.step()
    assert (result["trial"], result["outcome"], result["rung"]) == (2, "running", 1)


# Where it starts again


def test_a_result_has_every_score_and_a_checkpoint_that_holds_them(straight):
    for rung, result in enumerate(straight, 1):
        assert METRICS.keys() - {"nll"} <= result.keys()
        assert (result["rung"], result["epoch"], result["done"]) == (rung, rung / 2, rung == 2)
        checkpoint = Checkpoint.from_bytes(result["checkpoint"])
        assert checkpoint.parameters == GOOD
        assert numbers(checkpoint.evaluation) == numbers(result)
    first, second = (result["frechet_distance"] for result in straight)
    assert checkpoint.best.epoch == (0.5 if first <= second else 1)
    assert checkpoint.best.scores["frechet_distance"] == min(first, second)


def test_a_result_is_short_where_it_is_shown_and_whole_where_it_arrives(straight):
    """Tune's controller formats each twice, whatever becomes of the text."""
    for result in straight:
        arrived = ray.get(ray.put(result))
        assert arrived == result
        assert len(f"{arrived}") < 2_000 < len(arrived["checkpoint"])


def test_a_trial_with_a_checkpoint_repeats_its_result_and_ends_with_the_same_numbers(begin, straight, saved):
    saved(straight[0]["checkpoint"])
    trial = begin()
    assert trial.step() == {key: value for key, value in straight[0].items() if key not in ("checkpoint", "pictures")}
    last = trial.step()
    assert numbers(last) == numbers(straight[1])
    assert (last["outcome"], last["rung"]) == ("complete", 2)


@pytest.mark.parametrize("how", ["cut in half", "of other parameters"])
def test_a_checkpoint_that_is_no_good_means_training_again_from_the_start_to_the_same_numbers(
    begin, straight, saved, how
):
    content = straight[0]["checkpoint"]
    checkpoint = Checkpoint.from_bytes(content)
    checkpoint.parameters = GOOD.model_copy(update={"batch_size": 64})
    saved(content[: len(content) // 2] if how == "cut in half" else checkpoint.to_bytes())
    result = begin().step()
    assert "checkpoint" in result, "it was repeated, not trained"
    assert numbers(result) == numbers(straight[0])
