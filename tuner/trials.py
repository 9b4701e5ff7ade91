"""The part of the job that runs on Ray: the trials."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager  # what Tune makes of a lost worker is in it alone
from ray.autoscaler import sdk as autoscaler
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.widgets.util import in_notebook

from tuner.callbacks import KeepCheckpoints, KeepTable, ShowTrials, search_callbacks
from tuner.cluster import alive, dead_processes, slots
from tuner.extractors import FeatureExtractors
from tuner.file_server import FileServer
from tuner.fusion import Fusion, fusion
from tuner.loggers import Trackers
from tuner.pool import RayPool
from tuner.run import RunFiles, write_atomic
from tuner.searcher import StudySearcher, SuccessiveHalving, add_finalists
from tuner.spec import Spec
from tuner.study import ENDED, RETRAIN, SEARCH, UNFINISHED, Study, open_study, read_study
from tuner.tensorboard import TensorBoard
from tuner.terminal import stage
from tuner.trainable import Shared, TrialTrainable
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.errors import Refused
from tuner.vae.fitted import FittedModel
from tuner.vae.seeds import Stream, derive_seed
from tuner.vae.step import State
from tuner.workspace import Workspace


def search_stage(run: RunFiles, spec: Spec, pool: RayPool, extractors: FeatureExtractors) -> list[dict[str, Any]]:
    """Run the trials that are left -> the rows of trials.csv; the extractors are made and kept on the way."""
    study = open_study(run.journal, spec)
    with stage(run, "search") as progress, closing(TensorBoard(run.tensorboard, spec)) as board:
        board.start_search()
        table = KeepTable(run, spec, study)
        shown = ShowTrials(spec, table, board, Trackers(run, spec, SEARCH), progress)
        train(run, spec, study, pool, search_callbacks(table, extractors, board, shown), extractors.awaited)
        table.write()
        progress.done(shown.line())
    with stage(run, "extractor") as progress:
        for name in extractors.names:
            extractors.keep(name)
        described = (f"{name} extractor: {info.words}" for name, info in run.summary().extractors.items())
        progress.done("; ".join(described))
    states = Counter(row["state"] for row in table.rows)
    run.update_summary(trials={state: states[state] for state in (*ENDED, UNFINISHED)})
    return table.rows


def retrain_trials(workspace: Workspace, pool: RayPool, finalists: Sequence[FittedModel]) -> list[Checkpoint]:
    """Train finalists on, each from where it stands -> the checkpoints that they end with, in their order."""
    run = workspace.run.of_retrain()
    spec = workspace.spec.of_retrain(len(finalists), derive_seed(workspace.spec.seed, Stream.RETRAIN) % 2**32)
    search = open_study(run.journal, workspace.spec)
    promotion = workspace.run.summary().promotion[: len(finalists)]
    made_of = {"epochs": spec.budget.max_epochs, "finalists": [[entry.trial, entry.epoch] for entry in promotion]}
    begun = read_study(run.journal, RETRAIN)
    if begun is None or begun.user_attrs.get("made_of") != made_of:
        if begun:  # of what the run has grown beyond
            begun.delete()
        for left in (run.retrain, *run.tensorboard.glob(f"{RETRAIN}-*")):
            shutil.rmtree(left, ignore_errors=True)
    study = open_study(run.journal, spec, RETRAIN)
    for name, value in (("made_of", made_of), ("floor", search.floor), ("baseline", search.baseline)):
        study.set_user_attr(name, value)
    ended = {trial.number for trial in study.known() if trial.state.is_finished()}
    for number, start in enumerate(finalists):
        try:
            workspace.checkpoints.read(run.checkpoint(number))
        except Refused:  # there is none, or it is damaged
            if number in ended:
                raise
            state = State.of(start.snapshot().model)
            write_atomic(run.checkpoint(number), Checkpoint(start.parameters, state).to_bytes())
    add_finalists(study, [start.parameters for start in finalists])
    with stage(run, "retrain") as progress, closing(TensorBoard(run.tensorboard, spec, RETRAIN)) as board:
        table = KeepTable(run, spec, study)
        shown = ShowTrials(spec, table, board, Trackers(workspace.run, spec, RETRAIN), progress)
        callbacks = [table, KeepCheckpoints(run), shown]
        train(run, spec, study, pool, callbacks)
        table.write()
        progress.done(shown.line())
    return [workspace.checkpoints.read(run.checkpoint(number)) for number in range(len(finalists))]


def train(
    run: RunFiles,
    spec: Spec,
    study: Study,
    pool: RayPool,
    callbacks: Sequence[tune.Callback],
    others: Callable[[], int] = lambda: 0,
) -> None:
    """Train what is left of a study's trials, while `others` work beside them and want a core each."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    files, errors = lasting(FileServer).remote(run), run.errors.relative_to(run.path).as_posix()
    storage, at_once = run.ray.absolute(), pool.concurrency
    with fusion(spec, pool.data, at_once) as fused:
        shared = Shared(spec, files, pool.data, fused.arrays, fused.scores, pool.own, errors)
        trainable = tune.with_parameters(TrialTrainable, shared=shared)
        run_trials(study, spec, trainable, storage, at_once, callbacks, fused, others)


def run_trials(
    study: Study,
    spec: Spec,
    trainable: type[tune.Trainable],
    storage: Path,
    concurrency: int | None,
    callbacks: Sequence[tune.Callback],
    fused: Fusion | None = None,
    others: Callable[[], int] = lambda: 0,
) -> None:
    """Ray Tune over what is left of a study, while `others` work beside the trials and want a core each."""
    wanted = fused.resources if fused else spec.resources
    bundle = {"CPU": wanted.cpu} | ({"GPU": wanted.gpu} if wanted.gpu else {})

    def capacity() -> float:
        """Trials at once, as nodes come and go."""
        there = sum(slots(node["Resources"], wanted) for node in alive())
        at_once = min(there, concurrency or there)
        return max(at_once - others(), min(at_once, 1))

    proposes = StudySearcher(study, spec, capacity)
    left = proposes.remaining
    if not left:
        return
    shutil.rmtree(storage / study.study_name, ignore_errors=True)  # what an earlier command left, and nobody reads
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(spec.budget.trials)  # the searcher holds back by itself
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": wanted.cpu, "gpu": wanted.gpu}),
        tune_config=tune.TuneConfig(
            search_alg=proposes,
            scheduler=SuccessiveHalving(study, spec),
            num_samples=-1,  # the searcher ends it
            time_budget_s=spec.budget.time_limit,
            reuse_actors=True,
            trial_name_creator=lambda trial: f"{trial.config['trial']:04d}",
            trial_dirname_creator=lambda trial: f"{trial.config['trial']:04d}",
        ),
        run_config=tune.RunConfig(
            name=study.study_name,
            storage_path=str(storage),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the driver keeps them
            verbose=0,
            progress_reporter=tune.CLIReporter() if in_notebook() else None,  # Tune's own wipes the cell's output
            callbacks=list(callbacks),
        ),
    )
    autoscaler.request_resources(bundles=[bundle] * min(left, concurrency or left))
    try:
        with losses_told_as_such():
            tuner.fit()
        proposes.close()
    finally:
        if not dead_processes():
            autoscaler.request_resources(bundles=[])


@contextmanager
def losses_told_as_such() -> Iterator[None]:
    """Tell Tune of whatever takes a worker as of a lost worker.

    It knows errors of actors and of tasks alone, and would end the search where Ray has killed a worker because
    its node ran low on memory, or where a result is lost along with its node.
    """
    known = RayActorManager._actor_task_failed

    def failed(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
        known(manager, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = known
