"""The spec that a run is worked on by, what it can grow by, and what of its results holds then."""

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

from tuner import spec as specs
from tuner.job import NothingFound, Request, fastest_precision, load_spec, outgrown_by, require_found
from tuner.run import RunFiles, write_atomic
from tuner.spec import DEFAULT, Spec, load
from tuner.study import open_study, read_study

SEARCHED = {"retrain": None, "test": None, "promotion": (), "best": None, "validation": None}


def with_keys(run: RunFiles, **keys: Any) -> Spec:
    """The run's spec with some keys laid over it by a command."""
    laid = [(key.replace("__", "."), value) for key, value in keys.items()]
    return load_spec(run, Request(overrides=laid))


def cut_off(run: RunFiles, **keys: Any) -> None:
    """Have a run of five trials be one of six under a limit, which cut the last off."""
    write_atomic(run.spec, specs.load(run.spec, [("budget.trials", 6), ("budget.time_limit", 60)]).to_yaml())
    study = open_study(run.journal, specs.load(run.spec))
    told = {"parameters": study.known()[1].user_attrs["parameters"], "reason": "time limit"}
    study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=told))


def test_nothing_is_outgrown_by_the_same_spec_or_by_what_changes_no_result(finished_run, tmp_path):
    assert outgrown_by(with_keys(finished_run), finished_run) == {}
    assert outgrown_by(with_keys(finished_run, budget__time_limit=60), finished_run) == {}, "no trial is left"
    assert outgrown_by(with_keys(finished_run, execution="process", resources__cpu=2), finished_run) == {}
    assert outgrown_by(with_keys(RunFiles(tmp_path)), RunFiles(tmp_path)) == {}


def test_more_trials_have_all_stages_after_the_search_done_anew(finished_run):
    assert outgrown_by(with_keys(finished_run, budget__trials=6), finished_run) == SEARCHED
    both = with_keys(finished_run, budget__trials=6, retrain__epochs=5)
    assert outgrown_by(both, finished_run) == SEARCHED


@pytest.mark.parametrize("limit", [None, 90], ids=["none", "longer"])
def test_a_lifted_limit_has_the_search_go_on_where_it_cut_it_off(run_copy, limit):
    cut_off(run_copy)
    assert outgrown_by(with_keys(run_copy), run_copy) == {}, "under the same limit the run is done"
    assert outgrown_by(with_keys(run_copy, budget__time_limit=limit), run_copy) == SEARCHED


def test_a_lifted_plateau_has_the_search_go_on(run_copy):
    flat = {"trials": 1, "min_improvement": 0.9}
    write_atomic(run_copy.spec, with_keys(run_copy, budget__plateau=flat, budget__trials=9).to_yaml())
    assert outgrown_by(with_keys(run_copy), run_copy) == {}
    assert outgrown_by(with_keys(run_copy, budget__plateau=None), run_copy) == SEARCHED


@pytest.mark.parametrize("key", [{"retrain__epochs": 5}, {"retrain__finalists": 1}, {"retrain__priors": []}])
def test_another_retrain_leaves_search_and_promotion_as_they_are(run_copy, key):
    validation = run_copy.summary().validation
    found = outgrown_by(with_keys(run_copy, **key), run_copy)
    assert found.keys() == {"retrain", "test", "validation"}
    summary = run_copy.update_summary(**found)
    assert (summary.retrain, summary.test, list(summary.validation.models)) == (None, None, ["baseline", "best"])
    assert summary.validation.best == validation.best
    assert outgrown_by(with_keys(run_copy, **key), run_copy) == {}, "cut off here, the run is one to be retrained"


def test_what_would_change_finished_trials_is_refused(finished_run):
    for key, value in {"budget.trials": 4, "budget.max_epochs": 8, "fixed.width": 8, "seed": 1}.items():
        with pytest.raises(ValueError, match=f"belongs to another spec: {key}: "):
            load_spec(finished_run, Request(overrides=[(key, value)]))


@pytest.mark.parametrize("state", ["waiting", "unfinished"])
def test_a_limit_that_came_before_the_baseline_was_scored_is_named(state):
    unscored = {"trial": 0, "state": state, "reason": "", "epochs_trained": 0}
    for rows in ([], [unscored], [unscored, unscored | {"state": "complete", "epochs_trained": 1}]):
        with pytest.raises(NothingFound, match=r"budget\.time_limit came before the baseline was scored"):
            require_found(rows)
    require_found([unscored | {"state": "unfinished", "epochs_trained": 1}])


def test_the_journal_is_only_looked_at(run_copy):
    content = run_copy.journal.read_bytes()
    outgrown_by(with_keys(run_copy, budget__trials=6), run_copy)
    assert run_copy.journal.read_bytes() == content
    assert len(read_study(run_copy.journal).known()) == 5


def spec(precision: str, **rest: object) -> Spec:
    return load(DEFAULT, [("fixed.precision", precision), *rest.items()])


def test_bfloat16_is_for_processors_with_instructions_for_it_and_no_gpu_beside():
    flags = Path("/proc/cpuinfo")
    known = flags.read_text().split() if flags.exists() else []
    fast = ("avx512_bf16" in known or "amx_bf16" in known) and not torch.cuda.is_available()
    assert fastest_precision(spec("auto")) == ("bfloat16" if fast else "float32")
    assert fastest_precision(spec("auto", **{"resources.gpu": 0.5})) == "float32"


def test_what_auto_means_is_decided_once_a_run(tmp_path):
    run = RunFiles(tmp_path / "run")
    request = Request(overrides=[("fixed.precision", "auto")])
    decided = load_spec(run, request)
    assert decided == spec(fastest_precision(decided))
    (other,) = {"float32", "bfloat16"} - {decided.fixed["precision"]}
    write_atomic(run.spec, spec(other).to_yaml())  # begun on another machine
    assert load_spec(run, request) == spec(other)
    with pytest.raises(ValueError, match=f"fixed.precision: {decided.fixed['precision']} here, {other} there"):
        load_spec(run, Request(overrides=[("fixed.precision", decided.fixed["precision"])]))


def test_auto_is_no_choice_of_a_trial():
    with pytest.raises(ValueError, match=r"space\.precision: auto is decided once a run"):
        load(DEFAULT, [("space.precision", {"choices": ["auto", "float32"]})])
