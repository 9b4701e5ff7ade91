"""The retrain: train the finalists of the promotion on, choose the prior, and keep the best.

Runs alone as `python -m tuner.retrain RUN`; cut off, it goes on from each finalist's last evaluation.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tuner.alone import run_alone
from tuner.pool import RayPool
from tuner.run import write_atomic
from tuner.scoring import Bench, Measured, Workers, compared
from tuner.spec import Objective, Spec
from tuner.summary import Retrained, Summary
from tuner.terminal import stage, with_error
from tuner.trials import retrain_trials
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.fitted import FittedModel
from tuner.vae.prior import standard_normal
from tuner.vae.resampling import standard_error
from tuner.vae.step import State
from tuner.workspace import Workspace

# Adam starts without its averages, so gently; then down to zero.
SCHEDULE = {"schedule": "cosine", "warmup_steps": 100, "kl_warmup_epochs": 0.0}


@dataclass(frozen=True)
class Candidate:
    """A finalist as it stood after some epoch, with one of the priors, and what it scores on validation."""

    trial: int
    fitted: FittedModel
    measured: Measured


def retrain(workspace: Workspace, pool: RayPool) -> Summary:
    """Train the finalists for `retrain.epochs` with a cosine to zero and keep one of the best.

    The last epoch of each, the one that scored best and the promoted trial as it was get each of `retrain.priors`: what
    is kept is chosen under the prior that is exported. Writes `retrain/kept.pt` and, for the comparison,
    `retrain/refitted.pt`: the promoted trial with nothing but its prior chosen anew.
    """
    run, spec = workspace.run, workspace.spec
    promoted = [entry.trial for entry in run.summary().promotion[: spec.retrain.finalists]]
    starts = [replace(workspace.checkpoints.best(run.checkpoint(trial)), epoch=0) for trial in promoted]
    training = [replace(start, parameters=start.parameters.model_copy(update=SCHEDULE)) for start in starts]
    ends = retrain_trials(workspace, pool, training)

    with stage(run, "priors") as progress:
        models = [(promoted[0], starts[0])]
        for trial, end in zip(promoted, ends, strict=True):
            models += [(trial, fitted) for fitted in contenders(end, spec.retrain.epochs)]
        workers = workspace.workers()
        candidates = refitted(workers, models, spec, lambda done: progress.show(f"{done} fitted"))
        shown = {"real": None, "baseline": workspace.checkpoints.baseline(), "best": starts[0]}
        measured = dict(zip(shown, workers.map(Bench.score, [(fitted,) for fitted in shown.values()]), strict=True))
        begun = [found for found in candidates if not found.fitted.epoch]
        begun = begun or [Candidate(promoted[0], starts[0], measured["best"])]
        start, kept = (choose(some, spec.selection_objective) for some in (begun, candidates or begun))
        for path, fitted in ((run.refitted, start.fitted), (run.kept, kept.fitted)):
            content = Checkpoint(fitted.parameters, State.of(fitted.model), fitted).to_bytes()
            write_atomic(path, content)
        validation = compared(measured | {"refitted": start.measured, "retrained": kept.measured})
        last = validation.exported
        gap, parameters = with_error(last.gap_closed, last.gap_closed_error, 3), kept.fitted.parameters
        prior = f"{parameters.prior} {parameters.prior_components}"
        progress.done(f"epoch {kept.fitted.epoch:g} of trial {kept.trial} kept, with {prior}: gap closed {gap}")
    found = Retrained(
        epochs=spec.retrain.epochs,
        trial=kept.trial,
        kept_epoch=kept.fitted.epoch,
        parameters=kept.fitted.parameters.model_dump(),
        searched=starts[promoted.index(kept.trial)].parameters.model_dump(),
    )
    return run.update_summary(retrain=found, validation=validation)


def contenders(end: Checkpoint, epochs: int) -> list[FittedModel]:
    """The last epoch of a finalist, if it got there, and the one that scored best."""
    best = [end.best] if end.best and end.best.epoch != epochs else []
    if end.evaluation.get("epoch") != epochs:
        return best
    model = end.state.model
    return [FittedModel(model, end.parameters, standard_normal(model.latent_dim), epoch=epochs), *best]


def refitted(
    workers: Workers, models: Sequence[tuple[int, FittedModel]], spec: Spec, show: Callable[[int], None]
) -> list[Candidate]:
    """Each model with each prior that it may be exported with; what diverges is left out."""
    units = [
        (trial, fitted, fitted.parameters.model_copy(update=prior))
        for trial, fitted in models
        for prior in priors(fitted, spec)
    ]
    found = workers.map(Bench.refit, [(fitted, parameters) for _, fitted, parameters in units], show)
    return [Candidate(unit[0], *made) for unit, made in zip(units, found, strict=True) if made]


def priors(fitted: FittedModel, spec: Spec) -> list[dict[str, object]]:
    """As updates of parameters. The trial's own is one where there is no other, and for a start."""
    named = [prior.model_dump() for prior in spec.retrain.priors if fitted.parameters.prior != "standard_normal"]
    return [*named, *([{}] if not (named and fitted.epoch) else [])]


def choose(candidates: Sequence[Candidate], objective: Objective) -> Candidate:
    """The one-standard-error rule, Breiman et al. 1984, section 3.4.3: of those that are within one standard error of
    the best, the one trained longest, then with the fewest components, then the best.

    The error is that of the Frechet distance; by another objective the best is taken.
    """

    def cost(candidate: Candidate) -> float:
        return objective.cost(candidate.measured.scores)

    best = min(candidates, key=cost)
    known = best.measured.replicates if objective.metric == "frechet_distance" else None
    error = 0.0 if known is None else standard_error(known)
    near = [candidate for candidate in candidates if cost(candidate) <= cost(best) + error]
    return min(near, key=lambda found: (-found.fitted.epoch, found.fitted.parameters.prior_components, cost(found)))


def main(argv: list[str] | None = None) -> int:
    description = "Train the finalists of a run on, choose the prior and keep the best."
    return run_alone("tuner.retrain", description, retrain, argv)


if __name__ == "__main__":
    sys.exit(main())
