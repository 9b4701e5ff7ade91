"""Retraining goes on where it stopped, to the last bit, and never ends worse than it started."""

import shutil
from dataclasses import replace

import pytest
import torch

from tuner.retrain import main, retrain
from tuner.run import RunFiles, write_atomic
from tuner.vae.fitted import FittedModel
from tuner.workspace import Checkpoints, open_workspace


class Stopped(Exception):
    pass


def start_of(run: RunFiles) -> FittedModel:
    return Checkpoints(run).best(run.checkpoint(run.summary().best.trial))


def kept_by(run: RunFiles) -> FittedModel:
    return Checkpoints(run).best(run.retrain_checkpoint)


def same_weights(first: FittedModel, second: FittedModel) -> bool:
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_result_is_never_worse_than_the_best_trial_on_validation(workspace, finished_run):
    best, retrained = finished_run.summary().best, finished_run.summary().retrain
    kept, scorer = kept_by(finished_run), workspace.scorer()
    before, after = (scorer(fitted)["frechet_distance"] for fitted in (start_of(finished_run), kept))
    assert after <= before
    assert best.scores.frechet_distance == pytest.approx(before, rel=1e-9)
    assert retrained.scores.frechet_distance == pytest.approx(after, rel=1e-9)
    assert retrained.scores.gap_closed >= best.scores.gap_closed
    assert (retrained.epochs, retrained.kept_epoch) == (4, kept.epoch)


def test_the_prior_has_one_of_the_sizes_asked_for(workspace, finished_run):
    kept, summary = kept_by(finished_run).parameters, finished_run.summary()
    assert summary.retrain.parameters == kept.model_dump()
    assert kept.prior_components in {5, 10}
    assert len(kept_by(finished_run).prior.weights) == kept.prior_components
    fixed = kept.model_copy(update={"prior_components": workspace.spec.fixed["prior_components"]})
    assert fixed.model_dump() == summary.best.parameters


def test_stopped_after_each_epoch_it_ends_bit_for_bit_as_without_a_stop(run_copy, finished_run):
    shutil.rmtree(run_copy.retrain)
    workspace, epochs = open_workspace(run_copy), []

    def stop(line):
        epochs.append(line["epoch"])
        raise Stopped

    for _ in range(3):
        with pytest.raises(Stopped):
            retrain(workspace, stop)
    assert epochs == [1, 2, 3]
    assert main([str(run_copy.path)]) == 0
    assert run_copy.summary().retrain == finished_run.summary().retrain
    assert same_weights(kept_by(run_copy), kept_by(finished_run))
    assert Checkpoints(run_copy).read(run_copy.retrain_checkpoint).evaluation["epoch"] == 4


def test_a_retrain_that_diverges_keeps_what_it_started_from(run_copy):
    shutil.rmtree(run_copy.retrain)
    path = run_copy.checkpoint(run_copy.summary().best.trial)
    checkpoint = Checkpoints(run_copy).read(path)
    wild = checkpoint.best.parameters.model_copy(update={"learning_rate": 1e12})
    checkpoint.best = replace(checkpoint.best, parameters=wild)
    write_atomic(path, checkpoint.to_bytes())
    epochs = []
    retrain(open_workspace(run_copy), epochs.append)
    assert epochs == []
    assert run_copy.summary().retrain.kept_epoch == 0
    assert same_weights(kept_by(run_copy), checkpoint.best)
