"""Finalists are trained on as trials are; what is kept is chosen under the prior that is exported, and errors count."""

from dataclasses import replace

import pytest
import torch
from runs import trials_of, without_retrain

from tuner.pool import RayPool
from tuner.retrain import Candidate, choose, contenders, priors, refitted, retrain
from tuner.run import RunFiles, write_atomic
from tuner.scoring import Measured
from tuner.searcher import StudySearcher, add_finalists
from tuner.spec import Objective, Spec
from tuner.study import RETRAIN, evaluations, open_study, read_study, table
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.errors import Refused
from tuner.vae.fitted import FittedModel
from tuner.vae.model import Builder
from tuner.vae.parameters import Parameters
from tuner.vae.prior import standard_normal
from tuner.vae.seeds import Stream, derive_seed
from tuner.vae.shape import ImageShape
from tuner.vae.step import State
from tuner.workspace import Checkpoints, Workspace

SMALL = Parameters(latent_dim=2, width=2, prior="gaussian_mixture", prior_components=10)
MODEL = Builder(ImageShape(1, 28, 28))(SMALL, seed=0)
DRAWN = Objective.model_validate("frechet_distance")


def fitted_at(epoch: float, components: int = 10, prior: str = "gaussian_mixture", **scores: float) -> FittedModel:
    parameters = SMALL.model_copy(update={"prior": prior, "prior_components": components})
    return FittedModel(MODEL, parameters, standard_normal(2), epoch=epoch, scores=scores)


# The choice


def candidate(
    distance: float, epoch: float, components: int = 10, trial: int = 1, error: float = 1, **scores: float
) -> Candidate:
    """What one half has more than the whole, the other has less: by about the error."""
    half = error * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(100)
    replicates = distance + torch.cat([torch.zeros(1, dtype=torch.float64), half, -half])
    scores = {"frechet_distance": distance} | scores
    return Candidate(trial, fitted_at(epoch, components, **scores), Measured(scores, replicates))


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        # (distance, epoch, components)
        ([(10, 5, 10), (10.9, 50, 10)], 1),  # within one error: the most trained
        ([(10, 5, 10), (11.1, 50, 10)], 0),  # beyond it
        ([(10, 5, 10), (10.9, 25, 10), (10.8, 50, 100), (11.1, 50, 10)], 2),  # ... before the fewest components
        ([(10, 50, 100), (10.9, 50, 20), (10.5, 50, 50)], 1),  # then the fewest components
        ([(10, 50, 100), (11.1, 50, 20), (10.5, 50, 50)], 2),
        ([(10.5, 50, 20), (10.1, 50, 20), (10, 50, 50)], 1),  # then the best
        ([(10, 0, 10), (11.1, 45, 10), (12, 50, 10)], 0),  # a start, where training did harm
        ([(10, 0, 10), (10, 50, 10)], 1),
        ([(12, 50, 10)], 0),
    ],
)
def test_of_those_within_one_standard_error_of_the_best_the_most_trained_then_the_simplest_is_kept(found, chosen):
    candidates = [candidate(*each) for each in found]
    assert choose(candidates, DRAWN) is candidates[chosen]
    assert choose(candidates[::-1], DRAWN) is candidates[chosen], "whatever their order"


def test_the_error_that_counts_is_that_of_the_best():
    sure, unsure = candidate(10, 5, error=0.1), candidate(10.5, 50, error=3)
    assert choose([sure, unsure], DRAWN) is sure
    sure, unsure = candidate(10.5, 50, error=0.1), candidate(10, 5, error=3)
    assert choose([sure, unsure], DRAWN) is sure


def test_where_no_error_is_known_the_best_is_taken():
    best, other = (replace(candidate(10, 5), measured=Measured({"frechet_distance": 10})), candidate(10.1, 50))
    assert choose([other, best], DRAWN) is best


def test_which_trial_it_is_of_makes_no_difference():
    first, second = candidate(10, 50, trial=1), candidate(10.5, 50, trial=2)
    assert choose([first, second], DRAWN) is first
    assert choose([replace(first, trial=2), replace(second, trial=1)], DRAWN).trial == 2


def test_by_another_objective_the_best_is_taken_whatever_its_distance():
    candidates = [candidate(9, 50, mse=0.2, active_units=7), candidate(10, 5, mse=0.1, active_units=6)]
    assert choose(candidates, Objective.model_validate("mse")) is candidates[1]
    assert choose(candidates, Objective.model_validate("active_units")) is candidates[0]
    assert choose(candidates, Objective(metric="mse", direction="maximize")) is candidates[0]


# Who is a candidate


