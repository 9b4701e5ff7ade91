"""The part of the job that runs on Ray: the judges, then the trials."""

import logging
import os
import secrets
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import optuna
import ray
from ray import tune
from ray._private import ray_constants
from ray._private.services import resolve_ip_for_localhost
from ray.autoscaler import sdk as autoscaler
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuner.exits import CutOff, fatal
from tuner.promote import contenders
from tuner.run import Refused, Run, write_atomic
from tuner.searcher import StudySearcher, SuccessiveHalving
from tuner.spec import Resources, Spec
from tuner.study import BASELINE, open_study, table
from tuner.terminal import Progress, search_line, stage
from tuner.trainable import CheckpointReader, TrialTrainable, search_scorer
from tuner.vae.data import Data
from tuner.vae.judge import Judge, train_judge
from tuner.vae.process import settle
from tuner.vae.train import Stream, derive_seed
from tuner.views import TensorBoard
from tuner.workspace import JUDGES, Workspace, keep_judges, load_judges

WORKER_RETRIES = 3  # how often a trial whose worker died goes on from its checkpoint
CONNECT_SECONDS = 5
NO_AUTOSCALER = "0"  # the version of the autoscaler's state where there is none


@contextmanager
def cluster(address: str | None, concurrency: int | None, wanted: Resources) -> Iterator[None]:
    """Join the Ray cluster at `address` or RAY_ADDRESS, or start one that listens on this machine's loopback alone.

    Raises Refused where no cluster answers, or where none of its nodes can ever hold a trial.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the older reporter honours verbose=0
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the driver is the single writer
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune would return as if all was done
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": True}
    address = address or os.environ.get("RAY_ADDRESS")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    # Without clusters allowed, as on a Mac, Ray takes 127.0.0.1 for its address and opens ports nowhere else.
    ray_constants.ENABLE_RAY_CLUSTER = bool(address)
    if address:
        _require_answer(address)
        ray.init(address=address, **quiet)
    else:
        # Ray asks for a token on a cluster it starts; without this one it would leave one in the home directory.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        cpus = max(os.cpu_count() or 1, concurrency or 0)
        ray.init("local", num_cpus=cpus, include_dashboard=False, **quiet)  # whatever else runs here
    try:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in place
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what goes wrong is told as the trial's reason
        _require_room(wanted)
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Ray itself waits minutes for a cluster that isn't there."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise Refused(f"--address {address}: expected HOST:PORT")
    channel = grpc.insecure_channel(f"{resolve_ip_for_localhost(host)}:{port}")
    try:
        grpc.channel_ready_future(channel).result(CONNECT_SECONDS)
    except grpc.FutureTimeoutError as error:
        raise Refused(f"--address {address}: no Ray cluster answers there") from error
    finally:
        channel.close()


def _require_room(wanted: Resources) -> None:
    """Ray itself would wait for ever for a node that is large enough; where nodes come by themselves, so do we."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    version = get_cluster_status(ray.get_runtime_context().gcs_address).stats.autoscaler_version
    if version == NO_AUTOSCALER and not any(_slots(node["Resources"], wanted) for node in nodes):
        there = "; ".join(
            f"{node['NodeManagerAddress']} has {node['Resources'].get('CPU', 0):g} CPU and "
            f"{node['Resources'].get('GPU', 0):g} GPU"
            for node in nodes
        )
        raise Refused(
            f"no node can hold a trial: resources asks for {wanted.cpu:g} CPU and {wanted.gpu:g} GPU; {there}"
        )


def _slots(node: dict[str, float], wanted: Resources) -> int:
    """How many trials a node with these resources holds at once."""
    slots = int(node.get("CPU", 0) / wanted.cpu)
    return min(slots, int(node.get("GPU", 0) / wanted.gpu)) if wanted.gpu else slots


def dead_processes() -> list[str]:
    """Which of the processes that a cluster of our own can't do without have died."""
    node = ray._private.worker._global_node
    return sorted({"raylet", "gcs_server"} & {kind for kind, _ in node.dead_processes()}) if node else []


def require_ray() -> None:
    """Raises CutOff where the cluster that this process started has died: Ray would take a minute."""
    if dead_processes():
        raise CutOff(f"Ray's {' and '.join(dead_processes())} died")


def _bundle(wanted: Resources) -> dict[str, float]:
    return {"CPU": wanted.cpu} | ({"GPU": wanted.gpu} if wanted.gpu else {})


def _settled_judge(data: Data, seed: int, width: int) -> Judge:
    settle()
    return train_judge(data, seed, width)


