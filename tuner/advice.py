"""What a finished run suggests to do next, in sentences; each says what it was concluded from."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from tuner.spec import DRAWN_BEST, Spec
from tuner.study import ENDED, Study
from tuner.summary import Compared, Retrained, Summary
from tuner.terminal import edges

Rows = Sequence[Mapping[str, Any]]

FEWEST = 4  # complete trials, below which nothing is said of what matters
ENOUGH = 10  # of them, below which nothing is said about them all
LITTLE = 0.05  # of the differences in the objective: a forest gives 3 % to what explains nothing
FOREST_TRIALS = 200  # evenly spread, in a forest: it takes minutes of a thousand
OFTEN = 0.1  # of all trials
REMEDIES = {
    "diverged": "search lower learning rates",
    "collapsed": "search lower KL weights",
    "out of memory": "search smaller networks or batches, or run fewer trials at once",
}


def advice(rows: Rows, summary: Summary, spec: Spec, shares: Mapping[str, float]) -> list[str]:
    """`shares` are what `importance` gives. Nothing before the promotion."""
    winner = summary.winner
    if winner is None:
        return []
    by_distance = spec.objective == (DRAWN_BEST,)  # the one objective that has errors
    error = summary.promotion[0].error if by_distance else None
    found = [f"{note}." for note in edges(winner.searched, spec)]
    found += ignored(rows, shares)
    found += more_trials(rows, error) if error else []
    if by_distance and summary.retrain and summary.validation:
        found += more_epochs(summary.retrain, summary.validation)
    return [*found, *failed_alike(rows)]


def importance(study: Study, spec: Spec) -> dict[str, float]:
    """The share of the differences in the objective that each parameter explains, by functional ANOVA (Hutter et al.
    2014): of a few trials Optuna's own choice, PED-ANOVA, can give a third to what explains nothing. Of a parameter
    whose complete trials all have one value nothing is known: the others may have been stopped for it.

    Empty where too few trials with parameters are complete, where all came to the same, and where there are several
    objectives.
    """
    complete = [trial for trial in study.known() if trial.state == TrialState.COMPLETE and trial.params]
    if len(complete) < FEWEST or len(spec.objective) > 1 or len(spec.space) < 2:
        return {}
    if len({trial.value for trial in complete}) == 1:
        return {}
    seen = optuna.create_study(directions=study.directions)
    seen.add_trials(complete[:: -(-len(complete) // FOREST_TRIALS)])
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(seen, evaluator=evaluator)
    values = {name: {trial.params.get(name) for trial in complete} for name in shares}
    return {name: float(share) for name, share in shares.items() if len(values[name]) > 1}


def ignored(rows: Rows, shares: Mapping[str, float]) -> Iterator[str]:
    """Parameters that made next to no difference."""
    enough = sum(row["state"] == "complete" for row in rows) >= ENOUGH
    for name, share in shares.items():
        if enough and share < LITTLE:
            yield f"{name} hardly mattered ({share:.1%} of the differences): fix it, and fewer trials will do."


def more_trials(rows: Rows, error: float) -> Iterator[str]:
    """Whether the last third of the trials still brought so much of the gap that the errors don't overlap.

    `error` is the winner's standard error, taken for that of the best before as well.
    """
    ended = [row["gap_closed"] for row in rows if row["state"] in ENDED and "gap_closed" in row]
    first = len(ended) - len(ended) // 3
    if len(ended) < ENOUGH:
        return
    gain = max(ended) - max(ended[:first])
    what = f"The last {len(ended) - first} of {len(ended)} trials brought {gain:.3f} of the gap"
    if gain > 2 * error:
        yield f"{what}, more than twice the winner's standard error of {error:.3f}: more trials will likely pay."
    else:
        yield f"{what}, the winner's standard error is {error:.3f}: more trials are unlikely to pay."


def more_epochs(retrained: Retrained, validation: Compared) -> Iterator[str]:
    """Whether the epochs after the search, up to the last of them, brought so much that the errors don't overlap."""
    before, after = validation.refitted, validation.retrained
    if not (before and after and before.gap_closed_error is not None and after.gap_closed_error is not None):
        return
    gain, errors = after.gap_closed - before.gap_closed, (before.gap_closed_error, after.gap_closed_error)
    what = f"The {retrained.epochs} epochs after the search brought {gain:.3f} ± {math.hypot(*errors):.3f} of the gap"
    if retrained.kept_epoch < retrained.epochs:
        yield f"{what}, and what is kept is of epoch {retrained.kept_epoch:g}: more epochs are unlikely to pay."
    elif gain > sum(errors):
        yield f"{what}, and the last is the best: more (retrain.epochs) will likely pay."
    else:
        yield f"{what}: more epochs are unlikely to pay."


def failed_alike(rows: Rows) -> Iterator[str]:
    """Kinds of failures that took a good part of the trials."""
    kinds = Counter(row["reason"].partition(":")[0] for row in rows if row["state"] == "failed")
    for kind, count in kinds.items():
        if count > 1 and count >= OFTEN * len(rows):
            remedy = REMEDIES.get(kind, "see the reasons below")
            yield f"{count} of {len(rows)} trials failed alike ({kind}): {remedy}."