def ended(best: float | None, at: float) -> Checkpoint:
    """A finalist that scored best at this epoch, and came as far as `at`."""
    model = Builder(ImageShape(1, 28, 28))(SMALL, seed=1)
    return Checkpoint(SMALL, State.of(model), fitted_at(best) if best else None, {"epoch": at} if at else {})


@pytest.mark.parametrize(
    ("best", "at", "epochs"),
    [
        (30, 50, [50, 30]),
        (50, 50, [50]),
        (10, 15, [10]),  # it diverged on the way
        (None, 0, []),  # at once
    ],
)
def test_a_finalist_stands_as_its_last_epoch_and_the_one_that_scored_best(best, at, epochs):
    end = ended(best, at)
    found = contenders(end, 50)
    assert [fitted.epoch for fitted in found] == epochs
    for fitted in found:
        assert fitted.model is (end.state.model if fitted.epoch == 50 else MODEL)
        assert fitted.parameters == SMALL


def spec_with(*components: int) -> Spec:
    named = [{"prior": "gaussian_mixture", "prior_components": count} for count in components]
    return Spec.model_validate({"space": {"latent_dim": {"choices": [2, 4]}}, "retrain": {"priors": named}})


def test_each_gets_the_priors_of_the_spec_a_start_its_own_as_well_and_the_standard_normal_stays():
    named = [{"prior": "gaussian_mixture", "prior_components": count} for count in (10, 50)]
    spec = spec_with(10, 50)
    assert priors(fitted_at(50, 20), spec) == named
    assert priors(fitted_at(0, 20), spec) == [*named, {}]
    assert priors(fitted_at(50, 20), spec_with()) == [{}]
    for epoch in (0, 50):
        assert priors(fitted_at(epoch, prior="standard_normal"), spec) == [{}]


def test_each_model_is_fitted_with_each_of_its_priors_and_what_diverges_is_left_out(workspace, finished_run):
    run, spec = finished_run, spec_with(3)
    start = replace(Checkpoints(run).best(run.checkpoint(run.summary().best.trial)), epoch=0)
    wild = start.snapshot()
    wild.model.mean.weight.data.fill_(torch.nan)
    counts: list[int] = []
    found = refitted(workspace.workers(), [(7, start), (8, replace(wild, epoch=4))], spec, counts.append)
    assert counts == [1, 2, 3]
    assert [(each.trial, each.fitted.parameters.prior_components) for each in found] == [
        (7, 3),
        (7, start.parameters.prior_components),
    ]
    for each in found:
        assert each.fitted.scores == each.measured.scores
        assert each.fitted.model is start.model


# A finished run


def kept_by(run: RunFiles) -> FittedModel:
    return Checkpoints(run).best(run.kept)


def same_weights(first: FittedModel, second: FittedModel) -> bool:
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_finalists_are_trials_of_a_study_of_their_own(finished_run, workspace):
    study, summary = read_study(finished_run.journal, RETRAIN), finished_run.summary()
    search = read_study(finished_run.journal)
    assert len(search.known()) == workspace.spec.budget.trials
    assert (study.floor, study.baseline) == (search.floor, search.baseline)
    rows = table(study, workspace.spec.of_retrain(2, 0))
    assert [row["state"] for row in rows] == ["complete"] * 2
    for number, entry in enumerate(summary.promotion[:2]):
        scored = evaluations(study.known()[number])
        assert [found["epoch"] for found in scored] == [1, 2, 3, 4]
        start = Checkpoints(finished_run).best(finished_run.checkpoint(entry.trial))
        trained = Parameters.model_validate(study.known()[number].user_attrs["parameters"])
        changed = {"schedule": "cosine", "warmup_steps": 100, "kl_warmup_epochs": 0.0}
        assert trained == start.parameters.model_copy(update=changed)
        end = Checkpoints(finished_run).read(finished_run.of_retrain().checkpoint(number))
        assert end.evaluation["epoch"] == 4
        distances = {found["epoch"]: found["frechet_distance"] for found in scored}
        best = min(distances, key=distances.__getitem__)
        assert (end.best.epoch, end.best.scores["frechet_distance"]) == (best, distances[best])


