"""What a run suggests to do next, concluded from numbers that are made up here."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import create_trial

from tuner.advice import advice, failed_alike, ignored, importance, more_epochs, more_trials
from tuner.run import RunFiles
from tuner.spec import Spec
from tuner.study import distributions, open_study, read_study, table
from tuner.summary import Compared, Retrained, Scores
from tuner.vae.parameters import CLASSIC

SPEC = Spec.model_validate(
    {
        "space": {
            "latent_dim": {"type": "int", "low": 4, "high": 32},
            "learning_rate": {"type": "float", "low": 0.001, "high": 0.01},
        }
    }
)

POINT = ("kl_weight", "learning_rate", "kl_warmup_epochs")


def rows(*gaps: float) -> list[dict]:
    return [{"trial": trial, "state": "complete", "gap_closed": gap} for trial, gap in enumerate(gaps)]


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (0.95, "0.050 of the gap, more than twice the winner's standard error of 0.020: more trials will likely"),
        (0.93, "0.030 of the gap, the winner's standard error is 0.020: more trials are unlikely to"),
    ],
)
def test_more_trials_pay_where_the_last_third_gained_beyond_the_errors(last, said):
    (found,) = more_trials(rows(0, 0.5, 0.9, 0.7, 0.8, 0.85, 0.6, 0.3, 0.2, 0.1, last, 0.4), error=0.02)
    assert found == f"The last 4 of 12 trials brought {said} pay."


def test_of_a_few_trials_nothing_is_said():
    assert not list(more_trials(rows(0, 0.5, 0.9), error=0.02))


@pytest.mark.parametrize(
    ("kept", "gap", "said"),
    [
        (50, 0.98, "brought 0.080 ± 0.014 of the gap, and the last is the best: more (retrain.epochs) will likely pay"),
        (50, 0.915, "brought 0.015 ± 0.014 of the gap: more epochs are unlikely to pay"),
        (30, 0.98, "of the gap, and what is kept is of epoch 30: more epochs are unlikely to pay"),
    ],
)
def test_more_epochs_pay_where_they_brought_more_than_the_errors_to_the_end(kept, gap, said):
    scores = {
        name: Scores(frechet_distance=1, gap_closed=closed, gap_closed_error=0.01)
        for name, closed in (("real", 1), ("baseline", 0), ("best", 0.85), ("refitted", 0.9), ("retrained", gap))
    }
    retrained = Retrained(
        epochs=50, trial=1, kept_epoch=kept, parameters=CLASSIC.model_dump(), searched=CLASSIC.model_dump()
    )
    (found,) = more_epochs(retrained, Compared(**scores))
    assert said in found


def test_failures_of_one_kind_are_counted_and_answered():
    failed = [{"state": "failed", "reason": f"diverged: at epoch {epoch}"} for epoch in (1, 2)]
    assert list(failed_alike([*rows(*[0.5] * 8), *failed])) == [
        "2 of 10 trials failed alike (diverged): search lower learning rates."
    ]
    assert not list(failed_alike([*rows(*[0.5] * 18), *failed[:1]]))


def test_a_parameter_that_explains_nothing_is_named(tmp_path: Path):
    study = open_study(tmp_path / "journal", SPEC)
    for latent_dim, rate in product(range(4, 32, 2), (0.001, 0.003, 0.01)):
        point = {"latent_dim": latent_dim, "learning_rate": rate}
        study.add_trial(create_trial(params=point, distributions=distributions(SPEC), value=latent_dim**2))
    shares = importance(study, SPEC)
    (found,) = ignored(rows(*[0.5] * 10), shares)
    assert found.startswith("learning_rate hardly mattered (")
    assert not list(ignored(rows(*[0.5] * 9), shares)), "too few to say so"


def test_of_a_few_trials_the_parameter_that_explains_all_has_nearly_all(tmp_path: Path):
    spec = Spec.model_validate({"space": {name: {"type": "float", "low": 0.001, "high": 1} for name in POINT}})
    study, random = open_study(tmp_path / "journal", spec), np.random.default_rng(0)
    study.add_trial(create_trial(value=2.0))  # the baseline, outside of the space
    for number in range(12):
        assert bool(importance(study, spec)) == (number >= 4)
        point = {name: random.uniform(0.001, 1) for name in POINT}
        study.add_trial(create_trial(params=point, distributions=distributions(spec), value=point["kl_weight"] ** 2))
    shares = importance(study, spec)
    assert list(shares) == sorted(shares, key=shares.__getitem__, reverse=True)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["kl_weight"] > 0.9  # here Optuna's own choice gives it three quarters


def test_of_a_parameter_that_has_one_value_among_complete_trials_nothing_is_said(tmp_path: Path):
    prior = {"choices": ["standard_normal", "gaussian_mixture"]}
    spec = Spec.model_validate({"space": SPEC.space | {"prior": prior}})
    study = open_study(tmp_path / "journal", spec)
    for latent_dim in range(4, 32, 2):
        point = {"latent_dim": latent_dim, "learning_rate": latent_dim / 4_000, "prior": "gaussian_mixture"}
        study.add_trial(create_trial(params=point, distributions=distributions(spec), value=latent_dim**2))
    assert importance(study, spec).keys() == {"latent_dim", "learning_rate"}


def test_where_all_trials_came_to_the_same_nothing_explains_it(tmp_path: Path):
    study = open_study(tmp_path / "journal", SPEC)
    for latent_dim in range(4, 32, 2):
        point = {"latent_dim": latent_dim, "learning_rate": 0.003}
        study.add_trial(create_trial(params=point, distributions=distributions(SPEC), value=8.0))
    assert importance(study, SPEC) == {}


def test_a_finished_run_gets_it_and_an_unfinished_none(finished_run: RunFiles):
    summary, study = finished_run.summary(), read_study(finished_run.journal)
    spec = Spec.model_validate({"space": SPEC.space})
    given = table(study, spec)
    assert any("epochs after the search" in said for said in advice(given, summary, spec, {}))
    assert not advice(given, summary.model_copy(update={"best": None, "retrain": None}), spec, {})
