"""Stage 4: train the promoted checkpoint on, and keep the best.

Runs alone as `python -m tuner.retrain RUN`; cut off, it goes on from the last finished epoch.
"""

import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

from tuner.run import write_atomic
from tuner.summary import Retrained, Scores, Summary
from tuner.tensorboard import TensorBoard
from tuner.terminal import stage
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.fitted import FittedModel, better
from tuner.vae.losses import Diverged
from tuner.vae.metrics import gap_closed
from tuner.vae.seeds import Stream, derive_seed
from tuner.vae.step import State
from tuner.vae.train import train
from tuner.workspace import Workspace, run_alone

EVALUATIONS = 10  # over the whole retrain; a checkpoint is kept after every epoch
# Adam starts without its averages, so gently; then down to zero.
SCHEDULE = {"schedule": "cosine", "warmup_steps": 100, "kl_warmup_epochs": 0.0}


def retrain(workspace: Workspace, on_epoch: Callable[[dict[str, Any]], None]) -> Summary:
    """Train the promoted checkpoint for `retrain.epochs` with a cosine to zero and keep the best.

    The result is never worse on validation than what it started from, because the start takes part. At the
    end the prior is chosen on validation. Writes `retrain/checkpoint.pt` and calls `on_epoch` after each epoch; in the
    end the checkpoint's best is the kept model.
    """
    run, spec, epochs = workspace.run, workspace.spec, workspace.spec.retrain.epochs
    promoted, objective = run.summary().best, spec.selection_objective
    assert promoted
    trial = promoted.trial
    seed = derive_seed(spec.seed, Stream.RETRAIN)
    scorer, fitter = workspace.scorer(), workspace.fitter()

    def scored(fitted: FittedModel) -> FittedModel:
        return replace(fitted, scores=scorer(fitted))

    if run.retrain_checkpoint.exists():
        checkpoint = workspace.checkpoints.read(run.retrain_checkpoint)
        best = workspace.checkpoints.best(run.retrain_checkpoint)
    else:
        start = workspace.checkpoints.best(run.checkpoint(trial))
        checkpoint = Checkpoint(start.parameters, State.of(start.snapshot().model))
        best = scored(replace(start, epoch=0))
    parameters, state = checkpoint.parameters, checkpoint.state

    training = parameters.model_copy(update=SCHEDULE)
    evaluated = {max(1, round(epochs * part / EVALUATIONS)) for part in range(1, EVALUATIONS + 1)}
    images = workspace.data.train.images
    with suppress(Diverged):  # the best so far stands, and the start was part of it
        for record in train(state, training, images, range(1, epochs + 1), seed=seed, trial=trial, total_epochs=epochs):
            line: dict[str, Any] = {"epoch": record.epoch, "loss": record.loss, "seconds_train": record.seconds}
            if record.epoch in evaluated:
                fitted = scored(fitter(state.model, parameters, record.epoch))
                line |= fitted.scores
                best = better(best, fitted, objective.cost)
            checkpoint.best, checkpoint.evaluation = best, line
            write_atomic(run.retrain_checkpoint, checkpoint.to_bytes())
            on_epoch(line)

    if parameters.prior != "standard_normal":
        for prior in spec.retrain.priors:
            with suppress(Diverged):
                other = parameters.model_copy(update=prior.model_dump())
                best = better(best, scored(fitter(best.model, other, best.epoch)), objective.cost)
    checkpoint.best = best
    write_atomic(run.retrain_checkpoint, checkpoint.to_bytes())
    gap = gap_closed(best.scores["frechet_distance"], promoted.floor, promoted.baseline)
    kept = Retrained(
        epochs=epochs,
        kept_epoch=best.epoch,
        parameters=best.parameters.model_dump(),
        scores=Scores(**best.scores, gap_closed=gap),
    )
    return run.update_summary(retrain=kept)


def retrain_stage(workspace: Workspace) -> None:
    """Retrain with progress on the terminal and a run of its own in TensorBoard."""
    epochs = workspace.spec.retrain.epochs
    with (
        stage(workspace.run, "retrain") as progress,
        closing(TensorBoard(workspace.run.tensorboard, workspace.spec)) as board,
    ):

        def on_epoch(line: dict[str, Any]) -> None:
            board.add("retrain", line)
            then = ", fitting the priors" if line["epoch"] == epochs and workspace.spec.retrain.priors else ""
            progress.show(f"epoch {line['epoch']:g} of {epochs}, loss {line['loss']:.2f}{then}")

        kept = retrain(workspace, on_epoch).retrain
        assert kept
        progress.done(
            f"{epochs} epochs, epoch {kept.kept_epoch:g} kept, frechet_distance {kept.scores.frechet_distance:.4g}, "
            f"gap closed {kept.scores.gap_closed:.3f}"
        )


def main(argv: list[str] | None = None) -> int:
    description = "Train the promoted checkpoint of a run on and keep the best."
    return run_alone("tuner.retrain", description, retrain_stage, argv)


if __name__ == "__main__":
    sys.exit(main())
