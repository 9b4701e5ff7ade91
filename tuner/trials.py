"""The part of the job that runs on Ray: the extractors and the trials."""

import math
import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.autoscaler import sdk as autoscaler
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuner.cluster import alive, dead_processes, require_ray, slots
from tuner.exits import fatal
from tuner.extractors import FeatureExtractors
from tuner.fusion import Fusion, fusion
from tuner.promote import contenders
from tuner.run import OUTCOMES, Refused, RunFiles, write_atomic
from tuner.searcher import StudySearcher, SuccessiveHalving
from tuner.spec import Resources, Spec
from tuner.study import BASELINE, open_study, table
from tuner.tensorboard import TensorBoard
from tuner.terminal import Progress, search_line, stage
from tuner.trainable import Files, Shared, TrialTrainable, search_scorer
from tuner.vae.data import Data
from tuner.vae.process import settle
from tuner.workspace import EXTRACTORS


def search_stage(
    run: RunFiles, spec: Spec, data: Data, extractors: FeatureExtractors, concurrency: int | None
) -> list[dict[str, Any]]:
    """Run the trials that are left -> the rows of trials.csv; the extractors are trained and kept on the way."""
    settle()  # the floor is measured here
    study = open_study(run.journal, spec)
    require_whole(run, study)
    reference = ray.put(data)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    files = lasting(Files).remote(run)
    fused = fusion(spec, reference, concurrency)
    shared = Shared(spec, files, reference, fused.arrays)
    with stage(run, "search") as progress, closing(TensorBoard(run.tensorboard, spec)) as board:
        board.start_search()
        driver = Driver(run, spec, study, extractors, progress, board)
        trainable = tune.with_parameters(TrialTrainable, shared=shared)
        run_trials(study, spec, trainable, run.ray.absolute(), concurrency, [driver], fused, extractors.in_training)
        driver.keep_table()
        progress.done(driver.line())
    with stage(run, "extractor") as progress:
        for name in EXTRACTORS:
            extractors.keep(name)
        described = run.summary()["extractors"]
        progress.done(", ".join(f"{name} extractor {described[name]['accuracy']:.1%} right" for name in EXTRACTORS))
    states = Counter(row["state"] for row in driver.rows)
    run.update_summary(trials={state: states[state] for state in OUTCOMES})
    return driver.rows


def require_whole(run: RunFiles, study: optuna.Study) -> None:
    """Raises Refused where the journal knows less than trials.csv, which is written after it."""
    finished = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
    listed = sum(row["state"] in OUTCOMES for row in run.read_trials())
    if finished < listed:
        raise Refused(
            f"{run.name_of(run.journal)}: has {finished} finished trials where {run.trials.name} has {listed}"
        )


def _bundle(wanted: Resources) -> dict[str, float]:
    return {"CPU": wanted.cpu} | ({"GPU": wanted.gpu} if wanted.gpu else {})


def run_trials(
    study: optuna.Study,
    spec: Spec,
    trainable: type[tune.Trainable],
    storage: Path,
    concurrency: int | None,
    callbacks: list[tune.Callback],
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
                callbacks=callbacks,
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


class Driver(tune.Callback):
    """The driver's end of a report: it alone writes checkpoints, trials.csv and TensorBoard's files."""

    def __init__(
        self,
        run: RunFiles,
        spec: Spec,
        study: optuna.Study,
        extractors: FeatureExtractors,
        progress: Progress,
        board: TensorBoard,
    ):
        self.run, self.spec, self.study, self.extractors = run, spec, study, extractors
        self.progress, self.board = progress, board
        self.floor = math.nan
        self.keep_extractors()
        self.keep_table()
        self.before = sum(row["state"] in OUTCOMES for row in self.rows)

    def keep_extractors(self) -> None:
        """Trials wait for the first; the floor is known as soon as it is, which is before the first report."""
        self.extractors.keep_done()
        if math.isnan(self.floor) and "search" in self.extractors.kept:
            self.floor = search_scorer(self.spec, self.extractors.data, self.extractors.kept["search"]).floor

    def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
        """Ray pickles callbacks for a restore of its own, which the journal replaces."""
        return tune.Callback, ()

    @fatal
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        self.board.start_trial(number, trial.config["parameters"])
        if 4 * (number + 1) >= 3 * self.spec.budget.trials:
            self.extractors.begin("second")  # begun with the last trial, the promotion would wait for it
        self.keep_table()

    @fatal
    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        checkpoint, image_grids = result.pop("checkpoint", None), result.pop("image_grids", {})
        if checkpoint is not None:
            write_atomic(self.run.checkpoint(result["trial"]), checkpoint)
        if image_grids:  # a repeated report has none
            self.board.report_trial(result["trial"], result, image_grids)

    @fatal
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.keep_table()
        row = self.rows[trial.config["trial"]]
        if row["state"] != "running":  # else its worker was lost, and it is put back
            self.board.end_trial(row["trial"], row["state"], row["reason"])

    on_trial_error = on_trial_complete

    @fatal
    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        require_ray()
        self.keep_extractors()
        self.progress.show(self.line())

    def keep_table(self) -> None:
        self.rows = table(self.study, self.spec, self.floor)
        self.run.write_trials(self.rows)
        kept = {row["trial"] for row in contenders(self.rows, self.spec)} | {BASELINE}
        for row in self.rows:
            if row["state"] in OUTCOMES and row["trial"] not in kept:
                self.run.checkpoint(row["trial"]).unlink(missing_ok=True)

    def line(self) -> str:
        return search_line(self.rows, self.spec.digest(), self.progress.seconds, self.before)
