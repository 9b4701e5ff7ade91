"""The trials on Ray: fakes whose objective is known in closed form, and real trials on the digits."""

import csv
import errno
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import bowl
import pytest
from bowl import ONE_RUNG, SPACE, THREE_RUNGS, evaluation, spec_with, study_in
from optuna.trial import TrialState
from ray import cloudpickle, tune

from tuner.exits import Fatal, fatal
from tuner.extractors import FeatureExtractors
from tuner.job import load_spec
from tuner.pool import RayPool
from tuner.run import RunFiles
from tuner.scoring import Bench
from tuner.search import parse, request
from tuner.searcher import WORKER_RETRIES
from tuner.spec import Spec
from tuner.study import UNFINISHED, Study, table
from tuner.trials import run_trials, search_stage
from tuner.vae.metrics import METRICS
from tuner.vae.parameters import CLASSIC

pytestmark = pytest.mark.slow
NAN = math.nan


class Recorder(tune.Callback):
    """What Ray saw, by trial number."""

    def __init__(self) -> None:
        self.results: list[int] = []
        self.completed: list[int] = []
        self.errors: list[int] = []

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self.results.append(trial.config["trial"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.completed.append(trial.config["trial"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.errors.append(trial.config["trial"])


@pytest.fixture(scope="module", autouse=True)
def _fakes_travel_by_value() -> None:
    """Ray's workers can't import the modules of tests."""
    for module in (sys.modules[__name__], bowl):
        cloudpickle.register_pickle_by_value(module)


class Fake(tune.Trainable):
    """One trial after the other in the same actor."""

    def setup(self, config: dict[str, Any], **options: Any) -> None:
        self.options = options
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.number, self.parameters, self.rung = new_config["trial"], new_config["parameters"], 0
        return True


class Bowl(Fake):
    """Reports the bowl's value and is done. With a folder to `meet` in, the first two trials wait for each other."""

    def step(self) -> dict[str, Any]:
        meet = self.options.get("meet")
        if meet and self.number < 2:
            (meet / str(self.number)).touch()
            while len(list(meet.iterdir())) < 2:
                time.sleep(0.01)
        time.sleep(self.options["pause"])
        return evaluation(bowl.bowl(self.parameters)) | {"rate": 0.0}


class SlowToStart(Bowl):
    """A bowl whose worker takes longer to start than a trial, and leaves files in `started` and `up`; the later trials
    wait until two are up."""

    def setup(self, config: dict[str, Any], **options: Any) -> None:
        (options["started"] / str(os.getpid())).touch()
        time.sleep(2)
        super().setup(config, **options)
        (options["up"] / str(os.getpid())).touch()

    def step(self) -> dict[str, Any]:
        while self.number > 8 and len(list(self.options["up"].iterdir())) < 2:
            time.sleep(0.05)
        return super().step()


class Planned(Fake):
    """Trial n reports plan[n] rung by rung; NaN stands for a diverged loss, None for a worker that is killed.

    The trial `dies_once` loses its worker at its second rung, and starts again from its first.
    """

    def step(self) -> dict[str, Any]:
        value = self.options["plan"][self.number][self.rung]
        self.rung += 1
        if self.number == self.options.get("dies_once") and self.rung == 2:
            died = self.options["folder"] / "died"
            if not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if value is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if math.isnan(value):
            return {"frechet_distance": value, "outcome": "diverged", "reason": "diverged: by plan", "done": True}
        return evaluation(value, self.rung, last=self.rung == 3) | {"rate": 4 - value + (value == 2)}


# Planned trials

PLAN: dict[int, list[float | None]] = {  # factor 2: stopped when as many are better as half of those at the rung
    1: [1, 1, 1],
    2: [0.5, 20],  # 1 of 2 better at the second rung
    0: [9, 9, 9],  # the baseline, the worst, when a quarter of the others are proposed
    3: [NAN],
    4: [0.75, NAN],
    5: [None],
    6: [5.5],  # 3 of 5 better: the diverged trial 3 and the lost trial 5 don't count
    7: [0.9, 2, 2],
}


@pytest.fixture(scope="module")
def planned(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Spec, Recorder]:
    """The plan through the real wiring, one trial at a time; read back from the journal."""
    directory, recorder = tmp_path_factory.mktemp("planned"), Recorder()
    spec = spec_with(budget=THREE_RUNGS)
    trainable = tune.with_parameters(Planned, plan=PLAN, dies_once=7, folder=directory)
    study = study_in(directory, spec)
    study.set_user_attr("floor", 0.0)
    run_trials(study, spec, trainable, directory / "ray", 1, [recorder])
    return study_in(directory, spec), spec, recorder


def test_the_journal_says_what_became_of_each_trial(planned):
    study, _, _ = planned
    states = [trial.state for trial in study.trials]
    done, stopped, failed = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
    assert states == [done, done, stopped, failed, failed, failed, stopped, done]


def test_a_finished_trial_is_complete_with_its_last_value(planned):
    trials = planned[0].trials
    assert {number: trials[number].value for number in (0, 1, 7)} == {0: 9, 1: 1, 7: 2}
    assert trials[7].intermediate_values == {1: 0.9, 2: 2, 3: 2}


def test_a_stopped_trial_is_pruned_with_its_intermediate_values(planned):
    trials = planned[0].trials
    assert trials[2].intermediate_values == {1: 0.5, 2: 20}
    assert trials[6].intermediate_values == {1: 5.5}
    assert trials[2].user_attrs["reason"] == "among the weaker at epoch 2"


def test_a_diverged_trial_fails_at_once_with_its_reason_and_parameters(planned):
    study, _, recorder = planned
    at_start, later, lost = study.trials[3:6]
    assert at_start.intermediate_values == {}
    assert later.intermediate_values == {1: 0.75}
    assert at_start.user_attrs["reason"] == later.user_attrs["reason"] == "diverged: by plan"
    for trial in (at_start, later, lost):
        assert trial.params.keys() == SPACE.keys()
        assert trial.user_attrs["parameters"] == CLASSIC.model_dump() | trial.params
    assert [recorder.results.count(number) for number in (3, 4, 5)] == [1, 2, 0]


def test_a_trial_whose_worker_was_killed_once_ends_like_any_other_and_the_cause_is_noted(planned):
    trial = planned[0].trials[7]
    assert trial.state == TrialState.COMPLETE
    assert trial.user_attrs["reason"] == ""
    (cause,) = trial.user_attrs["lost"]
    assert cause not in ("", "unknown", "out of memory", "its node died")
    assert all("lost" not in other.user_attrs for other in planned[0].trials if other.number not in (5, 7))


def test_a_trial_that_always_loses_its_worker_fails_after_the_retries_with_their_count_and_the_last_cause(planned):
    trial = planned[0].trials[5]
    assert len(trial.user_attrs["lost"]) == 1 + WORKER_RETRIES
    reason = trial.user_attrs["reason"]
    assert reason.startswith(f"worker lost {1 + WORKER_RETRIES} times")
    assert reason.endswith(trial.user_attrs["lost"][-1])
    assert len(reason.splitlines()) == 1


def test_table_and_ray_agree_with_the_journal_on_every_trial(planned):
    study, spec, recorder = planned
    rows = table(study, spec)
    assert [row["trial"] for row in rows] == list(range(8))
    states = ["complete", "complete", "pruned", "failed", "failed", "failed", "pruned", "complete"]
    assert [row["state"] for row in rows] == states
    assert [row.get("frechet_distance") for row in rows] == [9, 1, 0.5, None, 0.75, None, 5.5, 0.9]
    assert [row["epochs_trained"] for row in rows] == [4, 4, 2, 0, 1, 0, 1, 4]
    assert rows[1]["gap_closed"] == pytest.approx(0.9)  # 1 of a baseline that is 10 under N(0, I)
    assert sorted(recorder.errors) == [5] * (1 + WORKER_RETRIES) + [7]  # each loss: the next try is a new trial to Ray
    assert sorted(recorder.completed) == [0, 1, 2, 3, 4, 6, 7]


def test_two_objectives_give_a_pareto_front_and_stop_nothing_early(ray_cluster, tmp_path):
    plan = {number: [number % 5] * 3 for number in range(12)}  # the rate is 4 minus that, but 3 for 2
    spec = spec_with(objective=["frechet_distance", "rate"], budget=THREE_RUNGS | {"trials": 12})
    study = study_in(tmp_path, spec)
    run_trials(study, spec, tune.with_parameters(Planned, plan=plan), tmp_path / "ray", 4, [])
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 12
    assert [row["epochs_trained"] for row in table(study, spec)] == [4] * 12
    # (2, 3) loses against (1, 3)
    assert sorted(trial.number for trial in study.best_trials) == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]


@pytest.mark.parametrize("objective", ["frechet_distance", ["frechet_distance", "rate"]], ids=["one", "two"])
def test_a_time_limit_ends_the_search_and_without_it_the_search_goes_on(ray_cluster, tmp_path, objective):
    spec = spec_with(objective=objective, budget=ONE_RUNG | {"trials": 1_000, "time_limit": 4})
    study = study_in(tmp_path, spec)
    run_trials(study, spec, tune.with_parameters(Bowl, pause=0.3), tmp_path / "ray", 2, [])
    rows = table(study_in(tmp_path, spec), spec)
    assert 0 < len(rows) < 1_000
    assert {row["state"] for row in rows} <= {"complete", UNFINISHED}
    assert {row["reason"] for row in rows if row["state"] == UNFINISHED} == {"time limit"}
    longer = spec_with(objective=objective, budget=ONE_RUNG | {"trials": len(rows)})
    run_trials(study_in(tmp_path, longer), longer, tune.with_parameters(Bowl, pause=0.0), tmp_path / "ray", 2, [])
    ended = table(study_in(tmp_path, longer), longer)
    assert [(row["state"], row["reason"]) for row in ended] == [("complete", "")] * len(rows)
    assert [row for row in rows if row["state"] == "complete"] == [
        now for was, now in zip(rows, ended, strict=True) if was["state"] == "complete"
    ]


def test_while_others_want_the_cores_trials_run_one_at_a_time(ray_cluster, tmp_path):
    spec = spec_with(budget=ONE_RUNG | {"trials": 4})
    study = study_in(tmp_path, spec)
    run_trials(study, spec, tune.with_parameters(Bowl, pause=0.1), tmp_path / "ray", 2, [], None, lambda: 9)
    spans = sorted((trial.datetime_start, trial.datetime_complete) for trial in study.trials)
    assert len(spans) == 4
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_two_at_once_have_a_worker_each(ray_cluster, tmp_path):
    spec = spec_with(budget=ONE_RUNG | {"trials": 4})
    study, meet = study_in(tmp_path, spec), tmp_path / "meet"
    meet.mkdir()
    run_trials(study, spec, tune.with_parameters(Bowl, pause=0.1, meet=meet), tmp_path / "ray", 2, [])
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    assert len({trial.user_attrs["worker"] for trial in study.trials}) == 2, "both were used again"


def test_where_a_core_comes_free_later_a_second_worker_starts_although_trials_end_before_it_is_up(
    ray_cluster, tmp_path
):
    spec = spec_with(budget=ONE_RUNG | {"trials": 16})
    study, started, up = study_in(tmp_path, spec), tmp_path / "started", tmp_path / "up"
    started.mkdir()
    up.mkdir()
    trainable = tune.with_parameters(SlowToStart, pause=0.4, started=started, up=up)

    def others() -> int:
        return int(all(trial.state != TrialState.COMPLETE for trial in study.trials))

    run_trials(study, spec, trainable, tmp_path / "ray", 2, [], None, others)
    assert len(list(started.iterdir())) == 2
    assert len({trial.user_attrs["worker"] for trial in study.trials}) == 2


class Ending(tune.Callback):
    """What ends the driver at the third result."""

    def __init__(self, end: Callable[[], None]) -> None:
        self.end, self.seen = end, 0

    @fatal
    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self.seen += 1
        if self.seen == 3:
            self.end()


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def fail() -> None:
    raise OSError(errno.ENOSPC, "full", "some file")


def test_what_ends_the_driver_fails_no_trial_and_leaves_what_it_cut_off_to_be_continued(ray_cluster, tmp_path):
    spec = spec_with(budget=ONE_RUNG | {"trials": 8})
    trainable = tune.with_parameters(Bowl, pause=0.1)
    ended = 0  # each end leaves its worker alive, as long as the cluster is: one at a time leaves room for the rest
    for end, raised in ((interrupt, KeyboardInterrupt), (fail, Fatal)):
        with pytest.raises(raised) as caught:
            run_trials(study_in(tmp_path, spec), spec, trainable, tmp_path / "ray", 1, [Ending(end)])
        assert raised is not Fatal or caught.value.__cause__.filename == "some file"
        states = [trial.state for trial in study_in(tmp_path, spec).trials]
        assert set(states) <= {TrialState.COMPLETE, TrialState.RUNNING}
        assert ended + 2 <= states.count(TrialState.COMPLETE) < 8
        ended = states.count(TrialState.COMPLETE)
    again = study_in(tmp_path, spec)
    run_trials(again, spec, trainable, tmp_path / "ray", 2, [])
    assert [trial.state for trial in again.trials] == [TrialState.COMPLETE] * 8


SHORT_OF_MEMORY = """
import sys, time
from pathlib import Path
from bowl import ONE_RUNG, spec_with, study_in
from ray import tune
from tuner.cluster import cluster
from tuner.spec import Resources
from tuner.trials import run_trials

class Sleeps(tune.Trainable):
    def step(self):
        time.sleep(60)

folder, spec = Path(sys.argv[1]), spec_with(budget=ONE_RUNG | {"trials": 1})
with cluster(None, 1, Resources()):
    run_trials(study_in(folder, spec), spec, Sleeps, folder / "ray", 1, [])
"""


@pytest.mark.long
def test_a_trial_whose_worker_ray_kills_for_its_memory_fails_after_the_retries(tmp_path):
    """On a cluster that takes any use of memory for too much, and looks every four seconds."""
    tests = Path(__file__).parent
    environment = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "4000"}
    environment["PYTHONPATH"] = f"{tests.parent}:{tests}"
    subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY, tmp_path], env=os.environ | environment, check=True)
    (trial,) = study_in(tmp_path, spec_with()).trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["lost"] == ["out of memory"] * (1 + WORKER_RETRIES)


