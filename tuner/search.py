"""The main job, read top to bottom: spec -> judges -> search -> promote -> retrain -> export.

`python -m tuner.search [SPEC.yaml] [--run DIR]`. On a run that was cut off, the same command goes on with it.
"""

import argparse
import logging
import os
import secrets
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune

from tuner import spec as specs
from tuner.export import export_stage
from tuner.promote import promote
from tuner.retrain import retrain_stage
from tuner.run import Run, write_atomic
from tuner.searcher import BASELINE, StudySearcher, SuccessiveHalving, open_study, table
from tuner.spec import Spec
from tuner.terminal import Progress, console, final_words, promotion_table, search_line, stage
from tuner.trainable import TrialTrainable, search_scorer
from tuner.vae import data as datasets
from tuner.vae.data import Data
from tuner.vae.judge import Judge, train_judge
from tuner.vae.train import Stream, derive_seed
from tuner.views import TensorBoard, trial_name
from tuner.workspace import JUDGES, Workspace, keep_judges, load_judges, open_workspace

LOOPBACK = "127.0.0.2"  # Ray replaces 127.0.0.1 by the address other machines see
SHIPPED_SPECS = Path(__file__).parent.parent / "search_spaces"


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        run, spec = open_run(arguments)
        tested = run.summary().get("test", {})
        if "retrained" in tested or (tested and arguments.no_retrain):
            return finish(run, spec)
        directory = arguments.data_dir or spec.data.directory
        data = datasets.load(spec.data.name, directory, spec.data.download)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    if "best" not in run.summary():
        with cluster(arguments.address, arguments.concurrency):
            workspace = Workspace(run, spec, data, judge_stage(run, spec, data), directory)
            rows = search_stage(workspace, arguments.concurrency)
        if not any(row["trial"] == BASELINE and row["epochs_trained"] for row in rows):
            reasons = Counter(row["reason"] for row in rows)
            print("error: the baseline was never scored:", reasons.most_common(1)[0][0], file=sys.stderr)
            return 1
        promote_stage(workspace, rows)
    workspace = open_workspace(run, directory)
    if not arguments.no_retrain and "retrain" not in run.summary():
        retrain_stage(workspace)
    export_stage(workspace)
    return finish(run, spec)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tuner.search",
        description="Search, promote, retrain and export a VAE; on a run that was cut off, go on with it.",
    )
    parser.add_argument("spec", nargs="?", type=Path, help="what to search (default: the embedded digits)")
    parser.add_argument("--run", type=Path, metavar="DIR", help="run directory (default: runs/SPEC-TIME)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where MNIST lies or is downloaded to")
    parser.add_argument("--trials", type=int, metavar="N", help="budget.trials")
    parser.add_argument("--max-epochs", type=float, metavar="N", help="budget.max_epochs")
    parser.add_argument("--time-limit", metavar="TIME", help="budget.time_limit, such as 30m")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the study")
    parser.add_argument("--concurrency", type=int, metavar="N", help="trials at once (default: one a CPU)")
    parser.add_argument("--address", metavar="ADDR", help="join this Ray cluster (default: RAY_ADDRESS, or start one)")
    parser.add_argument("--no-retrain", action="store_true", help="export the best trial as the search left it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the spec, dotted")
    return parser.parse_args(argv)


