"""A warm start: the sampler knows the trials of earlier runs, and nothing else of the run does."""

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from tuner.extractors import load_extractors
from tuner.run import RunFiles
from tuner.searcher import StudySearcher
from tuner.spec import Spec, load
from tuner.study import WARM_START, open_study, read_study, table
from tuner.vae.errors import Refused
from tuner.vae.extractor import to_bytes
from tuner.warm_start import gather, take_over


def like(earlier: RunFiles, **parts: Any) -> Spec:
    """The spec of a run, with another seed and warm-started by the run."""
    known = load(earlier.spec).model_dump(mode="json")
    return Spec.model_validate(known | {"warm_start": [str(earlier.path)], "seed": 9, "points_to_evaluate": []} | parts)


def started(run: RunFiles, earlier: RunFiles, **parts: Any) -> Spec:
    """The run after its warm start -> its spec."""
    spec = like(earlier, **parts)
    take_over(run, spec, gather(run, spec, earlier.held_out.read_bytes()))
    return spec


def finished(run: RunFiles) -> list[FrozenTrial]:
    """Its trials that came to an end with scores; the first, the baseline, is no point of the space."""
    return [
        trial for trial in read_study(run.journal).known() if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    ]


@pytest.fixture
def run(tmp_path) -> RunFiles:
    (tmp_path / "run").mkdir()
    return RunFiles(tmp_path / "run")


def test_finished_trials_are_known_to_the_sampler_and_are_none_of_the_runs(run, finished_run):
    spec = started(run, finished_run)
    study = open_study(run.journal, spec)
    theirs = finished(finished_run)[1:]
    assert study.known() == table(study, spec) == []
    assert [trial.user_attrs["trial"] for trial in study.foreign()] == [
        f"{finished_run.path}/{trial.number}" for trial in theirs
    ]
    for foreign, trial in zip(study.foreign(), theirs, strict=True):
        assert (foreign.state, foreign.values) == (trial.state, trial.values)
        assert foreign.intermediate_values == trial.intermediate_values
        assert foreign.params.items() <= trial.user_attrs["parameters"].items()
    searcher = StudySearcher(study, spec)
    assert searcher.remaining == spec.budget.trials
    assert searcher.suggest("a")["trial"] == 1  # the baseline is run anew


def test_what_is_proposed_depends_on_what_is_known(tmp_path, finished_run):
    """Seven times a run's: more than the ten with which TPE begins to learn."""
    proposed = {}
    for name, earlier in (("cold", []), ("warm", [str(finished_run.path)] * 7)):
        (tmp_path / name).mkdir()
        run = RunFiles(tmp_path / name)
        spec = started(run, finished_run, warm_start=earlier)
        proposed[name] = StudySearcher(open_study(run.journal, spec), spec).suggest("a")["parameters"]
    assert proposed["cold"] != proposed["warm"]


def test_the_run_scores_with_the_extractors_of_the_earlier_one(run, finished_run):
    started(run, finished_run)
    assert run.summary().extractors == finished_run.summary().extractors
    ours, theirs = load_extractors(run), load_extractors(finished_run)
    assert {name: to_bytes(made) for name, made in ours.items()} == {
        name: to_bytes(made) for name, made in theirs.items()
    }


def test_trials_that_are_no_points_of_the_space_are_told_by_what_stands_in_the_way(run, finished_run):
    everything = finished(finished_run)
    theirs = [trial.user_attrs["parameters"] for trial in everything[1:]]
    spec = load(finished_run.spec)
    low = sorted(had["kl_weight"] for had in theirs)[1]
    space = spec.model_dump(mode="json")["space"]
    space["kl_weight"] |= {"low": low}
    (earlier,) = gather(run, like(finished_run, space=space), finished_run.held_out.read_bytes())
    assert len(earlier.trials) == len(theirs) - 1
    assert earlier.unfit == {"kl_weight": 1, "temperature": 1}
    fixed = spec.fixed | {"width": 8}
    (none,) = gather(run, like(finished_run, fixed=fixed), finished_run.held_out.read_bytes())
    assert (none.trials, none.unfit["width"]) == ([], len(everything))
    assert f"{finished_run.path}: 0 trials are known; others don't fit: width ({len(everything)})" in none.words
    longer = spec.budget.model_dump() | {"max_epochs": 40}
    (other,) = gather(run, like(finished_run, budget=longer), finished_run.held_out.read_bytes())
    assert other.unfit == {"the rungs of its budget": len(everything), "temperature": 1}


def test_a_warm_start_that_was_cut_off_goes_on_and_one_that_is_done_needs_the_earlier_run_no_more(
    run, finished_run, tmp_path
):
    spec = like(finished_run)
    (earlier,) = gather(run, spec, finished_run.held_out.read_bytes())
    open_study(run.journal, spec, WARM_START).add_trials(earlier.trials[:2])
    take_over(run, spec, gather(run, spec, finished_run.held_out.read_bytes()))
    assert len(read_study(run.journal, WARM_START).known()) == len(earlier.trials)
    gone = like(finished_run, warm_start=[str(tmp_path / "gone")])
    assert gather(run, gone, b"") == []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: run.spec.unlink(), "not a run directory"),
        (lambda run: run.held_out.write_bytes(b"others"), "a run on other images"),
        (lambda run: run.journal.unlink(), "searched for another objective, or nothing yet"),
        (lambda run: run.update_summary(extractors={}) and run.summary_file.unlink(), "has no feature extractor yet"),
    ],
)
def test_scores_that_do_not_compare_are_refused(run, run_copy, finished_run, spoil, said):
    spec = like(finished_run, warm_start=[str(run_copy.path)])
    spoil(run_copy)
    with pytest.raises(Refused, match=f"^warm_start: {run_copy.path}: {said}$"):
        gather(run, spec, finished_run.held_out.read_bytes())
    own = like(finished_run).model_copy(update={"features": Path("my.pt2"), "features_sha256": "0" * 64})
    with pytest.raises(Refused, match=r"scored with another extractor than features: my\.pt2$"):
        gather(run, own.model_copy(update={"warm_start": (finished_run.path,)}), finished_run.held_out.read_bytes())
    other = like(finished_run, objective="mse")
    with pytest.raises(Refused, match="another objective"):
        gather(run, other, finished_run.held_out.read_bytes())
