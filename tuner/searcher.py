"""Optuna behind Ray Tune's Searcher interface, and the rule that stops weak trials. The journal is told the truth: a
stopped trial is PRUNED with its intermediate values, one that is not finite FAIL at once, a finished one COMPLETE."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tuner.exits import fatal
from tuner.spec import Spec
from tuner.study import BASELINE, Study, distributions, evaluations
from tuner.vae.metrics import METRICS
from tuner.vae.parameters import Parameters
from tuner.vae.seeds import Stream, derive_seed

WORKER_RETRIES = 3  # how often a trial whose worker died goes on from its checkpoint
PREEMPTED = "its node was preempted"  # which is no fault of the trial
CAUSES = {  # by what Ray says of them; the first that is said
    PREEMPTED: ("node was preempted",),
    "out of memory": ("OutOfMemory", "running low on memory"),
    "its node died": ("node has died", "NodeDiedError"),
    "its process died": ("ActorUnavailableError", "ActorDiedError", "is dead", "unavailable"),
}
FAILURES = {"diverged", "collapsed", "out of memory", "error"}  # outcomes that a trial reports of itself


class StudySearcher(Searcher):
    """Proposes trials with TPE and writes every result to the study.

    What is proposed depends on the journal alone: the sampler is made anew each time, seeded by (study seed, trial
    number). So a search that was cut off goes on as if nothing had happened. The baseline is trial 0, but starts only
    when a quarter of the others are proposed, until when nobody needs it; under a time limit it starts first. A trial
    whose worker was lost is put back and goes on from its checkpoint: Tune's own retries spare it nothing where an
    actor that it was to reuse died with its node.
    """

    def __init__(self, study: Study, spec: Spec, capacity: Callable[[], float] = lambda: math.inf):
        super().__init__(metric=[o.metric for o in spec.objective], mode=[o.direction[:3] for o in spec.objective])
        self.study, self.spec, self.capacity = study, spec, capacity
        self.distributions, self.foreign = distributions(spec), study.foreign()
        self.live: dict[str, optuna.trial.Trial] = {}  # by Ray's trial id
        self.unfinished = [trial for trial in study.known() if trial.state == TrialState.RUNNING]

    def __reduce__(self) -> tuple[type[Searcher], tuple[()]]:
        """Ray pickles it for a restore of its own, which the journal replaces."""
        return Searcher, ()

    @property
    def remaining(self) -> int:
        """Trials still to be started: those cut off or put back, and those never proposed; on a plateau of these the
        baseline alone."""
        states = [trial.state for trial in self.study.known()] or [TrialState.WAITING]
        begun = sum(state != TrialState.WAITING for state in states)
        new = states.count(TrialState.WAITING) if self.on_plateau else self.spec.budget.trials - begun
        return max(0, new) + len(self.unfinished)

    @property
    def on_plateau(self) -> bool:
        """Whether the last trials to end have not improved on those before them as `budget.plateau` wants."""
        plateau, objective = self.spec.budget.plateau, self.spec.trial_objective
        ended = [trial for trial in self.study.known() if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        if plateau is None or len(ended) <= plateau.trials:
            return False
        ended.sort(key=lambda trial: (trial.datetime_complete, trial.number))
        costs = [min((objective.cost(found) for found in evaluations(trial)), default=math.inf) for trial in ended]
        before, last = min(costs[: -plateau.trials]), min(costs[-plateau.trials :])
        return last > before - plateau.min_improvement * abs(before)

    @fatal
    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial as Ray's config, its number and full parameters; None while `capacity` is used up."""
        if not self.remaining:
            return None if self.live else Searcher.FINISHED  # a live one may be put back
        if len(self.live) >= self.capacity():
            return None
        frozen = self.unfinished.pop(0) if self.unfinished else self._propose()
        self.live[trial_id] = trial = self.study.trial(frozen.number)
        if "reason" in frozen.user_attrs:  # for which it was cut off
            trial.set_user_attr("reason", "")
        return {"trial": frozen.number, "parameters": frozen.user_attrs["parameters"]}

    def _propose(self) -> FrozenTrial:
        """The baseline where its time has come, else the next trial."""
        if not self.study.known():
            self._add(TrialState.WAITING, self.spec.baseline, self.spec.baseline_point())
        known = self.study.known()
        others, number = len(known) - 1, len(known)
        if known[BASELINE].state == TrialState.WAITING and (
            self.spec.budget.time_limit or self.on_plateau or 4 * others >= self.spec.budget.trials - 1
        ):
            number = self.study.ask().number  # Optuna gives out what waits
        else:
            fixed = self.spec.points_to_evaluate[number - 1] if number <= len(self.spec.points_to_evaluate) else None
            params = self._sample(known, number, fixed)
            self._add(TrialState.RUNNING, self.spec.parameters(params), params)
        return self.study.known()[number]

    def _add(self, state: TrialState, parameters: Parameters, params: dict[str, Any] | None) -> None:
        """In one write, so that a kill leaves a whole trial or none. Without `params` it is none of the space."""
        params, attributes = params or {}, {"parameters": parameters.model_dump()}
        known = {name: self.distributions[name] for name in params}
        self.study.add_trial(
            optuna.trial.create_trial(state=state, params=params, distributions=known, user_attrs=attributes)
        )

    def _sample(self, known: list[FrozenTrial], number: int, fixed: dict[str, Any] | None) -> dict[str, Any]:
        """Ask TPE on a copy of the study in memory; `fixed` parameters are taken as they are."""
        seed = derive_seed(self.spec.seed, Stream.PROPOSAL, number) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # group: a baseline outside of the space is a trial without parameters, which must not empty the space
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        scratch = optuna.create_study(sampler=sampler, directions=self.study.directions)
        scratch.add_trials(self.foreign)
        scratch.add_trials([trial for trial in known if trial.state != TrialState.WAITING])
        if fixed:
            scratch.enqueue_trial(fixed)
        trial, found = scratch.ask(), dict[str, Any]()
        for name in self.spec.in_order():
            if self.spec.is_searched(name, found):
                suggest(trial, name, self.distributions[name])
                found[name] = self.spec.space[name].nearest(trial.params[name])
        return found

    @fatal
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Write one evaluation: its scores, and the objective as the rung's intermediate value."""
        trial = self.live[trial_id]
        if "worker" not in trial.user_attrs:
            trial.set_user_attr("worker", f"{result['hostname']}:{result['pid']}")
        if "rung" not in result or f"evaluation:{result['rung']}" in trial.user_attrs:
            return
        if len(self.spec.objective) == 1 and result["outcome"] not in FAILURES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a report repeated after a kill changes nothing
                trial.report(result[self.spec.objective[0].metric], step=result["rung"])
        kept = ("epoch", "seconds_train", "seconds_score", "timestamp", *METRICS)
        trial.set_user_attr(f"evaluation:{result['rung']}", {key: result[key] for key in kept if key in result})

    @fatal
    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """End the trial in the study, with its reason."""
        if trial_id not in self.live:
            return
        if result:
            self.on_trial_result(trial_id, result)
        trial, result = self.live.pop(trial_id), result or {"outcome": "error", "reason": "never started"}
        if error:
            frozen = self.study.known()[trial.number]  # the rule wrote, not this object
            causes = frozen.user_attrs.get("lost", ["unknown"])
            if sum(cause != PREEMPTED for cause in causes) <= WORKER_RETRIES:
                self.unfinished.append(frozen)
            else:
                self._end(trial, TrialState.FAIL, f"worker lost {len(causes)} times, the last time: {causes[-1]}")
        elif result.get("outcome") in FAILURES:
            self._end(trial, TrialState.FAIL, result["reason"])
        elif result.get("outcome") == "complete":
            self._end(trial, TrialState.COMPLETE, "", [result[o.metric] for o in self.spec.objective])
        else:
            self._end(trial, TrialState.PRUNED, f"among the weaker at epoch {result['epoch']:g}")

    def close(self) -> None:
        """Note of what the time limit cut off why it is unfinished; the same run goes on with it."""
        for trial in (*self.live.values(), *self.unfinished):
            self.study.trial(trial.number).set_user_attr("reason", "time limit")

    def _end(
        self, trial: optuna.trial.Trial, state: TrialState, reason: str, values: list[float] | None = None
    ) -> None:
        trial.set_user_attr("reason", reason)
        self.study.tell(trial, values, state)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the journal holds all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the journal holds all."""


def suggest(trial: optuna.trial.Trial, name: str, distribution: BaseDistribution) -> None:
    """Have a parameter proposed."""
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    elif isinstance(distribution, FloatDistribution):
        trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


class FinalistSearcher(StudySearcher):
    """Proposes the finalists of a promotion, each once, by `parameters` in their order."""

    def __init__(self, parameters: Sequence[Parameters], study: Study, spec: Spec, capacity: Callable[[], float]):
        super().__init__(study, spec, capacity)
        self.finalists = parameters

    def _propose(self) -> FrozenTrial:
        number = len(self.study.known())
        self._add(TrialState.RUNNING, self.finalists[number], None)
        return self.study.known()[number]


class ToTheEnd(FIFOScheduler):
    """No trial is stopped before its end."""

    def __init__(self, study: Study, spec: Spec):
        super().__init__()
        self.study, self.spec = study, spec

    @fatal
    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        return str(TrialScheduler.STOP if result["done"] or self.is_weak(trial, result) else TrialScheduler.CONTINUE)

    def is_weak(self, trial: RayTrial, result: dict[str, Any]) -> bool:
        return False

    @fatal
    def on_trial_error(self, tune_controller: Any, trial: RayTrial) -> None:
        """Note in the study why a worker was lost, each time: Tune tells the rule, but not the searcher."""
        text = Path(trial.error_file).read_text() if trial.error_file else ""
        frozen = self.study.known()[trial.config["trial"]]
        causes = [*frozen.user_attrs.get("lost", []), cause_of(text)]
        self.study.trial(frozen.number).set_user_attr("lost", causes)


class SuccessiveHalving(ToTheEnd):
    """Asynchronous successive halving (ASHA; Li et al. 2020).

    At each rung from grace_epochs on, a trial goes on while it is among the best 1/reduction_factor (rounded up) of all
    that reached the rung so far; the baseline always does. Rungs are filled from the study, so a search that was cut
    off stops the same trials.
    """

    def __init__(self, study: Study, spec: Spec):
        super().__init__(study, spec)
        self.objective = spec.objective[0]
        self.rungs: dict[int, dict[int, float]] = {}
        for trial in study.known():
            for rung, value in trial.intermediate_values.items():
                self.rungs.setdefault(rung, {})[trial.number] = self.objective.cost({self.objective.metric: value})

    def is_weak(self, trial: RayTrial, result: dict[str, Any]) -> bool:
        number, value, budget = trial.config["trial"], self.objective.cost(result), self.spec.budget
        rung = self.rungs.setdefault(result["rung"], {})
        rung.setdefault(number, value)
        better = sum(other < value for other in rung.values())
        weak = result["epoch"] >= budget.grace_epochs and better >= math.ceil(len(rung) / budget.reduction_factor)
        return weak and number != BASELINE and len(self.spec.objective) == 1  # of several none alone says "weaker"


def cause_of(error: str) -> str:
    """Ray's account of a lost worker in a few words; the last where Tune has gathered several."""
    error = error.rpartition("Failure # ")[2]
    for cause, signs in CAUSES.items():
        if any(sign in error for sign in signs):
            return cause
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "unknown"
