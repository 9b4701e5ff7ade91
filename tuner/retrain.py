"""Stage 4: train the promoted checkpoint on, and keep the best.

Runs alone as `python -m tuner.retrain RUN`; cut off, it goes on from the last finished epoch.
"""

import io
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import torch

from tuner.run import write_atomic
from tuner.tensorboard import TensorBoard
from tuner.terminal import stage
from tuner.vae.score import Scorer, gap_closed
from tuner.vae.train import Diverged, State, Stream, derive_seed, train
from tuner.workspace import FittedModel, Workspace, best_of, load_tensors, reading, run_alone

EVALUATIONS = 10  # over the whole retrain; a checkpoint is kept after every epoch
WARMUP_STEPS = 100  # Adam starts without its moments, so gently

Report = Callable[[dict[str, Any]], None]


def retrain(workspace: Workspace, report: Report) -> dict[str, Any]:
    """Train the promoted checkpoint for `retrain.epochs` with a cosine to zero and keep the best.

    The result is never worse on validation than what it started from, because the start takes part. At the
    end the prior is chosen on validation. Writes `retrain/model.pt`, calls `report` after each
    epoch and returns the summary.
    """
    run, spec = workspace.run, workspace.spec
    summary = run.summary()
    trial, epochs = summary["best"]["trial"], spec.retrain.epochs
    start, scorer = best_of(workspace.run, trial), workspace.scorer()
    schedule = start.parameters.model_copy(
        update={"schedule": "cosine", "warmup_steps": WARMUP_STEPS, "kl_warmup_epochs": 0.0}
    )
    seed = derive_seed(spec.seed, Stream.RETRAIN)
    state = State.fresh(schedule, seed, trial)
    contest = _Contest(workspace, scorer)
    if run.retrain_checkpoint.exists():
        with reading(run, run.retrain_checkpoint):
            saved = load_tensors(run.retrain_checkpoint.read_bytes())
            state.load_state_dict(saved["last"])
            contest.restore(saved["best"])
    else:
        state.model.load_state_dict(start.model.state_dict())
        contest.enter(FittedModel(start.model, start.parameters, start.prior, 0))

    evaluated = {max(1, round(epochs * part / EVALUATIONS)) for part in range(1, EVALUATIONS + 1)}
    images = workspace.data.train.images
    with suppress(Diverged):  # the best so far stands, and the start was part of it
        for record in train(state, schedule, images, range(1, epochs + 1), seed=seed, trial=trial, total_epochs=epochs):
            line: dict[str, Any] = {"epoch": record.epoch, "loss": record.loss, "seconds_train": record.seconds}
            if record.epoch in evaluated:
                prior = scorer.fit(state.model, start.parameters)
                line |= contest.enter(FittedModel(state.model, start.parameters, prior, record.epoch))
            buffer = io.BytesIO()
            torch.save({"last": state.state_dict(), "best": contest.state_dict()}, buffer)
            write_atomic(run.retrain_checkpoint, buffer.getvalue())
            report(line)

    best = FittedModel.from_state_dict(contest.best)
    if start.parameters.prior != "standard_normal":
        for wanted in spec.retrain.priors:
            other = start.parameters.model_copy(update=wanted.model_dump())
            with suppress(Diverged):
                contest.enter(FittedModel(best.model, other, scorer.fit(best.model, other), best.epoch))
    buffer = io.BytesIO()
    torch.save(contest.best, buffer)
    write_atomic(run.retrained, buffer.getvalue())
    return run.update_summary(
        retrain={
            "epochs": epochs,
            "kept_epoch": contest.best["epoch"],
            "params": contest.best["parameters"],
            "gap_closed": gap_closed(contest.scores["frechet_distance"], summary["floor"], summary["baseline"]),
            **contest.scores,
        }
    )


def retrain_stage(workspace: Workspace) -> None:
    """Retrain with progress on the terminal and a run of its own in TensorBoard."""
    epochs = workspace.spec.retrain.epochs
    with (
        stage(workspace.run, "retrain") as progress,
        closing(TensorBoard(workspace.run.tensorboard, workspace.spec)) as board,
    ):

        def on_epoch(line: dict[str, Any]) -> None:
            board.report("retrain", line)
            then = ", fitting the priors" if line["epoch"] == epochs and workspace.spec.retrain.priors else ""
            progress.show(f"epoch {line['epoch']:g} of {epochs}, loss {line['loss']:.2f}{then}")

        kept = retrain(workspace, on_epoch)["retrain"]
        progress.done(
            f"{epochs} epochs, epoch {kept['kept_epoch']:g} kept, frechet_distance {kept['frechet_distance']:.4g}, "
            f"gap closed {kept['gap_closed']:.3f}"
        )


def main(argv: list[str] | None = None) -> int:
    description = "Train the promoted checkpoint of a run on and keep the best."
    return run_alone("tuner.retrain", description, retrain_stage, argv)


class _Contest:
    """Keeps the candidate with the best objective on validation; the first to enter wins a tie."""

    def __init__(self, workspace: Workspace, scorer: Scorer):
        selection_objective = workspace.spec.selection_objective
        self.metric, self.sign = selection_objective.metric, selection_objective.sign
        self.scorer = scorer
        self.best: dict[str, Any] = {}
        self.scores: dict[str, float] = {}

    def enter(self, candidate: FittedModel) -> dict[str, float]:
        scores = self.scorer(candidate.model, candidate.parameters, candidate.prior)
        if not self.scores or self.sign * scores[self.metric] < self.sign * self.scores[self.metric]:
            self.best, self.scores = candidate.state_dict(), scores
        return scores

    def state_dict(self) -> dict[str, Any]:
        return self.best | {"scores": self.scores}

    def restore(self, saved: dict[str, Any]) -> None:
        """Raises whatever what is no such mapping provokes."""
        FittedModel.from_state_dict(saved)
        scores = {name: float(value) for name, value in saved["scores"].items()}
        if not {self.metric, "frechet_distance"} <= scores.keys():
            raise KeyError(self.metric)
        self.best, self.scores = saved, scores


if __name__ == "__main__":
    sys.exit(main())
