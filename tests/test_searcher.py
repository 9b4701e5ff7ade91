"""Optuna behind Ray Tune's interface: proposals, the rule that stops trials, and a journal that tells the truth.

Trials are fakes whose objective is known in closed form; Optuna and the journal are real. Ray is in test_trials.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bowl import ONE_RUNG, SPACE, THREE_RUNGS, bowl, evaluation, random_search, spec_with, study_in
from optuna.samplers._tpe.sampler import _split_trials
from optuna.trial import TrialState, create_trial
from ray.tune.experiment import Trial as RayTrial
from ray.tune.search import Searcher

from tuner.searcher import PREEMPTED, WORKER_RETRIES, Points, StudySearcher, SuccessiveHalving, add_finalists, cause_of
from tuner.spec import Spec
from tuner.study import BASELINE, BEST, MANY, Study, table
from tuner.vae.parameters import CLASSIC


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
    waiting = table(study, spec)[0]
    assert (waiting["state"], waiting["latent_dim"]) == ("waiting", CLASSIC.latent_dim)
    assert "started" not in waiting
    assert searcher.remaining == 7
    assert [config["trial"] for config in complete(searcher, 7)] == [0, 3, 4, 5, 6, 7, 8]
    assert searcher.remaining == 0


@pytest.mark.parametrize("budget", [{"trials": 1}, {"trials": 9, "time_limit": 60}], ids=["alone", "time limit"])
def test_with_nothing_to_wait_for_or_little_time_the_baseline_is_first(tmp_path, budget):
    spec = spec_with(budget=ONE_RUNG | budget)
    assert StudySearcher(study_in(tmp_path, spec), spec).suggest("a")["trial"] == BASELINE


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([10, 5, 4.9, 4.8, 4.6], True),  # 4.5 would have been better by a tenth
        ([10, 5, 4.9, 4.8, 4.4], False),
        ([5, 6, 7], False),  # none came before the last three
        ([5, 6, 7, 8], True),
    ],
)
def test_a_search_that_has_stopped_improving_ends_but_for_the_baseline(tmp_path, values, ends):
    spec = spec_with(budget=ONE_RUNG | {"trials": 50, "plateau": {"trials": 3, "min_improvement": 0.1}})
    searcher = StudySearcher(study_in(tmp_path, spec), spec)
    for index, value in enumerate(values):
        assert searcher.suggest(f"ray-{index}")["trial"] == index + 1
        searcher.on_trial_complete(f"ray-{index}", evaluation(value))
    again = StudySearcher(study_in(tmp_path, spec), spec)
    assert (searcher.remaining, again.remaining) == ((1, 1) if ends else (50 - len(values),) * 2)
    assert (searcher.suggest("next")["trial"] == BASELINE) == ends
    if ends:
        assert searcher.suggest("another") is None
        searcher.on_trial_complete("next", evaluation(99))
        assert searcher.suggest("last") == Searcher.FINISHED


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


CONDITIONAL = {
    "prior_components": {"type": "int", "low": 2, "high": 9, "when": {"prior": "gaussian_mixture"}},
    "prior": {"choices": ["standard_normal", "gaussian_mixture", "flow"]},
    "latent_dim": {"type": "int", "low": 3, "high": 20},
}


def test_what_depends_on_another_parameter_is_searched_only_where_that_has_the_value(tmp_path):
    first = {"prior": "gaussian_mixture", "prior_components": 7}
    spec = spec_with(space=CONDITIONAL, budget=ONE_RUNG | {"trials": 40}, points_to_evaluate=[first])
    searcher = StudySearcher(study_in(tmp_path, spec), spec)
    for index in range(40):
        parameters = searcher.suggest(f"ray-{index}")["parameters"]
        searcher.on_trial_complete(f"ray-{index}", evaluation(parameters["latent_dim"]))
    _, point, *proposed = searcher.study.known()
    assert first.items() <= point.params.items()
    components: dict[str, set[int]] = {name: set() for name in CONDITIONAL["prior"]["choices"]}
    for trial in proposed:
        prior, parameters = trial.params["prior"], trial.user_attrs["parameters"]
        assert ("prior_components" in trial.params) == (prior == "gaussian_mixture")
        assert trial.params.items() <= parameters.items()
        components[prior].add(parameters["prior_components"])
    assert components["flow"] == components["standard_normal"] == {CLASSIC.prior_components}
    assert len(components["gaussian_mixture"]) > 2
    assert min(trial.params["latent_dim"] for trial in proposed) == 3


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


def test_steps_are_proposed_as_they_are_written_and_a_point_at_an_end_that_they_miss_is_run(tmp_path):
    space = {
        "kl_weight": {"type": "float", "low": 0, "high": 1, "step": 0.3333333333333333},
        "learning_rate": {"type": "float", "low": 0.1, "high": 0.3, "step": 0.1},
        "latent_dim": {"choices": [4, 8], "when": {"learning_rate": 0.3}},
    }
    points = [{"kl_weight": 1}, {"kl_weight": 0.6666666666666667, "learning_rate": 0.1 + 0.2}]
    spec = spec_with(space=space, points_to_evaluate=points, budget=ONE_RUNG | {"trials": 40})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        searcher = StudySearcher(study_in(tmp_path, spec), spec)
        for index in range(40):
            config = searcher.suggest(str(index))
            searcher.on_trial_complete(str(index), evaluation(config["parameters"]["kl_weight"]))
    trials = study_in(tmp_path, spec).known()
    found = [trial.user_attrs["parameters"] for trial in trials]
    assert [parameters["kl_weight"] for parameters in found[:3]] == [1, 1, 0.6666666666666666]
    assert {parameters["kl_weight"] for parameters in found} == {0, 0.3333333333333333, 0.6666666666666666, 1}
    assert {parameters["learning_rate"] for parameters in found[1:]} == {0.1, 0.2, 0.3}
    assert all(("latent_dim" in trial.params) == (trial.params["learning_rate"] == 0.3) for trial in trials[1:])


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


@pytest.mark.parametrize("objective", ["frechet_distance", ["frechet_distance", "rate"]], ids=["one", "two"])
def test_where_trials_fail_by_themselves_fewer_are_proposed(tmp_path, objective):
    """Half of the range fails, so that of proposals that know nothing half would."""
    spec = spec_with(objective=objective, budget=ONE_RUNG | {"trials": 61})
    searcher, failed = StudySearcher(study_in(tmp_path, spec), spec), []
    for index in range(61):
        parameters = searcher.suggest("ray")["parameters"]
        failed.append(parameters["learning_rate"] < math.sqrt(3e-4 * 1e-2))
        scores = evaluation(bowl(parameters)) | {"rate": -math.log(parameters["kl_weight"])}
        diverged = {"outcome": "diverged", "reason": "diverged: by plan", "hostname": "here", "pid": 1}
        searcher.on_trial_complete("ray", diverged if failed[-1] and index else scores)
    assert sum(failed[31:]) <= 6
    points = Points(searcher.study, spec)()
    assert len(points) == 61
    assert sum(point.state == TrialState.PRUNED for point in points) == sum(failed[1:])


def test_a_worker_that_was_lost_for_good_tells_the_sampler_nothing_of_its_trial(tmp_path):
    spec = spec_with()
    searcher = StudySearcher(study_in(tmp_path, spec), spec)
    for _ in range(WORKER_RETRIES + 1):
        number = searcher.suggest("ray")["trial"]
        causes = searcher.study.at(number).user_attrs.get("lost", [])
        searcher.study.trial(number).set_user_attr("lost", [*causes, "its process died"])
        searcher.on_trial_complete("ray", error=True)
    assert searcher.study.at(number).state == TrialState.FAIL
    assert searcher.points() == Points(searcher.study, spec)() == []


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


def test_a_result_that_is_repeated_after_a_worker_was_lost_stops_nobody(tmp_path):
    spec = spec_with(budget=THREE_RUNGS | {"trials": 20})
    study = study_in(tmp_path, spec)
    searcher, rule = StudySearcher(study, spec), SuccessiveHalving(study, spec)
    for name, value in (("a", 5.0), ("b", 4.0), ("c", 3.0), ("d", 2.0)):
        number = searcher.suggest(name)["trial"]
        if decide(rule, number, value) == "CONTINUE":
            searcher.on_trial_result(name, evaluation(value, last=False))
    assert decide(rule, 9, 5.0) == "STOP"
    for again in (rule, SuccessiveHalving(study_in(tmp_path, spec), spec)):
        assert decide(again, 1, 5.0) == "CONTINUE"


def test_a_free_worker_is_for_the_newest_trial_but_at_the_start_and_where_the_oldest_waits_in_vain(tmp_path):
    spec, trials = spec_with(), [RayTrial("fake", trial_id=name, stub=True) for name in "dbca"]
    controller = SimpleNamespace(get_trials=lambda: trials)
    rule, hasty = (SuccessiveHalving(study_in(tmp_path, spec), spec, patience) for patience in (60, 0))
    assert rule.choose_trial_to_run(controller) is trials[0]
    trials[0].set_status(RayTrial.RUNNING)
    assert [rule.choose_trial_to_run(controller) for _ in range(2)] == [trials[3]] * 2
    assert [hasty.choose_trial_to_run(controller) for _ in range(2)] == [trials[3], trials[1]]
    for trial in trials:
        trial.set_status(RayTrial.TERMINATED)
    assert rule.choose_trial_to_run(controller) is None


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
    spec = spec_with(budget=THREE_RUNGS | {"grace_epochs": 3})
    assert spec.budget.rungs == (1, 3, 4)
    rule = SuccessiveHalving(study_in(tmp_path, spec), spec)
    for rung, worst in ((1, "CONTINUE"), (3, "STOP")):
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


# Finalists

FINALISTS = [CLASSIC.model_copy(update={"latent_dim": latents, "schedule": "cosine"}) for latents in (9, 5, 7)]


def finalists_in(directory: Path, capacity: Callable[[], float] = lambda: math.inf) -> StudySearcher:
    spec = spec_with(budget=THREE_RUNGS | {"trials": 3})
    study = study_in(directory, spec)
    add_finalists(study, FINALISTS)
    return StudySearcher(study, spec, capacity)


def test_each_finalist_is_proposed_once_in_order_and_as_it_is(tmp_path):
    searcher = finalists_in(tmp_path)
    assert searcher.remaining == 3
    for number, parameters in enumerate(FINALISTS):
        assert searcher.suggest(str(number)) == {"trial": number, "parameters": parameters.model_dump()}
        assert searcher.remaining == 2 - number
    assert searcher.suggest("more") is None, "one that runs may be put back"
    for number in range(3):
        searcher.on_trial_complete(str(number), evaluation(1.0, rung=3))
    assert searcher.suggest("more") == Searcher.FINISHED
    assert [(trial.state, trial.params) for trial in searcher.study.trials] == [(TrialState.COMPLETE, {})] * 3
    assert finalists_in(tmp_path).remaining == 0


def test_finalists_that_were_cut_off_are_taken_up_again_and_what_has_ended_is_not(tmp_path):
    searcher = finalists_in(tmp_path, lambda: 2)
    searcher.suggest("a")
    searcher.suggest("b")
    assert searcher.suggest("c") is None, "there is room for two"
    searcher.on_trial_complete("a", evaluation(1.0, rung=3))
    again = finalists_in(tmp_path)
    assert again.remaining == 2
    assert [again.suggest(name)["trial"] for name in ("d", "e")] == [1, 2]
    again.on_trial_complete("d", error=True)  # its worker was lost
    assert again.remaining == 1
    assert again.suggest("f") == {"trial": 1, "parameters": FINALISTS[1].model_dump()}


@pytest.mark.parametrize("cut", ["between lines", "inside of a line"])
def test_killed_at_any_line_of_the_journal_the_finalists_are_the_same(tmp_path, cut):
    def run(directory: Path) -> list[Any]:
        searcher = finalists_in(directory)
        for index in range(searcher.remaining):
            number = searcher.suggest(str(index))["trial"]
            searcher.on_trial_complete(str(index), evaluation(float(number), rung=3))
        assert searcher.remaining == 0
        known = study_in(directory, searcher.spec).trials
        return [(trial.number, trial.state, trial.value, trial.user_attrs) for trial in known]

    straight, lines = run(tmp_path), (tmp_path / "study.journal").read_bytes().splitlines(keepends=True)
    assert [attributes["parameters"]["latent_dim"] for *_, attributes in straight] == [9, 5, 7]
    for kept in range(len(lines)):
        directory = tmp_path / str(kept)
        directory.mkdir()
        left = lines[:kept] + ([lines[kept][: len(lines[kept]) // 2]] if cut == "inside of a line" else [])
        (directory / "study.journal").write_bytes(b"".join(left))
        assert run(directory) == straight, f"cut at line {kept}: {lines[kept].decode()}"


def test_no_finalist_is_stopped_before_its_end(tmp_path):
    spec = spec_with(retrain={"epochs": 3}).of_retrain(finalists=5, seed=0)
    rule = SuccessiveHalving(study_in(tmp_path, spec), spec)
    for rung in (1, 2):
        assert [decide(rule, number, float(number), rung) for number in range(1, 5)] == ["CONTINUE"] * 4
    trial = RayTrial("fake", config={"trial": 1}, stub=True)
    assert rule.on_trial_result(None, trial, evaluation(9.0, rung=3)) == "STOP"


def test_each_loss_of_a_worker_is_noted_with_its_cause(tmp_path):
    searcher = finalists_in(tmp_path)
    rule, number = SuccessiveHalving(searcher.study, searcher.spec), searcher.suggest("a")["trial"]
    rule.on_trial_error(None, SimpleNamespace(config={"trial": number}, error_file=None))
    assert searcher.study.trials[number].user_attrs["lost"] == ["unknown"]
    path = tmp_path / "error.txt"
    path.write_text("ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.\n")
    rule.on_trial_error(None, SimpleNamespace(config={"trial": number}, error_file=str(path)))
    assert searcher.study.trials[number].user_attrs["lost"] == ["unknown", "its process died"]


# Lost workers and the end


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
        study.trial(number).set_user_attr("lost", lost)
        searcher.on_trial_complete(str(index), error=True)
        assert searcher.live == {}
        again = searcher.suggest(str(index + 1))["trial"]
    assert study.trials[number].state == state
    assert (again == number) == (state == TrialState.RUNNING)


def test_what_the_time_limit_cut_off_is_unfinished_until_it_is_taken_up_again(tmp_path):
    spec = spec_with(budget=THREE_RUNGS | {"time_limit": 60})
    study = study_in(tmp_path, spec)
    searcher = StudySearcher(study, spec)
    first = [searcher.suggest(name) for name in "abc"]
    searcher.on_trial_complete("a", evaluation(5.0))
    searcher.on_trial_result("b", evaluation(4.0, last=False))
    searcher.on_trial_complete("c", error=True)  # put back
    searcher.close()
    rows = table(study, spec)
    assert [(row["state"], row["reason"]) for row in rows] == [("complete", ""), *[("unfinished", "time limit")] * 2]
    assert rows[1]["frechet_distance"] == 4
    again = StudySearcher(study_in(tmp_path, spec), spec)
    assert again.remaining == 7
    assert [again.suggest(name) for name in "de"] == first[1:]
    assert [row["state"] for row in table(again.study, spec)] == ["complete", "running", "running"]
    again.on_trial_complete("d", evaluation(3.0, rung=3))
    assert [(row["state"], row["reason"]) for row in table(again.study, spec)][1] == ("complete", "")


def test_what_the_time_limit_cut_off_has_no_say_in_whether_the_search_still_improves(tmp_path):
    spec = spec_with(budget=THREE_RUNGS | {"trials": 50, "plateau": {"trials": 2}, "time_limit": 60})
    searcher = StudySearcher(study_in(tmp_path, spec), spec)
    for name, value in zip("abcd", (5.0, 4.0, 9.0, 9.0), strict=True):
        searcher.suggest(name)
        searcher.on_trial_result(name, evaluation(value, last=False))
    for name in "ab":
        searcher.on_trial_complete(name, evaluation(3.0, rung=3))
    searcher.close()
    again = StudySearcher(study_in(tmp_path, spec), spec)
    assert (again.on_plateau, again.remaining) == (False, 48)
    for name in "ef":
        again.suggest(name)
        again.on_trial_complete(name, evaluation(9.0, rung=3))
    assert (again.on_plateau, again.remaining) == (True, 0)


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


# What the sampler looks at


def ended_study(directory: Path, spec: Spec, trials: int) -> Study:
    """A third of the trials complete, a third stopped at either of two rungs, every seventh failed."""
    study, random = study_in(directory, spec), np.random.default_rng(0)
    with study.journal.event():
        for number in range(trials):
            values, several = random.permutation(100)[:2].astype(float).tolist(), len(spec.objective) > 1
            state = TrialState.COMPLETE if number % 3 == 0 or several else TrialState.PRUNED
            state = TrialState.FAIL if number % 7 == 6 else state
            study.add_trial(
                create_trial(
                    state=state,
                    values=values[: 1 + several] if state == TrialState.COMPLETE else None,
                    user_attrs={"parameters": CLASSIC.model_dump()},
                    intermediate_values={} if several else dict(enumerate(values[: 1 + number % 2], 1)),
                )
            )
    return study


@pytest.mark.parametrize("objective", ["frechet_distance", ["frechet_distance", "rate"]], ids=["one", "two"])
def test_of_many_trials_the_sampler_sees_the_best_and_the_latest_whenever_the_journal_was_read(tmp_path, objective):
    spec = spec_with(objective=objective)
    study = ended_study(tmp_path, spec, 900)
    whole, grown = Points(study, spec), Points(study, spec)
    grown.ended = {}
    for number in np.random.default_rng(1).permutation(900).tolist():  # trials don't end in their order
        grown.add(number, study.at(number))
    seen = [point.number for point in whole()]
    assert [point.number for point in grown()] == seen == sorted(seen)
    scored = [trial for trial in study.known() if trial.state != TrialState.FAIL]
    if objective == "frechet_distance":
        below, _ = _split_trials(study, scored, BEST)  # TPE's own
        best = {trial.number for trial in below}
    else:
        best = {trial.number for trial in study.best_trials}
    others = [trial.number for trial in scored if trial.number not in best]
    assert set(seen) == best | set(others[BEST - MANY :])


def test_what_the_sampler_sees_of_few_trials_is_all_but_those_that_failed(tmp_path):
    spec = spec_with()
    study = ended_study(tmp_path, spec, MANY)
    points = Points(study, spec)()
    assert [point.number for point in points] == [number for number in range(MANY) if number % 7 != 6]
    assert vars(points[0]) == vars(study.at(0))


# What the proposals are worth


def test_with_two_trials_at_once_the_search_beats_random_search(tmp_path):
    found = []
    for seed in range(5):
        (tmp_path / str(seed)).mkdir()
        spec = spec_with(seed=seed)
        study = study_in(tmp_path / str(seed), spec)
        searcher = StudySearcher(study, spec, lambda: 2)
        live = [searcher.suggest("0"), searcher.suggest("1")]
        for index in range(40):
            assert searcher.suggest("more") is None, "both places are taken, or all is proposed"
            searcher.on_trial_complete(str(index), evaluation(bowl(live[index]["parameters"])))
            if searcher.remaining:
                live.append(searcher.suggest(str(index + 2)))
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 40
        found.append(study.best_value)
    random = random_search(draws=40, repetitions=20_000)
    assert random == pytest.approx(0.32, abs=0.02)
    assert np.median(found) < random, found
