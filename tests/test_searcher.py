"""The wiring of Ray and Optuna: proposals, the rule that stops trials, and a journal that tells the truth.

Trials are fakes whose objective is known in closed form; Ray, Optuna and the journal are real.
"""

import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from ray import cloudpickle, tune
from ray.tune.experiment import Trial as RayTrial

from tuner.exits import Fatal, fatal
from tuner.searcher import PREEMPTED, WORKER_RETRIES, StudySearcher, SuccessiveHalving, cause_of
from tuner.spec import Spec
from tuner.study import BASELINE, open_study, table
from tuner.trials import run_trials
from tuner.vae.parameters import CLASSIC

SPACE = {
    "latent_dim": {"type": "int", "low": 4, "high": 32, "log": True},
    "learning_rate": {"type": "float", "low": 3e-4, "high": 1e-2, "log": True},
    "kl_weight": {"type": "float", "low": 1e-2, "high": 3, "log": True},
}
OPTIMUM = {"latent_dim": 8, "learning_rate": 3e-3, "kl_weight": 0.05}  # far from the classic settings
ONE_RUNG = {"trials": 40, "max_epochs": 1, "grace_epochs": 1}
THREE_RUNGS = {"trials": 8, "max_epochs": 4, "grace_epochs": 1, "reduction_factor": 2}
NAN = math.nan


def spec_with(**parts: Any) -> Spec:
    return Spec.model_validate({"space": SPACE, "budget": ONE_RUNG} | parts)


def study_in(directory: Path, spec: Spec) -> optuna.Study:
    return open_study(directory / "study.journal", spec)


def bowl(parameters: dict[str, Any]) -> float:
    """Squared distance from the optimum in log space."""
    return sum(math.log(parameters[name] / best) ** 2 for name, best in OPTIMUM.items())


