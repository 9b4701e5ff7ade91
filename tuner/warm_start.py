"""Let the sampler of a new run know what earlier runs found; their trials are none of the run's own.

Scores compare only under the same images and the same feature extractor, so the run takes over the earlier ones'.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuner import spec as specs
from tuner.extractors import keep_extractor, load_extractors
from tuner.run import RunFiles
from tuner.spec import Spec
from tuner.study import WARM_START, distributions, evaluations, open_study, read_study
from tuner.terminal import console
from tuner.vae.errors import Refused

TRIAL = "trial"  # which one it was, beside what the trial itself knew
COMPLETE = "complete"  # whether all of them are in the journal
OTHER_BUDGET = "the rungs of its budget"


@dataclass(frozen=True)
class Earlier:
    """An earlier run, its trials that fit, and for those that don't what stands in the way."""

    run: RunFiles
    trials: list[FrozenTrial]
    unfit: Counter[str]

    @property
    def words(self) -> str:
        others = "; others don't fit: " + ", ".join(f"{name} ({count})" for name, count in self.unfit.most_common())
        return f"{self.run.shown}: {len(self.trials)} trials are known{others if self.unfit else ''}"


def gather(run: RunFiles, spec: Spec, held_out: bytes) -> list[Earlier]:
    """What the runs of `warm_start` bring, unless the run has it.

    Raises Refused, naming the earlier run, where its scores don't compare.
    """
    known = read_study(run.journal, WARM_START) if spec.warm_start else None
    if known and known.user_attrs.get(COMPLETE):
        return []
    found = [_earlier(place, spec, held_out) for place in spec.warm_start]
    for other in found[1:]:
        if _extractor(other.run) != _extractor(found[0].run):
            raise Refused(f"warm_start: {other.run.shown}: scored with another extractor than {found[0].run.shown}")
    if found and spec.features and _extractor(found[0].run) != spec.features_sha256:
        raise Refused(f"warm_start: {found[0].run.shown}: scored with another extractor than features: {spec.features}")
    return found


def take_over(run: RunFiles, spec: Spec, found: list[Earlier]) -> None:
    """Write extractors and trials of earlier runs to a run; cut off, it goes on where it stood."""
    if not found:
        return
    first = found[0].run
    for name, info in first.summary().extractors.items():
        keep_extractor(run, name, first.extractor(name, info.kind).read_bytes(), info)
    study, trials = open_study(run.journal, spec, WARM_START), [trial for earlier in found for trial in earlier.trials]
    study.add_trials(trials[len(study.known()) :])
    study.set_user_attr(COMPLETE, True)
    for earlier in found:
        console().print(f"warm start from {earlier.words}", soft_wrap=True)


def _earlier(place: Path, spec: Spec, held_out: bytes) -> Earlier:
    run = RunFiles(place)
    named = f"warm_start: {place}"
    if not run.spec.exists() or not run.held_out.exists():
        raise Refused(f"{named}: not a run directory")
    if run.held_out.read_bytes() != held_out:
        raise Refused(f"{named}: a run on other images")
    if "search" not in load_extractors(run):
        raise Refused(f"{named}: has no feature extractor yet")
    theirs, study = specs.load(run.spec), read_study(run.journal)
    if theirs.objective != spec.objective or study is None:
        raise Refused(f"{named}: searched for another objective, or nothing yet")
    trials: list[FrozenTrial] = []
    unfit: Counter[str] = Counter()
    for trial in study.known():
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and evaluations(trial):
            reasons = list(_reasons(trial, theirs, spec))
            unfit.update(reasons)
            trials += [] if reasons else [_foreign(trial, spec, f"{place}/{trial.number}")]
    return Earlier(run, trials, unfit)


def _reasons(trial: FrozenTrial, theirs: Spec, spec: Spec) -> Iterator[str]:
    """Why a trial is no point of the space: parameters that are outside of it, or fixed otherwise."""
    had = trial.user_attrs["parameters"]
    yield from (name for name in spec.searched(had) if not spec.space[name].contains(had[name]))
    ours = spec.parameters({name: had[name] for name in spec.searched(had)}).model_dump()
    yield from (name for name, value in ours.items() if had.get(name) != value)
    same_end = trial.state == TrialState.COMPLETE and theirs.budget.max_epochs == spec.budget.max_epochs
    if theirs.budget.rungs != spec.budget.rungs and not same_end:
        yield OTHER_BUDGET


def _foreign(trial: FrozenTrial, spec: Spec, name: str) -> FrozenTrial:
    had = trial.user_attrs["parameters"]
    params = {name: had[name] for name in spec.searched(had)}
    return optuna.trial.create_trial(
        state=trial.state,
        values=trial.values,
        params=params,
        distributions={name: known for name, known in distributions(spec).items() if name in params},
        intermediate_values=trial.intermediate_values,
        user_attrs=trial.user_attrs | {TRIAL: name},
    )


def _extractor(run: RunFiles) -> str:
    return run.summary().extractors["search"].sha256
