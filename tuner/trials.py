"""The part of the job that runs on Ray: the judges, then the trials."""

import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune

from tuner.run import Run, write_atomic
from tuner.searcher import StudySearcher, SuccessiveHalving
from tuner.spec import Spec
from tuner.study import open_study, table
from tuner.terminal import Progress, search_line, stage
from tuner.trainable import TrialTrainable, search_scorer
from tuner.vae.data import Data
from tuner.vae.judge import Judge, train_judge
from tuner.vae.train import Stream, derive_seed
from tuner.views import TensorBoard
from tuner.workspace import JUDGES, Workspace, keep_judges, load_judges

LOOPBACK = "127.0.0.2"  # Ray replaces 127.0.0.1 by the address other machines see


@contextmanager
def cluster(address: str | None, concurrency: int | None) -> Iterator[None]:
    """Join the Ray cluster at `address` or RAY_ADDRESS, or start one on this machine's loopback."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the older reporter honours verbose=0
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the driver is the single writer
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, **quiet)
    else:
        # Ray asks for a token on a cluster it starts; without this one it would leave one in the home directory.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        cpus = max(os.cpu_count() or 1, concurrency or 0)
        ray.init(num_cpus=cpus, include_dashboard=False, _node_ip_address=LOOPBACK, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def judge_stage(run: Run, spec: Spec, data: Data) -> dict[str, Judge]:
    """The run's judges, trained side by side and frozen."""
    with stage(run, "judge") as progress:
        train = ray.remote(num_cpus=1)(train_judge)
        reference = ray.put(data)
        tasks = [
            train.remote(reference, derive_seed(spec.seed, Stream.JUDGE, index), width)
            for index, width in enumerate(JUDGES.values())
        ]
        described = keep_judges(run, data, dict(zip(JUDGES, ray.get(tasks), strict=True)))
        progress.done(", ".join(f"{name} judge {judge['accuracy']:.1%} right" for name, judge in described.items()))
    return load_judges(run)


def search_stage(workspace: Workspace, concurrency: int | None) -> list[dict[str, Any]]:
    """Run the trials that are left and return the rows of trials.csv."""
    run, spec, judge = workspace.run, workspace.spec, workspace.judges["search"]
    study = open_study(run.journal, spec)
    floor = search_scorer(spec, workspace.data, judge).floor
    trainable = tune.with_parameters(TrialTrainable, spec=spec, run=run, data=workspace.data, judge=judge)
    with stage(run, "search") as progress, closing(TensorBoard(run.tensorboard, spec)) as board:
        board.start_search()
        driver = Driver(run, spec, study, floor, progress, board)
        run_trials(study, spec, trainable, run.ray.absolute(), concurrency, [driver])
        driver.keep_table()
        progress.done(driver.line())
    states = Counter(row["state"] for row in driver.rows)
    run.update_summary(trials={state: states[state] for state in ("complete", "pruned", "failed")})
    return driver.rows


def run_trials(
    study: optuna.Study,
    spec: Spec,
    trainable: type[tune.Trainable],
    storage: Path,
    concurrency: int | None,
    callbacks: list[tune.Callback],
) -> None:
    """Ray Tune over what is left of a study. Raises KeyboardInterrupt where it was cut off; the journal stands."""
    searcher = StudySearcher(study, spec)
    if not searcher.remaining:
        return
    begun = time.monotonic()
    at_once = concurrency or max(1, int(ray.cluster_resources().get("CPU", 1)))
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=SuccessiveHalving(study, spec),
            num_samples=searcher.remaining,
            max_concurrent_trials=at_once,
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
    ).fit()
    limit = spec.budget.time_limit
    if searcher.live and not (limit and time.monotonic() - begun >= limit):
        raise KeyboardInterrupt  # Tune takes Ctrl-C for itself and returns as if all was done
    searcher.close()


class Driver(tune.Callback):
    """The driver's end of a report: it alone writes checkpoints, trials.csv and TensorBoard's files."""

    def __init__(self, run: Run, spec: Spec, study: optuna.Study, floor: float, progress: Progress, board: TensorBoard):
        self.run, self.spec, self.study, self.floor = run, spec, study, floor
        self.progress, self.board = progress, board
        self.keep_table()

    def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
        """Ray pickles callbacks for a restore of its own, which the journal replaces."""
        return tune.Callback, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.board.start_trial(trial.config["trial"], trial.config["parameters"])
        self.keep_table()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        checkpoint, sheets = result.pop("checkpoint", None), result.pop("sheets", {})
        if checkpoint is not None:
            write_atomic(self.run.checkpoint(result["trial"]), checkpoint)
            self.board.report_trial(result["trial"], result, sheets)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.keep_table()
        row = self.rows[trial.config["trial"]]
        self.board.end_trial(row["trial"], row["state"], row["reason"])

    on_trial_error = on_trial_complete

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.progress.show(self.line())

    def keep_table(self) -> None:
        self.rows = table(self.study, self.spec, self.floor)
        self.run.write_trials(self.rows)

    def line(self) -> str:
        return search_line(self.rows, self.spec.digest(), self.progress.seconds)
