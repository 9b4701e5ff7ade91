"""The winner is the checkpoint that was scored, and it was scored again by what the search never saw."""

import hashlib
from dataclasses import replace

import pytest

from tuner.promote import CONTENDERS, contenders, promote
from tuner.run import write_atomic
from tuner.scoring import search_scorer
from tuner.spec import Spec
from tuner.study import BASELINE, read_study, table
from tuner.summary import EXTRACTORS, Summary
from tuner.vae.metrics import gap_closed
from tuner.workspace import Checkpoints

METRIC = "frechet_distance"


@pytest.fixture(scope="module")
def summary(finished_run):
    return finished_run.summary()


@pytest.fixture(scope="module")
def searched(finished_run, workspace):
    """The rows of the study, by trial number."""
    return table(read_study(finished_run.journal), workspace.spec)


def test_every_promoted_checkpoint_is_exactly_the_one_that_was_scored(workspace, summary, searched):
    scorer = search_scorer(workspace.spec, workspace.data, workspace.extractors["search"])
    for entry in summary.promotion:
        fitted, row = Checkpoints(workspace.run).best(workspace.run.checkpoint(entry.trial)), searched[entry.trial]
        assert fitted.epoch == entry.epoch == row["epoch"]
        for name, value in scorer(fitted).items():
            assert value == pytest.approx(row[name], rel=1e-9), name
            assert value == pytest.approx(fitted.scores[name], rel=1e-9), name
        assert entry.searched == row[METRIC]


def test_fresh_noise_gives_other_scores_than_the_search(summary):
    for entry in summary.promotion:
        assert entry.again["search"] != entry.searched
        assert entry.again["search"] == pytest.approx(entry.searched, rel=0.1)