def open_run(arguments: argparse.Namespace) -> tuple[Run, Spec]:
    """The run directory and its spec, made if new. Raises ValueError where it belongs to another spec."""
    if arguments.concurrency is not None and arguments.concurrency < 1:
        raise ValueError(f"--concurrency {arguments.concurrency}: expected 1 or more")
    flags = {
        "budget.trials": arguments.trials,
        "budget.max_epochs": arguments.max_epochs,
        "budget.time_limit": arguments.time_limit,
        "seed": arguments.seed,
    }
    overrides = [specs.parse_override(text) for text in arguments.set]
    overrides += [(key, value) for key, value in flags.items() if value is not None]
    run = Run(arguments.run) if arguments.run else None
    started = run is not None and run.spec.exists()
    path = arguments.spec or (run.spec if run and started else SHIPPED_SPECS / "digits.yaml")
    spec = specs.load(path, overrides)
    if run is None:
        run = Run(Path("runs") / f"{path.stem}-{datetime.now():%Y%m%d-%H%M%S}")
    if started:
        differences = spec.differences(specs.load(run.spec))
        if differences:
            raise ValueError(f"{run.path}: belongs to another spec: {'; '.join(differences)}")
    elif run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise ValueError(f"{run.path}: exists and is not a run directory")
    else:
        write_atomic(run.spec, spec.to_yaml())
    return run, spec


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
    """The run's frozen judges, trained side by side on the first call."""
    with stage(run, "judge") as progress:
        if not load_judges(run):
            train = ray.remote(num_cpus=1)(train_judge)
            reference = ray.put(data)
            tasks = [
                train.remote(reference, derive_seed(spec.seed, Stream.JUDGE, index), width)
                for index, width in enumerate(JUDGES.values())
            ]
            keep_judges(run, data, dict(zip(JUDGES, ray.get(tasks), strict=True)))
        described = run.summary()["judges"]
        progress.done(", ".join(f"{name} judge {judge['accuracy']:.1%} right" for name, judge in described.items()))
    return load_judges(run)


def search_stage(workspace: Workspace, concurrency: int | None) -> list[dict[str, Any]]:
    """Run the trials that are left and return the rows of trials.csv."""
    run, spec, judge = workspace.run, workspace.spec, workspace.judges["search"]
    study = open_study(run.journal, spec)
    floor = search_scorer(spec, workspace.data, judge).floor
    trainable = tune.with_parameters(TrialTrainable, spec=spec, run=run, data=workspace.data, judge=judge)
    with stage(run, "search") as progress, closing(TensorBoard(run.tensorboard)) as board:
        driver = Driver(run, spec, study, floor, progress, board)
        run_trials(study, spec, trainable, run.ray.absolute(), concurrency, [driver])
        driver.keep_table()
        progress.done(driver.line())
    states = Counter(row["state"] for row in driver.rows)
    run.update_summary(trials={state: states[state] for state in ("complete", "pruned", "failed")})
    return driver.rows


def promote_stage(workspace: Workspace, rows: list[dict[str, Any]]) -> None:
    with stage(workspace.run, "promote") as progress:
        summary = promote(workspace, rows)
        progress.done(f"trial {summary['best']['trial']} won among {len(summary['promotion'])} under two judges")
    console().print(promotion_table(summary["promotion"], workspace.spec.objective[0].metric))


def run_trials(
    study: optuna.Study,
    spec: Spec,
    trainable: type[tune.Trainable],
    storage: Path,
    concurrency: int | None,
    callbacks: list[tune.Callback],
) -> None:
    """Ray Tune over what is left of a study."""
    searcher = StudySearcher(study, spec)
    if not searcher.remaining:
        return
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
            trial_name_creator=lambda trial: trial_name(trial.config["trial"]),
            trial_dirname_creator=lambda trial: trial_name(trial.config["trial"]),
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=str(storage),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the driver keeps them
            verbose=0,
            callbacks=callbacks,
        ),
    ).fit()
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
        checkpoint, sheet = result.pop("checkpoint", None), result.pop("sheet", None)
        if checkpoint is not None:
            write_atomic(self.run.checkpoint(result["trial"]), checkpoint)
            self.board.report(trial_name(result["trial"]), result, sheet)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.keep_table()
        self.board.end_trial(trial.config["trial"], self.rows[trial.config["trial"]]["state"])

    on_trial_error = on_trial_complete

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.progress.show(self.line())

    def keep_table(self) -> None:
        self.rows = table(self.study, self.spec, self.floor)
        self.run.write_trials(self.rows)

    def line(self) -> str:
        objective = self.spec.objective[0]
        sign = 1 if objective.direction == "minimize" else -1
        return search_line(self.rows, self.spec.budget.trials, objective.metric, sign, self.progress.seconds)


def finish(run: Run, spec: Spec) -> int:
    """The closing table, and where to look."""
    for part in final_words(run, list(spec.space)):
        console().print(part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