def test_what_is_kept_is_a_finalist_at_some_epoch_with_one_of_the_priors_exactly_as_it_was_scored(
    finished_run, workspace, bench
):
    summary, kept = finished_run.summary(), kept_by(finished_run)
    assert (summary.retrain.epochs, summary.retrain.kept_epoch) == (4, kept.epoch)
    assert summary.retrain.parameters == kept.parameters.model_dump()
    assert summary.retrain.searched == trials_of(finished_run)[summary.retrain.trial].user_attrs["parameters"]
    finalists = [entry.trial for entry in summary.promotion[:2]]
    end = Checkpoints(finished_run).read(finished_run.of_retrain().checkpoint(finalists.index(summary.retrain.trial)))
    (source,) = (fitted for fitted in contenders(end, 4) if fitted.epoch == kept.epoch)
    assert same_weights(kept, source)
    again, _ = bench.refit(source, kept.parameters)
    assert again.parameters.prior_components == 5
    for name, value in again.scores.items():
        assert kept.scores[name] == pytest.approx(value, rel=1e-9), name
        assert summary.validation.retrained.model_dump()[name] == pytest.approx(value, rel=1e-9), name


def test_the_best_trial_with_a_prior_chosen_anew_has_the_weights_of_the_best_trial(finished_run, bench):
    summary, fitted = finished_run.summary(), Checkpoints(finished_run).best(finished_run.refitted)
    best = Checkpoints(finished_run).best(finished_run.checkpoint(summary.best.trial))
    assert same_weights(fitted, best)
    assert fitted.epoch == 0
    assert fitted.parameters.model_copy(update={"prior_components": 10}) == best.parameters
    for name, value in bench.scorer()(fitted).items():
        assert summary.validation.refitted.model_dump()[name] == pytest.approx(value, rel=1e-9), name


# On a cluster


def cut_off(run: RunFiles, workspace: Workspace) -> None:
    """The retrain of a run, its first finalist begun and its checkpoint damaged."""
    spec = workspace.spec.of_retrain(2, derive_seed(workspace.spec.seed, Stream.RETRAIN) % 2**32)
    other, study = read_study(workspace.run.journal, RETRAIN), open_study(run.journal, spec, RETRAIN)
    study.set_user_attr("made_of", other.user_attrs["made_of"])
    parameters = [Parameters.model_validate(trial.user_attrs["parameters"]) for trial in other.known()]
    add_finalists(study, parameters[:1])
    StudySearcher(study, spec).suggest("a")
    path = run.of_retrain().checkpoint(0)
    write_atomic(path, (workspace.run.path / path.relative_to(run.path)).read_bytes()[:-100])


@pytest.fixture(scope="module")
def pool(ray_cluster: str, workspace: Workspace) -> RayPool:
    return RayPool(workspace.spec, workspace.data)


@pytest.mark.slow
def test_a_finalist_that_diverges_is_out_of_it_and_the_start_remains(run_copy, workspace, pool):
    run = without_retrain(run_copy)
    finalists = [entry.trial for entry in run.summary().promotion[:2]]
    starts = []
    for trial in finalists:
        checkpoint = Checkpoints(run).read(run.checkpoint(trial))
        wild = replace(
            checkpoint.best, parameters=checkpoint.best.parameters.model_copy(update={"learning_rate": 1e12})
        )
        starts.append(wild)
        checkpoint.best = wild
        write_atomic(run.checkpoint(trial), checkpoint.to_bytes())
    summary = retrain(replace(workspace, run=run, pool=pool), pool)
    study = read_study(run.journal, RETRAIN)
    assert [row["state"] for row in table(study, workspace.spec)] == ["failed"] * 2
    assert all(trial.user_attrs["reason"].startswith("diverged: ") for trial in study.known())
    assert (summary.retrain.trial, summary.retrain.kept_epoch) == (finalists[0], 0)
    assert same_weights(kept_by(run), starts[0])


def test_a_checkpoint_of_a_finalist_that_has_ended_is_missed_by_its_name(run_copy, workspace):
    path = run_copy.of_retrain().checkpoint(1)
    path.unlink()
    with pytest.raises(Refused, match=r"retrain/0001\.pt: not readable as a checkpoint: .*No such file"):
        retrain(replace(workspace, run=run_copy), workspace.workers())
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        pytest.param("the promotion", marks=pytest.mark.long),
        pytest.param("a damaged checkpoint", marks=pytest.mark.long),
        "its end",
    ],
)
def test_from_wherever_it_begins_it_ends_bit_for_bit_with_the_same_numbers(
    run_copy, finished_run, workspace, pool, start
):
    run = run_copy if start == "its end" else without_retrain(run_copy)
    if start == "a damaged checkpoint":
        cut_off(run, workspace)
    summary, expected = retrain(replace(workspace, run=run, pool=pool), pool), finished_run.summary()
    assert (summary.retrain, summary.validation) == (expected.retrain, expected.validation)
    assert same_weights(kept_by(run), kept_by(finished_run))
