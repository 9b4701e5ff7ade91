"""Optuna behind Ray Tune's Searcher interface, and the rule that stops weak trials. The journal is told the truth: a
stopped trial is PRUNED with its intermediate values, one that is not finite FAIL at once, a finished one COMPLETE."""

import copy
import math
import time
import warnings
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tuner.cluster import WORKER_SECONDS
from tuner.exits import fatal
from tuner.spec import Spec
from tuner.study import BASELINE, BEST, MANY, Study, distributions, evaluations, front
from tuner.vae.metrics import METRICS
from tuner.vae.parameters import Parameters
from tuner.vae.seeds import Stream, derive_seed

WORKER_RETRIES = 3  # how often a trial whose worker died goes on from its checkpoint
PREEMPTED = "its node was preempted"  # which is no fault of the trial
CAUSES = {  # by what Ray says of them; the first that is said
    PREEMPTED: ("node was preempted",),
    "out of memory": ("OutOfMemory", "running low on memory"),
    "its node died": ("node has died", "NodeDiedError", "ObjectLostError"),
    "its process died": ("ActorUnavailableError", "ActorDiedError", "WorkerCrashedError", "is dead", "unavailable"),
}
SCORED = (TrialState.COMPLETE, TrialState.PRUNED)
FAILURES = {"diverged", "collapsed", "out of memory", "error"}  # outcomes that a trial reports of itself


class StudySearcher(Searcher):
    """Proposes trials with TPE and writes every result to the study.

    What is proposed depends on the journal alone: the sampler is made anew each time, seeded by (study seed, trial
    number). So a search that was cut off goes on as if nothing had happened. The baseline is trial 0, but starts only
    when a quarter of the others are proposed, until when nobody needs it; under a time limit it starts first. A trial
    whose worker was lost is put back and goes on from its checkpoint: Tune's own retries spare it nothing where an
    actor that it was to reuse died with its node. What a proposal or a result takes does not grow with the study.
    """

    def __init__(self, study: Study, spec: Spec, capacity: Callable[[], float] = lambda: math.inf):
        super().__init__(metric=[o.metric for o in spec.objective], mode=[o.direction[:3] for o in spec.objective])
        self.study, self.spec, self.capacity = study, spec, capacity
        self.distributions, self.points, known = distributions(spec), Points(study, spec), study.known()
        self.live: dict[str, optuna.trial.Trial] = {}  # by Ray's trial id
        self.unfinished = [trial for trial in known if trial.state == TrialState.RUNNING]
        self.count, self.waiting = len(known), bool(known) and known[BASELINE].state == TrialState.WAITING
        ended = [trial for trial in known if trial.state in SCORED]
        ended.sort(key=lambda trial: (trial.datetime_complete, trial.number))
        self.costs = [self._cost(trial) for trial in ended]

    def __reduce__(self) -> tuple[type[Searcher], tuple[()]]:
        """Ray pickles it for a restore of its own, which the journal replaces."""
        return Searcher, ()

    @property
    def remaining(self) -> int:
        """Trials still to be started: those cut off or put back, and those never proposed; on a plateau of these the
        baseline alone."""
        begun = self.count - self.waiting
        return max(0, self.waiting if self.on_plateau else self.spec.budget.trials - begun) + len(self.unfinished)

    @property
    def on_plateau(self) -> bool:
        """Whether the last trials to end have not improved on those before them as `budget.plateau` wants."""
        plateau, costs = self.spec.budget.plateau, self.costs
        if plateau is None or len(costs) <= plateau.trials:
            return False
        before, last = min(costs[: -plateau.trials]), min(costs[-plateau.trials :])
        return last > before - plateau.min_improvement * abs(before)

    def _cost(self, trial: FrozenTrial) -> float:
        """Of a trial's best evaluation."""
        return min(map(self.spec.trial_objective.cost, evaluations(trial)), default=math.inf)

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
        if not self.count:
            self._add(TrialState.WAITING, self.spec.baseline, self.spec.baseline_point())
            self.waiting = True
        number, others = self.count, self.count - 1
        if self.waiting and (
            self.spec.budget.time_limit or self.on_plateau or 4 * others >= self.spec.budget.trials - 1
        ):
            number, self.waiting = self.study.ask().number, False  # Optuna gives out what waits
        else:
            fixed = self.spec.points_to_evaluate[number - 1] if number <= len(self.spec.points_to_evaluate) else None
            params = self._sample(number, fixed)
            self._add(TrialState.RUNNING, self.spec.parameters(params), params)
        frozen = self.study.at(number)
        self.points.add(number, frozen)
        return frozen

    def _add(self, state: TrialState, parameters: Parameters, params: dict[str, Any] | None) -> None:
        """In one write, so that a kill leaves a whole trial or none. Without `params` it is none of the space."""
        params, attributes = params or {}, {"parameters": parameters.model_dump()}
        known = {name: self.distributions[name] for name in params}
        self.study.add_trial(
            optuna.trial.create_trial(state=state, params=params, distributions=known, user_attrs=attributes)
        )
        self.count += 1

    def _sample(self, number: int, fixed: dict[str, Any] | None) -> dict[str, Any]:
        """Ask TPE on what it is to look at, in memory; `fixed` parameters are taken as they are."""
        seed = derive_seed(self.spec.seed, Stream.PROPOSAL, number) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # group: a baseline outside of the space is a trial without parameters, which must not empty the space
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        memory = optuna.storages.InMemoryStorage()
        scratch = optuna.create_study(storage=memory, sampler=sampler, directions=self.study.directions)
        for point in self.points():
            memory.create_new_trial(scratch._study_id, point)
        if fixed:
            scratch.enqueue_trial(fixed)
        trial, found = scratch.ask(), dict[str, Any]()
        for name in self.spec.in_order():
            if self.spec.is_searched(name, found):
                # what every public suggest_ of one kind of distribution calls
                found[name] = self.spec.space[name].nearest(trial._suggest(name, self.distributions[name]))
        return found

    @fatal
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Write one evaluation: its scores, and the objective as the rung's intermediate value."""
        with self.study.journal.event():
            self._keep(self.live[trial_id], result)

    def _keep(self, trial: optuna.trial.Trial, result: dict[str, Any]) -> None:
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
        if trial_id in self.live:
            with self.study.journal.event():
                self._complete(self.live.pop(trial_id), result, error)

    def _complete(self, trial: optuna.trial.Trial, result: dict[str, Any] | None, error: bool) -> None:
        if result:
            self._keep(trial, result)
        result = result or {"outcome": "error", "reason": "never started"}
        if error:
            frozen = self.study.at(trial.number)  # the rule wrote, not this object
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
        frozen = self.study.at(trial.number)
        self.points.add(trial.number, frozen)
        if state in SCORED:
            self.costs.append(self._cost(frozen))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the journal holds all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the journal holds all."""


class Point(FrozenTrial):
    """A trial for the sampler, which changes none: Optuna would copy each, with all it holds, for every proposal."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Point":
        return copy.copy(self)

    @classmethod
    def of(cls, trial: FrozenTrial) -> "Point | None":
        """None of what says nothing: a trial that waits, or whose worker was lost for good."""
        failed = trial.user_attrs.get("reason", "").partition(":")[0] in FAILURES and trial.state == TrialState.FAIL
        if not failed and trial.state not in (*SCORED, TrialState.RUNNING):
            return None
        point = cls.__new__(cls)
        vars(point).update(vars(trial))
        if failed:
            point.state, point.intermediate_values = TrialState.PRUNED, {}
        return point