def test_at_most_five_are_scored_again_and_the_best_rank_wins(summary, searched):
    entries, best = summary.promotion, summary.best
    ended_well = [row for row in searched if row["state"] != "failed"]
    assert len(entries) == min(CONTENDERS, len(ended_well)) >= 2
    assert len({entry.trial for entry in entries}) == len(entries)
    ranks = [entry.rank for entry in entries]
    assert ranks == sorted(ranks)
    assert (best.trial, best.epoch) == (entries[0].trial, entries[0].epoch)
    assert summary.validation.best.frechet_distance == pytest.approx(entries[0].again["search"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["", "unfinished"], ids=["ended", "cut off by a limit"])
def test_in_this_process_the_promotion_comes_out_as_on_the_cluster(workspace, run_copy, summary, searched, state):
    searched = [row | ({"state": state} if state and row["trial"] == summary.best.trial else {}) for row in searched]
    write_atomic(run_copy.summary_file, Summary(extractors=summary.extractors).model_dump_json())
    counts: list[int] = []
    again = promote(replace(workspace, run=run_copy), searched, counts.append)
    assert again == run_copy.summary()
    assert again.best == summary.best
    for ours, theirs in zip(again.promotion, summary.promotion, strict=True):
        assert (ours.trial, ours.epoch, ours.searched) == (theirs.trial, theirs.epoch, theirs.searched)
        assert ours.error == pytest.approx(theirs.error, rel=1e-6)
        for part in ("again", "gap_closed"):
            assert getattr(ours, part) == pytest.approx(getattr(theirs, part), rel=1e-9)
    assert list(again.validation.models) == ["baseline", "best"]
    assert counts == list(range(1, 1 + len(workspace.extractors) * (2 + len(summary.promotion))))


def test_the_winners_scores_are_those_of_its_checkpoint(workspace, bench, summary):
    best, scored, scorer = summary.best, summary.validation, bench.scorer()
    fitted = Checkpoints(workspace.run).best(workspace.run.checkpoint(best.trial))
    assert fitted.parameters.model_dump() == best.parameters
    reported = scored.best.model_dump()
    for name, value in scorer(fitted).items():
        assert reported[name] == pytest.approx(value, rel=1e-9), name
    assert scored.real.frechet_distance == pytest.approx(scorer.floor, rel=1e-9)
    closed = gap_closed(reported[METRIC], scorer.floor, scored.baseline.frechet_distance)
    assert scored.best.gap_closed == pytest.approx(closed)


def test_each_gap_that_the_searchs_extractor_sees_has_its_error(summary):
    for entry in summary.promotion:
        assert entry.again.keys() == entry.gap_closed.keys() == set(EXTRACTORS)
        assert entry.error > 0
    assert summary.promotion[0].error == pytest.approx(summary.validation.best.gap_closed_error, rel=1e-6)


def test_the_baseline_is_where_trial_0_ended_with_samples_from_a_standard_normal(workspace, bench, summary, searched):
    baseline = Checkpoints(workspace.run).baseline()
    assert searched[BASELINE]["epochs_trained"] == workspace.spec.budget.max_epochs
    assert baseline.parameters == workspace.spec.baseline.model_copy(update={"prior": "standard_normal"})
    scores = bench.scorer()(baseline)
    assert scores[METRIC] == scores["frechet_distance_standard_normal"]
    assert scores[METRIC] == pytest.approx(summary.validation.baseline.frechet_distance, rel=1e-9)


def test_the_extractors_are_frozen_by_hash_and_the_second_is_another(finished_run, workspace, summary):
    hashes = {name: hashlib.sha256(finished_run.extractor(name).read_bytes()).hexdigest() for name in EXTRACTORS}
    assert hashes == {name: info.sha256 for name, info in summary.extractors.items()}
    assert hashes["search"] != hashes["second"]
    for name, deep in zip(EXTRACTORS, (False, True), strict=True):
        described, extractor = summary.extractors[name], workspace.extractors[name]
        assert described.kind == extractor.kind == "classifier"
        assert extractor.options == {"classes": 10, "width": 16, "deep": deep}
        assert described.accuracy > 0.9
        floor = search_scorer(workspace.spec, workspace.data, extractor).floor
        assert described.floor == pytest.approx(floor, rel=1e-9)
    assert read_study(finished_run.journal).floor == summary.extractors["search"].floor


def test_of_two_objectives_those_on_the_front_with_the_best_samples_contend():
    spec = Spec.model_validate({"space": {"latent_dim": {"choices": [4]}}, "objective": ["rate", "distortion"]})
    assert (spec.trial_objective.metric, spec.selection_objective.metric) == (METRIC, METRIC)
    points = [
        (1.0, 9.0, 50.0),
        (5.0, 5.0, 20.0),
        (6.0, 5.0, 1.0),
        (9.0, 1.0, 30.0),
        (5.0, 5.0, 10.0),
        (0.1, 10.0, 99.0),
    ]
    rows = [
        {"trial": number, "state": "complete", "rate": rate, "distortion": distortion, METRIC: distance}
        for number, (rate, distortion, distance) in enumerate(points)
    ]
    rows += [{"trial": 6, "state": "waiting"}, {"trial": 7, "state": "failed", "rate": 0, "distortion": 0, METRIC: 0}]
    assert [row["trial"] for row in contenders(rows, spec)] == [4, 1, 3, 0, 5]  # 2 loses to 1 and 4, which are equal


def test_what_a_limit_cut_off_drives_others_off_the_front_and_makes_room_for_the_next():
    spec = Spec.model_validate({"space": {"latent_dim": {"choices": [4]}}, "objective": ["rate", "distortion"]})
    points = [(1.0, 9.0), (2.0, 8.0), (3.0, 7.0), (4.0, 6.0), (5.0, 5.0), (6.0, 4.0), (2.0, 7.0)]
    rows = [
        {"trial": trial, "state": "complete", "rate": rate, "distortion": distortion, METRIC: float(trial)}
        for trial, (rate, distortion) in enumerate(points)
    ]
    assert [row["trial"] for row in contenders(rows[:-1], spec)] == [0, 1, 2, 3, 4]
    rows[-1]["state"] = "unfinished"
    assert [row["trial"] for row in contenders(rows, spec)] == [0, 3, 4, 5, 6]


def test_a_single_objective_ranks_by_itself_in_its_direction():
    space = {"latent_dim": {"choices": [4]}}
    spec = Spec.model_validate({"space": space, "objective": "active_units"})
    rows = [{"trial": number, "state": "pruned", "active_units": units} for number, units in enumerate([3, 7, 7, 5])]
    assert [row["trial"] for row in contenders(rows, spec)] == [1, 2, 3, 0]
    assert Spec.model_validate({"space": space, "objective": "loss"}).selection_objective.metric == METRIC
