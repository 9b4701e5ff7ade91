"""The part of the job that runs on Ray: the trials."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.autoscaler import sdk as autoscaler
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuner.callbacks import KeepCheckpoints, KeepExtractors, KeepTable, ShowTrials
from tuner.cluster import alive, dead_processes, slots
from tuner.extractors import EXTRACTORS, FeatureExtractors
from tuner.fusion import Fusion, fusion
from tuner.own_model import told
from tuner.run import Refused, RunFiles
from tuner.searcher import StudySearcher, SuccessiveHalving
from tuner.spec import Resources, Spec
from tuner.study import ENDED, Study, open_study
from tuner.tensorboard import TensorBoard
from tuner.terminal import stage
from tuner.trainable import FileServer, Shared, TrialTrainable
from tuner.vae.data import Data
from tuner.vae.model import OwnModel
from tuner.vae.process import settle


def search_stage(
    run: RunFiles,
    spec: Spec,
    data: Data,
    extractors: FeatureExtractors,
    concurrency: int | None,
    own: OwnModel | None = None,
) -> list[dict[str, Any]]:
    """Run the trials that are left -> the rows of trials.csv; the extractors are trained and kept on the way."""
    settle()  # the floor is measured here
    send_by_value(spec, own)
    study = open_study(run.journal, spec)
    reference = ray.put(data)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    files = lasting(FileServer).remote(run)
    fused = fusion(spec, reference, concurrency)
    shared = Shared(spec, files, reference, fused.arrays, own)
    with stage(run, "search") as progress, closing(TensorBoard(run.tensorboard, spec)) as board:
        board.start_search()
        table = KeepTable(run, spec, study)
        shown = ShowTrials(spec, table, board, progress)
        callbacks = [table, KeepCheckpoints(run, spec, table), KeepExtractors(spec, study, extractors), shown]
        trainable = tune.with_parameters(TrialTrainable, shared=shared)
        run_trials(study, spec, trainable, run.ray.absolute(), concurrency, callbacks, fused, extractors.in_training)
        table.write()
        progress.done(shown.line())
    with stage(run, "extractor") as progress:
        for name in EXTRACTORS:
            extractors.keep(name)
        described = (f"{name} extractor: {info.words}" for name, info in run.summary().extractors.items())
        progress.done("; ".join(described))
    states = Counter(row["state"] for row in table.rows)
    run.update_summary(trials={state: states[state] for state in ENDED})
    return table.rows


def send_by_value(spec: Spec, own: OwnModel | None) -> None:
    """Let the package of a user's own model travel with it: workers need not have it. Raises Refused where it can't."""
    if own is None or not spec.own_model:
        return
    package = spec.own_model.function.partition(":")[0].partition(".")[0]
    cloudpickle.register_pickle_by_value(sys.modules[package])
    try:
        cloudpickle.dumps(own)
    except Exception as error:  # whatever their code makes of it
        raise Refused(f"--model {spec.own_model.function}: can't be sent to workers: {told(error)}") from error


def _bundle(wanted: Resources) -> dict[str, float]:
    return {"CPU": wanted.cpu} | ({"GPU": wanted.gpu} if wanted.gpu else {})


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

    def capacity() -> float:
        """Trials at once, as nodes come and go."""
        there = sum(slots(node["Resources"], wanted) for node in alive())
        at_once = min(there, concurrency or there)
        return max(at_once - others(), min(at_once, 1))

    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(spec.budget.trials)  # the searcher holds back by itself
    while True:
        searcher = StudySearcher(study, spec, capacity)
        left = searcher.remaining
        if not left:
            return
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": wanted.cpu, "gpu": wanted.gpu}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=SuccessiveHalving(study, spec),
                num_samples=-1,  # the searcher ends it
                time_budget_s=spec.budget.time_limit,
                reuse_actors=True,
                trial_name_creator=lambda trial: f"{trial.config['trial']:04d}",
                trial_dirname_creator=lambda trial: f"{trial.config['trial']:04d}",
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=str(storage),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the driver keeps them
                verbose=0,
                callbacks=list(callbacks),
            ),
        )
        autoscaler.request_resources(bundles=[_bundle(wanted)] * min(left, concurrency or left))
        try:
            tuner.fit()
        except RuntimeError as error:
            # Tune gives up where a report is lost along with its node; the study knows what is left to do.
            if not isinstance(error.__cause__, ray.exceptions.ObjectLostError):
                raise
        else:
            searcher.close()
            return
        finally:
            if not dead_processes():
                autoscaler.request_resources(bundles=[])
