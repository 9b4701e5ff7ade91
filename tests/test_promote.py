"""The winner is the checkpoint that was scored, and it was scored again by what the search never saw."""

import csv
import hashlib

import pytest

from tuner.promote import CANDIDATES, contenders
from tuner.spec import Spec
from tuner.trainable import search_scorer
from tuner.vae.score import gap_closed
from tuner.workspace import EXTRACTORS, best_of, last_of

METRIC = "frechet_distance"


@pytest.fixture(scope="module")
def summary(finished_run):
    return finished_run.summary()


@pytest.fixture(scope="module")
def searched(finished_run):
    """The rows of trials.csv by trial number, as text."""
    with finished_run.trials.open(newline="") as file:
        return {int(row["trial"]): row for row in csv.DictReader(file)}


def test_every_promoted_checkpoint_is_exactly_the_one_that_was_scored(workspace, summary, searched):
    scorer = search_scorer(workspace.spec, workspace.data, workspace.extractors["search"])
    for entry in summary["promotion"]:
        candidate, row = best_of(workspace.run, entry["trial"]), searched[entry["trial"]]
        scores = scorer(candidate.model, candidate.parameters, candidate.prior)
        assert candidate.epoch == entry["epoch"] == float(row["epoch"])
        for name, value in scores.items():
            assert value == pytest.approx(float(row[name]), rel=1e-9), name
        assert entry["searched"] == float(row[METRIC])


def test_fresh_noise_gives_other_scores_than_the_search(summary):
    for entry in summary["promotion"]:
        assert entry[f"search_{METRIC}"] != entry["searched"]
        assert entry[f"search_{METRIC}"] == pytest.approx(entry["searched"], rel=0.1)


def test_at_most_five_are_scored_again_and_the_best_rank_wins(summary, searched):
    table = summary["promotion"]
    ended_well = [row for row in searched.values() if row["state"] != "failed"]
    assert len(table) == min(CANDIDATES, len(ended_well)) >= 2
    assert len({entry["trial"] for entry in table}) == len(table)
    ranks = [entry["rank"] for entry in table]
    assert ranks == sorted(ranks)
    assert summary["best"]["trial"] == table[0]["trial"]
    assert summary["best"]["epoch"] == table[0]["epoch"]
    assert summary["best"][METRIC] == table[0][f"search_{METRIC}"]


def test_the_winners_scores_are_those_of_its_checkpoint(workspace, summary):
    best = summary["best"]
    candidate, scorer = best_of(workspace.run, best["trial"]), workspace.scorer()
    assert candidate.parameters.model_dump() == best["params"]
    for name, value in scorer(candidate.model, candidate.parameters, candidate.prior).items():
        assert best[name] == pytest.approx(value, rel=1e-9), name
    assert summary["floor"] == pytest.approx(scorer.floor, rel=1e-9)
    assert best["gap_closed"] == pytest.approx(gap_closed(best[METRIC], summary["floor"], summary["baseline"]))


def test_the_baseline_is_where_trial_0_ended_with_samples_from_a_standard_normal(workspace, summary, searched):
    baseline, scorer = last_of(workspace.run, 0), workspace.scorer()
    assert baseline.epoch == float(searched[0]["epochs_trained"]) == workspace.spec.budget.max_epochs
    assert baseline.parameters.prior == "standard_normal"
    scores = scorer(baseline.model, baseline.parameters, baseline.prior)
    assert scores[METRIC] == scores["frechet_distance_standard_normal"]
    assert scores[METRIC] == pytest.approx(summary["baseline"], rel=1e-9)


def test_the_extractors_are_frozen_by_hash_and_the_second_is_another(finished_run, workspace, summary):
    hashes = {name: hashlib.sha256(finished_run.extractor(name).read_bytes()).hexdigest() for name in EXTRACTORS}
    assert hashes == {name: extractor["sha256"] for name, extractor in summary["extractors"].items()}
    assert hashes["search"] != hashes["second"]
    assert not workspace.extractors["search"].deep
    assert workspace.extractors["second"].deep
    assert all(extractor["accuracy"] > 0.9 for extractor in summary["extractors"].values())


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


def test_a_single_objective_ranks_by_itself_in_its_direction():
    space = {"latent_dim": {"choices": [4]}}
    spec = Spec.model_validate({"space": space, "objective": "active_units"})
    rows = [{"trial": number, "state": "pruned", "active_units": units} for number, units in enumerate([3, 7, 7, 5])]
    assert [row["trial"] for row in contenders(rows, spec)] == [1, 2, 3, 0]
    assert Spec.model_validate({"space": space, "objective": "loss"}).selection_objective.metric == METRIC