def evaluation(value: float, rung: int = 1, last: bool = True) -> dict[str, Any]:
    """What a trial reports at a rung, with what Ray adds to it."""
    return {
        "hostname": "here",
        "pid": 1,
        "timestamp": 0,
        "rung": rung,
        "epoch": float(2 ** (rung - 1)),
        "outcome": "complete" if last else "running",
        "done": last,
        "seconds_train": 0.0,
        "seconds_score": 0.0,
        "frechet_distance": value,
        "frechet_distance_standard_normal": 10.0,
    }


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
    """Ray's workers can't import this file."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])


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
        return evaluation(bowl(self.parameters)) | {"rate": 0.0}


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


def complete(searcher: StudySearcher, count: int) -> list[dict[str, Any]]:
    """Run `count` trials of the bowl one after the other without Ray; their configs in order."""
    configs = []
    for index in range(count):
        config = searcher.suggest(f"ray-{index}")
        searcher.on_trial_complete(f"ray-{index}", evaluation(bowl(config["parameters"])))
        configs.append(config)
    return configs


# Proposals


def test_the_baseline_is_trial_0_and_waits_until_a_quarter_of_the_others_are_proposed(tmp_path):
    spec = spec_with(budget=ONE_RUNG | {"trials": 9})
    study = study_in(tmp_path, spec)
    searcher = StudySearcher(study, spec)
    assert [config["trial"] for config in complete(searcher, 2)] == [1, 2]
    waiting = table(study, spec, floor=0.0)[0]
    assert (waiting["state"], waiting["latent_dim"], waiting["started"]) == ("waiting", CLASSIC.latent_dim, "")
    assert searcher.remaining == 7
    assert [config["trial"] for config in complete(searcher, 7)] == [0, 3, 4, 5, 6, 7, 8]
    assert searcher.remaining == 0


@pytest.mark.parametrize("budget", [{"trials": 1}, {"trials": 9, "time_limit": 60}], ids=["alone", "time limit"])
def test_with_nothing_to_wait_for_or_little_time_the_baseline_is_first(tmp_path, budget):
    spec = spec_with(budget=ONE_RUNG | budget)
    assert StudySearcher(study_in(tmp_path, spec), spec).suggest("a")["trial"] == BASELINE


def test_the_points_to_try_first_come_first_and_in_order(tmp_path):
    first = [
        {"latent_dim": 5, "learning_rate": 0.002, "kl_weight": 0.5},
        {"latent_dim": 6, "learning_rate": 0.003, "kl_weight": 0.25},
    ]
    spec = spec_with(points_to_evaluate=first)
    configs = complete(StudySearcher(study_in(tmp_path, spec), spec), 3)
    assert [config["trial"] for config in configs] == [1, 2, 3]
    assert configs[0]["parameters"] == CLASSIC.model_dump() | first[0]
    assert configs[1]["parameters"] == CLASSIC.model_dump() | first[1]
    assert configs[2]["parameters"] not in [config["parameters"] for config in configs[:2]]


def test_what_a_point_to_try_first_leaves_open_is_proposed(tmp_path):
    spec = spec_with(points_to_evaluate=[{"latent_dim": 5}])
    (config,) = complete(StudySearcher(study_in(tmp_path, spec), spec), 1)
    parameters = config["parameters"]
    assert parameters["latent_dim"] == 5
    assert parameters["kl_weight"] != CLASSIC.kl_weight


def test_a_space_without_the_classic_point_still_runs_it_and_still_searches_all_parameters(tmp_path):
    spec = spec_with(space=SPACE | {"latent_dim": {"type": "int", "low": 4, "high": 8}})
    study = study_in(tmp_path, spec)
    configs = complete(StudySearcher(study, spec), 40)
    (baseline,) = (config for config in configs if config["trial"] == BASELINE)
    assert baseline["parameters"] == CLASSIC.model_dump()
    assert study.trials[BASELINE].params == {}
    for trial in study.trials[1:]:
        assert trial.params.keys() == SPACE.keys()
        assert 4 <= trial.params["latent_dim"] <= 8
    start, end = ([trial.value for trial in study.trials[part]] for part in (slice(1, 10), slice(30, 40)))
    assert np.median(end) < 0.3 * np.median(start)  # it learns all the same


def test_bounds_are_inclusive_at_both_ends(tmp_path):
    space = {
        "latent_dim": {"type": "int", "low": 15, "high": 16},
        "kl_weight": {"type": "float", "low": 0.5, "high": 1.5, "step": 0.5},
        "likelihood": {"choices": ["gaussian", "bernoulli"]},
    }
    spec = spec_with(space=space)
    searcher = StudySearcher(study_in(tmp_path, spec), spec)
    proposed = [searcher.suggest(str(index))["parameters"] for index in range(30)]
    assert {parameters["latent_dim"] for parameters in proposed} == {15, 16}
    assert {parameters["kl_weight"] for parameters in proposed} == {0.5, 1.0, 1.5}
    assert {parameters["likelihood"] for parameters in proposed} == {"gaussian", "bernoulli"}


def test_the_same_seed_proposes_the_same_trials_and_another_seed_others(tmp_path):
    configs = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        spec = spec_with(seed=seed)
        (tmp_path / name).mkdir()
        configs.append(complete(StudySearcher(study_in(tmp_path / name, spec), spec), 15))
    assert configs[0] == configs[1]
    pairs = list(zip(configs[0], configs[2], strict=True))
    assert [a["trial"] for a, c in pairs if a["parameters"] == c["parameters"]] == [BASELINE]


def test_proposals_depend_on_the_journal_alone_so_reopening_it_changes_nothing(tmp_path):
    spec = spec_with()
    for name in ("straight", "reopened"):
        (tmp_path / name).mkdir()
    straight = complete(StudySearcher(study_in(tmp_path / "straight", spec), spec), 15)
    reopened = []
    for _ in range(15):
        reopened += complete(StudySearcher(study_in(tmp_path / "reopened", spec), spec), 1)
    assert reopened == straight


def test_trials_that_were_cut_off_come_first_with_their_numbers_and_parameters(tmp_path):
    spec = spec_with(budget=ONE_RUNG | {"trials": 6})
    searcher = StudySearcher(study_in(tmp_path, spec), spec)
    complete(searcher, 2)
    cut_off = [searcher.suggest("a"), searcher.suggest("b")]
    again = StudySearcher(study_in(tmp_path, spec), spec)
    assert again.remaining == 4
    assert [again.suggest("c"), again.suggest("d")] == cut_off
    assert again.suggest("e")["trial"] == 4
    for trial_id in ("c", "d", "e"):
        again.on_trial_complete(trial_id, evaluation(1.0))
    assert [trial.state for trial in study_in(tmp_path, spec).trials] == [TrialState.COMPLETE] * 5
    assert StudySearcher(study_in(tmp_path, spec), spec).remaining == 1


@pytest.mark.parametrize("cut", ["between lines", "inside of a line"])
@pytest.mark.parametrize("lowest", [4, 17], ids=["classic inside the space", "classic outside"])
def test_killed_at_any_line_of_the_journal_the_search_goes_on_as_if_nothing_had_happened(tmp_path, lowest, cut):
    spec = spec_with(
        space=SPACE | {"latent_dim": {"type": "int", "low": lowest, "high": 32}},
        points_to_evaluate=[{"latent_dim": 20}, {"latent_dim": 21, "learning_rate": 0.002, "kl_weight": 0.5}],
        budget=ONE_RUNG | {"trials": 12},
    )

    def trials(directory: Path) -> list[tuple[Any, ...]]:
        return [
            (trial.number, trial.state, trial.value, trial.params, trial.user_attrs)
            for trial in study_in(directory, spec).trials
        ]

    complete(StudySearcher(study_in(tmp_path, spec), spec), 12)
    straight, lines = trials(tmp_path), (tmp_path / "study.journal").read_bytes().splitlines(keepends=True)
    assert {state for _, state, *_ in straight} == {TrialState.COMPLETE}
    for kept in range(len(lines)):
        directory = tmp_path / str(kept)
        directory.mkdir()
        left = lines[:kept] + ([lines[kept][: len(lines[kept]) // 2]] if cut == "inside of a line" else [])
        (directory / "study.journal").write_bytes(b"".join(left))
        searcher = StudySearcher(study_in(directory, spec), spec)
        complete(searcher, min(2, searcher.remaining))
        went_on = trials(directory)
        baseline, *others = went_on
        assert baseline == straight[0] or (baseline[1] == TrialState.WAITING and baseline[3] == straight[0][3])
        assert others == straight[1 : len(went_on)], f"cut at line {kept}: {lines[kept].decode()}"


def test_a_report_that_is_repeated_after_a_cut_off_is_written_once(tmp_path):
    spec = spec_with(budget=THREE_RUNGS)
    first = StudySearcher(study_in(tmp_path, spec), spec)
    first.suggest("a")
    first.on_trial_result("a", evaluation(5.0, rung=1, last=False))
    again = StudySearcher(study_in(tmp_path, spec), spec)
    again.suggest("b")
    again.on_trial_result("b", evaluation(4.0, rung=1, last=False))
    again.on_trial_complete("b", evaluation(3.0, rung=3))
    assert study_in(tmp_path, spec).trials[1].intermediate_values == {1: 5.0, 3: 3.0}


# The rule that stops weak trials


def decide(rule: SuccessiveHalving, number: int, value: float, rung: int = 1) -> str:
    trial = RayTrial("fake", config={"trial": number}, stub=True)
    return rule.on_trial_result(None, trial, evaluation(value, rung, last=False))


# (trial, value) at one rung, factor 3: stopped when as many are better as ceil(reached / 3)
SEQUENCE = [
    (1, 5.0, "CONTINUE"),  # alone
    (2, 6.0, "STOP"),  # 1 better, 1 of 2 goes on
    (3, 4.0, "CONTINUE"),  # the best
    (0, 9.0, "CONTINUE"),  # 3 better, 2 of 4 go on; but it is the baseline
    (4, 4.5, "CONTINUE"),  # 1 better, 2 of 5 go on
    (5, 4.6, "STOP"),  # 2 better, 2 of 6 go on
    (6, 4.6, "CONTINUE"),  # 2 better, 3 of 7 go on; a tie is not better
    (7, 3.0, "CONTINUE"),
]


def test_a_trial_goes_on_while_among_the_best_third_that_reached_the_rung(tmp_path):
    spec = spec_with(budget={"trials": 9, "max_epochs": 9, "grace_epochs": 1, "reduction_factor": 3})
    rule = SuccessiveHalving(study_in(tmp_path, spec), spec)
    for number, value, expected in SEQUENCE:
        assert decide(rule, number, value) == expected, number
    assert decide(rule, 8, 100.0, rung=2) == "CONTINUE"  # each rung has its own


def test_when_more_is_better_the_rule_stops_those_with_less(tmp_path):
    spec = spec_with(
        objective={"metric": "active_units", "direction": "maximize"},
        budget={"trials": 9, "max_epochs": 9, "grace_epochs": 1, "reduction_factor": 3},
    )
    rule = SuccessiveHalving(study_in(tmp_path, spec), spec)
    for number, value, expected in SEQUENCE:
        trial = RayTrial("fake", config={"trial": number}, stub=True)
        report = evaluation(0.0, last=False) | {"active_units": -value}
        assert rule.on_trial_result(None, trial, report) == expected, number


def test_a_first_look_before_grace_stops_nobody(tmp_path):
    spec = spec_with(budget=THREE_RUNGS | {"grace_epochs": 2})
    assert spec.budget.rungs == (1, 2, 4)
    rule = SuccessiveHalving(study_in(tmp_path, spec), spec)
    for rung, worst in ((1, "CONTINUE"), (2, "STOP")):
        assert [decide(rule, number, float(number), rung) for number in range(1, 4)][1:] == [worst] * 2


def test_the_baseline_is_never_stopped_even_as_the_worst(tmp_path):
    spec = spec_with(budget=THREE_RUNGS)
    rule = SuccessiveHalving(study_in(tmp_path, spec), spec)
    for number in range(1, 20):
        decide(rule, number, 1.0)
    assert decide(rule, 20, 1e9) == "STOP"
    assert decide(rule, BASELINE, 1e9) == "CONTINUE"


def test_rungs_refilled_from_the_study_stop_the_same_trials(tmp_path):
    spec = spec_with(budget=THREE_RUNGS | {"trials": 20})
    values = np.random.default_rng(0).permutation(20).astype(float)
    study = study_in(tmp_path, spec)
    searcher, rule, reopened = StudySearcher(study, spec), SuccessiveHalving(study, spec), []
    decisions = []
    for value in values:
        number = searcher.suggest("ray")["trial"]
        reopened.append(decide(SuccessiveHalving(study_in(tmp_path, spec), spec), number, value))
        decisions.append(decide(rule, number, value))
        searcher.on_trial_result("ray", evaluation(value, last=False))
        searcher.on_trial_complete("ray", evaluation(value, last=False) | {"done": True})
    assert reopened == decisions
    assert set(decisions) == {"STOP", "CONTINUE"}


# The real wiring

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
def planned(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[optuna.Study, Spec, Recorder]:
    """The plan through the real wiring, one trial at a time; read back from the journal."""
    directory, recorder = tmp_path_factory.mktemp("planned"), Recorder()
    spec = spec_with(budget=THREE_RUNGS)
    trainable = tune.with_parameters(Planned, plan=PLAN, dies_once=7, folder=directory)
    run_trials(study_in(directory, spec), spec, trainable, directory / "ray", 1, [recorder])
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


@pytest.mark.parametrize(("losses", "state"), [(3, TrialState.RUNNING), (4, TrialState.FAIL)])
@pytest.mark.parametrize("preempted", [0, 9])
def test_a_trial_is_put_back_up_to_three_times_and_preempted_nodes_are_not_counted(tmp_path, losses, state, preempted):
    spec = spec_with()
    study = study_in(tmp_path, spec)
    searcher = StudySearcher(study, spec)
    number = searcher.suggest("0")["trial"]
    for index, cause in enumerate([PREEMPTED] * preempted + ["its process died"] * losses):
        trial = study.trials[number]
        lost = [*trial.user_attrs.get("lost", []), cause]
        optuna.trial.Trial(study, trial._trial_id).set_user_attr("lost", lost)
        searcher.on_trial_complete(str(index), error=True)
        assert searcher.live == {}
        again = searcher.suggest(str(index + 1))["trial"]
    assert study.trials[number].state == state
    assert (again == number) == (state == TrialState.RUNNING)


def test_the_time_limit_ends_a_trial_that_was_put_back(tmp_path):
    spec = spec_with(budget=ONE_RUNG | {"time_limit": 60})
    study = study_in(tmp_path, spec)
    searcher = StudySearcher(study, spec)
    searcher.suggest("a")
    searcher.on_trial_complete("a", error=True)
    searcher.close()
    assert [(trial.state, trial.user_attrs["reason"]) for trial in study.trials] == [(TrialState.PRUNED, "time limit")]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        ("Traceback (most recent call last):\n  File x\nValueError: by plan\n\n", "ValueError: by plan"),
        (
            "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.\n...",
            "out of memory",
        ),
        ("The actor died because its node has died. Node Id: 07\n\tthe actor's node was terminated: ", "its node died"),
        ("The actor died because its node has died. Node Id: 07\n\tthe actor's node was preempted: ", PREEMPTED),
        (
            "Failure # 1 (occurred at 12)\nits node has died\nFailure # 2 (occurred at 13)\nValueError: 7\n",
            "ValueError: 7",
        ),
        ("x" * 1_000, "x" * 200),
        ("\n \n", "unknown"),
        ("", "unknown"),
    ],
    ids=["exception", "memory", "node", "preempted", "the last", "long", "blank", "empty"],
)
def test_rays_account_of_a_lost_worker_becomes_a_few_words(error, cause):
    assert cause_of(error) == cause


def test_table_and_ray_agree_with_the_journal_on_every_trial(planned):
    study, spec, recorder = planned
    rows = table(study, spec, floor=0.0)
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
    assert [row["epochs_trained"] for row in table(study, spec, floor=0.0)] == [4] * 12
    # (2, 3) loses against (1, 3)
    assert sorted(trial.number for trial in study.best_trials) == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]


@pytest.mark.parametrize("objective", ["frechet_distance", ["frechet_distance", "rate"]], ids=["one", "two"])
def test_a_time_limit_ends_the_search_and_leaves_no_trial_running(ray_cluster, tmp_path, objective):
    spec = spec_with(objective=objective, budget=ONE_RUNG | {"trials": 1_000, "time_limit": 4})
    study = study_in(tmp_path, spec)
    run_trials(study, spec, tune.with_parameters(Bowl, pause=0.3), tmp_path / "ray", 2, [])
    trials = study_in(tmp_path, spec).trials
    assert 0 < len(trials) < 1_000
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert {trial.user_attrs["reason"] for trial in trials if trial.state == TrialState.PRUNED} == {"time limit"}


def test_while_others_want_the_cores_trials_run_one_at_a_time(ray_cluster, tmp_path):
    spec = spec_with(budget=ONE_RUNG | {"trials": 4})
    study = study_in(tmp_path, spec)
    run_trials(study, spec, tune.with_parameters(Bowl, pause=0.1), tmp_path / "ray", 2, [], None, lambda: 9)
    spans = sorted((trial.datetime_start, trial.datetime_complete) for trial in study.trials)
    assert len(spans) == 4
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


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


def random_search(draws: int, repetitions: int) -> float:
    """Median over repetitions of the bowl's best value among uniform draws from Optuna's own distributions."""
    distributions = spec_with().distributions
    random = np.random.default_rng(0)
    total = np.zeros((repetitions, draws))
    for name, best in OPTIMUM.items():
        low, high = distributions[name].low, distributions[name].high
        if isinstance(distributions[name], optuna.distributions.IntDistribution):
            low, high = low - 0.5, high + 0.5  # whole numbers are the rounded reals
        values = np.exp(random.uniform(math.log(low), math.log(high), total.shape))
        if isinstance(distributions[name], optuna.distributions.IntDistribution):
            values = values.round()
        total += np.log(values / best) ** 2
    return float(np.median(total.min(axis=1)))


@pytest.mark.slow
def test_the_search_beats_random_search(ray_cluster, tmp_path):
    found, workers = [], set()
    for seed in range(5):
        spec = spec_with(seed=seed)
        directory = tmp_path / str(seed)
        (directory / "meet").mkdir(parents=True)
        study = study_in(directory, spec)
        trainable = tune.with_parameters(Bowl, pause=0.02, meet=directory / "meet")
        run_trials(study, spec, trainable, directory / "ray", 2, [])
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 40
        found.append(study.best_value)
        workers |= {trial.user_attrs["worker"] for trial in study.trials}
    random = random_search(draws=40, repetitions=20_000)
    assert random == pytest.approx(0.32, abs=0.02)
    assert np.median(found) < random, found
    assert len(workers) >= 10, "each study has two workers at once"