# Real trials

# One epoch for each of three trials: the baseline, one that diverges, one that is named.
TINY = [
    "--trials=3",
    "--max-epochs=1",
    "--set=budget.grace_epochs=1",
    "--set=space.learning_rate.high=1e12",
    "--set=points_to_evaluate=[{learning_rate: 1e12}, {latent_dim: 8, learning_rate: 0.002, kl_weight: 0.1}]",
]
TIMES = {"seconds_train", "seconds_score", "started", "ended"}


@pytest.fixture(scope="module")
def tiny(workspace, lend_extractors, ray_cluster, tmp_path_factory) -> Callable[[int], RunFiles]:
    """A function that searches a new run with `TINY` and the extractors of the finished run, whose seed it has."""

    def search(concurrency: int) -> RunFiles:
        run = RunFiles(tmp_path_factory.mktemp("tiny"))
        spec = load_spec(run, request(parse(TINY)))
        lend_extractors(run)
        pool = RayPool(spec, workspace.data, concurrency=concurrency)
        extractors = FeatureExtractors(run, spec, workspace.data, pool(Bench(spec, workspace.data, {})))
        search_stage(run, spec, pool, extractors)
        return run

    return search


@pytest.fixture(scope="module")
def alone(tiny) -> RunFiles:
    return tiny(1)


def rows_of(run: RunFiles) -> list[dict[str, str]]:
    """trials.csv as text, but for times."""
    with run.trials.open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def test_trials_side_by_side_score_as_they_do_alone(alone, tiny):
    rows = rows_of(alone)
    assert len(rows) == 3
    assert rows_of(tiny(2)) == rows


def test_a_diverging_trial_fails_with_its_reason_and_parameters_and_the_search_goes_on(alone):
    baseline, diverging, named = rows_of(alone)
    assert diverging["state"] == "failed"
    assert diverging["reason"].startswith("diverged: ")
    assert float(diverging["learning_rate"]) == 1e12
    assert not any(diverging[name] for name in METRICS if name in diverging)
    assert not alone.checkpoint(1).exists()
    for row in (baseline, named):
        assert row["state"] == "complete"
        assert {name for name in METRICS if row.get(name)} == METRICS.keys() - {"nll"}  # with a Gaussian decoder
    assert alone.summary().trials == {"complete": 2, "pruned": 0, "failed": 1, "unfinished": 0}
