"""Work on a real Ray cluster beside its trials: what comes back, in which order, and what is lost with a process."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_pool import PlainWorkers
from ray import cloudpickle

from tuner.exits import CutOff
from tuner.pool import RayPool, RayWorkers
from tuner.scoring import Bench, Workers
from tuner.vae.data import Data, Split
from tuner.vae.fitted import FittedModel
from tuner.workspace import Checkpoints


@pytest.fixture(scope="module", autouse=True)
def _works_travel_by_value() -> None:
    """Ray's workers can't import the modules of tests."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def small(bench: Bench) -> Bench:
    """On a few images, with the extractors of the finished run."""
    few = [Split(split.images[:100], split.labels[:100]) for split in (bench.data.train, bench.data.validation)]
    return Bench(bench.spec, Data(*few), bench.extractors)


@pytest.fixture(scope="module")
def workers(ray_cluster: str, small: Bench) -> RayWorkers:
    return RayPool(small.spec, small.data)(small)


@pytest.fixture(scope="module")
def fitted(finished_run) -> FittedModel:
    return Checkpoints(finished_run).best(finished_run.kept)


def numbers(workers: Workers, fitted: FittedModel) -> list[object]:
    """Scores, replicates and refits of a model, and those of real images."""
    scored = workers.map(Bench.score, [(None,), (fitted,)])
    other = fitted.parameters.model_copy(update={"prior": "gaussian_mixture", "prior_components": 2})
    wild = fitted.snapshot()
    wild.model.mean.weight.data.fill_(torch.nan)
    ((refitted, measured), nothing) = workers.map(Bench.refit, [(fitted, other), (wild, other)])
    found = [*scored, measured]
    return [
        nothing,
        [each.scores for each in found],
        [each.replicates.tolist() for each in found],
        refitted.prior.means.tolist(),
        refitted.temperature,
    ]


def test_numbers_are_those_of_a_pool_in_this_process(workers, small, fitted):
    assert numbers(workers, fitted) == numbers(PlainWorkers(small), fitted)


def test_with_a_test_split_it_is_the_one_that_is_scored(small, ray_cluster):
    tested = replace(small, test=Split(small.data.train.images[:50]))
    assert RayPool(small.spec, small.data)(tested).map(held_out, [()]) == [50]
    assert held_out(small) == 100


def held_out(bench: Bench) -> int:
    return len((bench.test or bench.data.validation).images)


def late(bench: Bench, number: int, seconds: float) -> tuple[int, int]:
    time.sleep(seconds)
    return number, os.getpid()


@pytest.mark.slow
def test_results_stand_in_the_order_of_their_items_whoever_is_first_and_it_is_told_how_many_are_done(workers):
    shown: list[int] = []
    found = workers.map(late, [(number, 1 - number / 10) for number in range(8)], shown.append)
    assert [number for number, _ in found] == list(range(8))
    assert os.getpid() not in {process for _, process in found}
    assert len({process for _, process in found}) > 1, "side by side"
    assert shown == sorted(set(shown))
    assert shown[-1] == 8


def test_nothing_to_do_is_done(workers):
    assert workers.map(late, []) == []


def dies_once(bench: Bench, folder: Path, number: int) -> int:
    """The first process to work on number 3 is killed in its midst."""
    mark = folder / str(number)
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * len(bench.data.train)


def test_a_process_that_is_killed_in_the_midst_loses_nothing(workers, tmp_path):
    expected = [number * 100 for number in range(6)]
    assert workers.map(dies_once, [(tmp_path, number) for number in range(6)]) == expected
    assert (tmp_path / "3").exists()


def test_so_with_what_is_begun_beside_the_trials(workers, tmp_path):
    pending = workers.begin(dies_once, (tmp_path, 3))
    assert pending.result() == 300
    assert pending.ready()
    assert (tmp_path / "3").exists()


def dies(bench: Bench) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_work_that_kills_each_worker_ends_the_command_in_one_line(workers):
    said = "^a worker was lost 4 times at the same work, the last time: its process died$"
    with pytest.raises(CutOff, match=said):
        workers.map(dies, [()])
    with pytest.raises(CutOff, match=said):
        workers.begin(dies, ()).result()


@pytest.mark.slow
def test_it_begins_beside_whatever_fills_the_cluster(workers, tmp_path):
    """Four wait on four cores for what needs a fifth."""
    pending = workers.begin(opens, (tmp_path / "open",))
    assert workers.map(waits, [(tmp_path / "open",)] * 4) == [True] * 4
    assert pending.result() == "opened"


def opens(bench: Bench, door: Path) -> str:
    time.sleep(1)
    door.touch()
    return "opened"


def waits(bench: Bench, door: Path) -> bool:
    deadline = time.monotonic() + 60
    while not door.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return door.exists()


def fails(bench: Bench, number: int) -> int:
    if number == 2:
        raise LookupError(f"number {number} is not there")
    return number


def test_an_exception_of_the_work_arrives_as_itself(workers):
    with pytest.raises(LookupError, match="number 2 is not there"):
        workers.map(fails, [(number,) for number in range(4)])
    pending = workers.begin(fails, (2,))
    with pytest.raises(LookupError, match="number 2 is not there"):
        pending.result()