def judge_stage(run: Run, spec: Spec, data: Data) -> dict[str, Judge]:
    """The run's judges, trained side by side and frozen."""
    with stage(run, "judge") as progress:
        train = ray.remote(num_cpus=1)(_settled_judge)
        reference = ray.put(data)
        tasks = [
            train.remote(reference, derive_seed(spec.seed, Stream.JUDGE, index), width)
            for index, width in enumerate(JUDGES.values())
        ]
        left = tasks
        while left:
            require_ray()
            _, left = ray.wait(left, timeout=1)
        described = keep_judges(run, data, dict(zip(JUDGES, ray.get(tasks), strict=True)))
        progress.done(", ".join(f"{name} judge {judge['accuracy']:.1%} right" for name, judge in described.items()))
    return load_judges(run)


def search_stage(workspace: Workspace, concurrency: int | None) -> list[dict[str, Any]]:
    """Run the trials that are left and return the rows of trials.csv."""
    run, spec, judge = workspace.run, workspace.spec, workspace.judges["search"]
    study = open_study(run.journal, spec)
    floor = search_scorer(spec, workspace.data, judge).floor
    require_whole(run, study)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    reader = lasting(CheckpointReader).remote(run)
    trainable = tune.with_parameters(TrialTrainable, spec=spec, checkpoints=reader, data=workspace.data, judge=judge)
    with stage(run, "search") as progress, closing(TensorBoard(run.tensorboard, spec)) as board:
        board.start_search()
        driver = Driver(run, spec, study, floor, progress, board)
        run_trials(study, spec, trainable, run.ray.absolute(), concurrency, [driver])
        driver.keep_table()
        progress.done(driver.line())
    states = Counter(row["state"] for row in driver.rows)
    run.update_summary(trials={state: states[state] for state in ("complete", "pruned", "failed")})
    return driver.rows


def require_whole(run: Run, study: optuna.Study) -> None:
    """Raises Refused where the journal knows less than trials.csv, which is written after it."""
    finished = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
    listed = sum(row["state"] != "running" for row in run.read_trials())
    if finished < listed:
        raise Refused(
            f"{run.name_of(run.journal)}: has {finished} finished trials where {run.trials.name} has {listed}"
        )


def run_trials(
    study: optuna.Study,
    spec: Spec,
    trainable: type[tune.Trainable],
    storage: Path,
    concurrency: int | None,
    callbacks: list[tune.Callback],
) -> None:
    """Ray Tune over what is left of a study."""
    wanted = spec.resources

    def capacity() -> float:
        """Trials at once, as nodes come and go."""
        there = sum(_slots(node["Resources"], wanted) for node in ray.nodes() if node["Alive"])
        return min(there, concurrency or there)

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
                num_samples=left,
                time_budget_s=spec.budget.time_limit,
                reuse_actors=True,
                trial_name_creator=lambda trial: f"{trial.config['trial']:04d}",
                trial_dirname_creator=lambda trial: f"{trial.config['trial']:04d}",
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=str(storage),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the driver keeps them
                failure_config=tune.FailureConfig(max_failures=WORKER_RETRIES),
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

    def __init__(self, run: Run, spec: Spec, study: optuna.Study, floor: float, progress: Progress, board: TensorBoard):
        self.run, self.spec, self.study, self.floor = run, spec, study, floor
        self.progress, self.board = progress, board
        self.keep_table()

    def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
        """Ray pickles callbacks for a restore of its own, which the journal replaces."""
        return tune.Callback, ()

    @fatal
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.board.start_trial(trial.config["trial"], trial.config["parameters"])
        self.keep_table()

    @fatal
    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        checkpoint, sheets = result.pop("checkpoint", None), result.pop("sheets", {})
        if checkpoint is not None:
            write_atomic(self.run.checkpoint(result["trial"]), checkpoint)
        if sheets:  # a repeated report has none
            self.board.report_trial(result["trial"], result, sheets)

    @fatal
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.keep_table()
        row = self.rows[trial.config["trial"]]
        self.board.end_trial(row["trial"], row["state"], row["reason"])

    on_trial_error = on_trial_complete

    @fatal
    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        require_ray()
        self.progress.show(self.line())

    def keep_table(self) -> None:
        self.rows = table(self.study, self.spec, self.floor)
        self.run.write_trials(self.rows)
        kept = {row["trial"] for row in contenders(self.rows, self.spec)} | {BASELINE}
        for row in self.rows:
            if row["state"] != "running" and row["trial"] not in kept:
                self.run.checkpoint(row["trial"]).unlink(missing_ok=True)

    def line(self) -> str:
        return search_line(self.rows, self.spec.digest(), self.progress.seconds)
