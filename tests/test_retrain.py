"""Retraining goes on where it stopped, to the last bit, and never ends worse than it started."""

import shutil

import pytest
import torch

from tuner.retrain import main, retrain
from tuner.run import RunFiles, write_atomic
from tuner.workspace import best_of, open_workspace, retrained

METRIC = "frechet_distance"


class Stopped(Exception):
    pass


def weights(run: RunFiles) -> dict[str, torch.Tensor]:
    return torch.load(run.retrained, weights_only=True)["model"]


def same_result(run: RunFiles, other: RunFiles) -> bool:
    ours, theirs = weights(run), weights(other)
    return (
        run.summary()["retrain"] == other.summary()["retrain"]
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


def test_the_result_is_never_worse_than_the_best_trial_on_validation(workspace, finished_run):
    summary, scorer = finished_run.summary(), workspace.scorer()
    start, kept = best_of(workspace.run, summary["best"]["trial"]), retrained(workspace.run)
    before = scorer(start.model, start.parameters, start.prior)[METRIC]
    after = scorer(kept.model, kept.parameters, kept.prior)[METRIC]
    assert after <= before
    assert summary["best"][METRIC] == pytest.approx(before, rel=1e-9)
    assert summary["retrain"][METRIC] == pytest.approx(after, rel=1e-9)
    assert summary["retrain"]["gap_closed"] >= summary["best"]["gap_closed"]
    assert summary["retrain"]["epochs"] == 4
    assert summary["retrain"]["kept_epoch"] == kept.epoch


def test_the_prior_has_one_of_the_sizes_asked_for(workspace, finished_run):
    kept, summary = retrained(workspace.run), finished_run.summary()
    assert summary["retrain"]["params"] == kept.parameters.model_dump()
    assert kept.parameters.prior_components in {5, 10}
    assert len(kept.prior.weights) == kept.parameters.prior_components
    fixed = kept.parameters.model_copy(update={"prior_components": workspace.spec.fixed["prior_components"]})
    assert fixed.model_dump() == summary["best"]["params"]


def test_stopped_after_each_epoch_it_ends_bit_for_bit_as_without_a_stop(run_copy, finished_run):
    shutil.rmtree(run_copy.retrain)
    workspace, epochs = open_workspace(run_copy), []

    def report(line):
        epochs.append(line["epoch"])
        raise Stopped

    for _ in range(4):
        with pytest.raises(Stopped):
            retrain(workspace, report)
    retrain(workspace, report)
    assert epochs == [1, 2, 3, 4]
    assert same_result(run_copy, finished_run)


def test_a_deleted_retrain_is_rebuilt_with_equal_numbers(run_copy, finished_run):
    shutil.rmtree(run_copy.retrain)
    assert main([str(run_copy.path)]) == 0
    assert same_result(run_copy, finished_run)


def test_a_retrain_that_diverges_keeps_what_it_started_from(run_copy):
    shutil.rmtree(run_copy.retrain)
    best = run_copy.summary()["best"]
    path = run_copy.checkpoint(best["trial"])
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["best"]["parameters"]["learning_rate"] = 1e12
    torch.save(checkpoint, path)
    epochs = []
    retrain(open_workspace(run_copy), epochs.append)
    assert epochs == []
    assert run_copy.summary()["retrain"]["kept_epoch"] == 0
    assert all(torch.equal(value, checkpoint["best"]["model"][name]) for name, value in weights(run_copy).items())


@pytest.mark.parametrize("damage", ["cut off", "no checkpoint"])
def test_a_damaged_retrain_checkpoint_is_named_in_one_line(run_copy, capsys, damage):
    content = run_copy.retrain_checkpoint.read_bytes()
    write_atomic(run_copy.retrain_checkpoint, content[: len(content) // 2] if damage == "cut off" else b"no")
    with pytest.raises(SystemExit) as ended:
        main([str(run_copy.path)])
    assert ended.value.code == 2
    assert str(run_copy.retrain_checkpoint) in capsys.readouterr().err