class Points:
    """What the sampler looks at: of the trials that ended the best hundred in TPE's own order (of several objectives
    the front) and the latest 200 others, and the latest hundred of those that run. What failed by itself is to it a
    trial that was stopped before it had a value, the worst there is: TPE does not see a failed trial, and would seek
    where none has come to a score.

    A trial that is left out never comes back, so it makes no difference whether it was left out when it ended or when
    the journal was read.
    """

    def __init__(self, study: Study, spec: Spec):
        self.objectives = spec.objective
        foreign = study.foreign()
        everything = enumerate((*foreign, *study.known()), -len(foreign))
        found = {place: point for place, trial in everything if (point := Point.of(trial))}
        self.running = {place: point for place, point in found.items() if point.state == TrialState.RUNNING}
        self.ended = {place: point for place, point in found.items() if point.state in SCORED}
        self._forget()

    def __call__(self) -> list[Point]:
        """In order."""
        latest = dict(sorted(self.running.items())[-BEST:])
        return [point for _, point in sorted((latest | self.ended).items())]

    def add(self, number: int, trial: FrozenTrial) -> None:
        """A trial that has begun or ended."""
        self.running.pop(number, None)
        point = Point.of(trial)
        if point and point.state == TrialState.RUNNING:
            self.running[number] = point
        elif point:
            self.ended[number] = point
            self._forget()

    def _forget(self) -> None:
        best = self._best()
        others = sorted(self.ended.keys() - best)[BEST - MANY :]
        self.ended = {place: self.ended[place] for place in (*best, *others)}

    def _best(self) -> set[int]:
        if len(self.objectives) == 1:
            return set(sorted(self.ended, key=lambda place: (self._standing(self.ended[place]), place))[:BEST])
        names = [objective.metric for objective in self.objectives]
        rows = [
            {"place": place} | dict(zip(names, point.values, strict=True))
            for place, point in self.ended.items()
            if point.state == TrialState.COMPLETE
        ]
        return {row["place"] for row in front(rows, self.objectives)}

    def _standing(self, trial: FrozenTrial) -> tuple[float, ...]:
        """The less the better: complete ones by their value, then those that came further."""
        (objective,) = self.objectives
        if trial.state == TrialState.COMPLETE:
            return (0, 0, objective.cost({objective.metric: trial.value}))
        step, value = max(trial.intermediate_values.items(), default=(-1, 0.0))
        return (1, -step, objective.cost({objective.metric: value}))


def add_finalists(study: Study, parameters: Sequence[Parameters]) -> None:
    """Have a `StudySearcher` propose trials with these parameters, in their order; the first may be there already."""
    for each in parameters[len(study.known()) :]:
        attributes = {"parameters": each.model_dump()}
        study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attributes))


class SuccessiveHalving(FIFOScheduler):
    """Asynchronous successive halving (ASHA; Li et al. 2020).

    At each rung from grace_epochs on, a trial goes on while it is among the best 1/reduction_factor (rounded up) of all
    that reached the rung so far; the baseline always does, and so does a trial that repeats a result from before its
    worker was lost. Rungs are filled from the study, so a search that was cut off stops the same trials.
    """

    def __init__(self, study: Study, spec: Spec, patience: float = WORKER_SECONDS):
        super().__init__()
        self.study, self.spec, self.objective, self.patience = study, spec, spec.objective[0], patience
        self.since: dict[str, float] = {}  # when a trial that waits was first seen to
        self.rungs: defaultdict[int, list[float]] = defaultdict(list)  # the costs at each, in order
        self.counted: set[tuple[int, int]] = set()
        for trial in study.known():
            for rung, value in trial.intermediate_values.items():
                self._count(rung, trial.number, self.objective.cost({self.objective.metric: value}))

    def _count(self, rung: int, number: int, cost: float) -> None:
        if (rung, number) not in self.counted:
            self.counted.add((rung, number))
            insort(self.rungs[rung], cost)

    @fatal
    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        stop = result["done"] or self._is_weak(trial.config["trial"], result)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def _is_weak(self, number: int, result: dict[str, Any]) -> bool:
        cost, budget = self.objective.cost(result), self.spec.budget
        repeated = (result["rung"], number) in self.counted
        self._count(result["rung"], number, cost)
        rung = self.rungs[result["rung"]]
        better = bisect_left(rung, cost)
        weak = result["epoch"] >= budget.grace_epochs and better >= math.ceil(len(rung) / budget.reduction_factor)
        alone = len(self.spec.objective) == 1  # of several none alone says "weaker"
        return weak and alone and not repeated and number != BASELINE

    def choose_trial_to_run(self, tune_controller: Any) -> RayTrial | None:
        """The newest that waits: for all others a worker is starting already, so this one is to have one that is free.

        Tune's rule gives that to the oldest and stops the worker that starts for it, so that where trials end before a
        worker is up no further one ever comes up. The oldest is next before any has begun, and where it has waited for
        longer than a worker takes to start: the cluster may have no room for its own.
        """
        known, now = tune_controller.get_trials(), time.monotonic()
        waiting = [trial for trial in known if trial.status == RayTrial.PENDING]
        self.since = {trial.trial_id: self.since.get(trial.trial_id, now) for trial in waiting}
        if not waiting:
            return None
        in_vain = now - self.since[waiting[0].trial_id] > self.patience
        return waiting[0] if in_vain or len(waiting) == len(known) else waiting[-1]

    @fatal
    def on_trial_error(self, tune_controller: Any, trial: RayTrial) -> None:
        """Note in the study why a worker was lost, each time: Tune tells the rule, but not the searcher."""
        text = Path(trial.error_file).read_text() if trial.error_file else ""
        frozen = self.study.at(trial.config["trial"])
        causes = [*frozen.user_attrs.get("lost", []), cause_of(text)]
        self.study.trial(frozen.number).set_user_attr("lost", causes)


def cause_of(error: str) -> str:
    """Ray's account of a lost worker in a few words; the last where Tune has gathered several."""
    error = error.rpartition("Failure # ")[2]
    for cause, signs in CAUSES.items():
        if any(sign in error for sign in signs):
            return cause
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "unknown"
