"""A search on several Ray nodes, which come and go: real nodes on loopback addresses, each a session of its own.

Where the kernel lets us, workers see neither the run directory nor the data: what they need, the cluster brings.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets
import yaml
from optuna.trial import FrozenTrial
from processes import wait_for

import tuner
from tuner import sources
from tuner.cluster import cluster
from tuner.extractors import FeatureExtractors
from tuner.job import load_spec
from tuner.pool import RayPool
from tuner.run import RunFiles
from tuner.scoring import Bench
from tuner.search import parse, request
from tuner.spec import load
from tuner.study import evaluations, read_study, table
from tuner.trials import search_stage
from tuner.vae.metrics import METRICS

ROOT = Path(tuner.__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")
# Eight trials of two epochs at most, all of them named: which one is proposed never depends on who was faster.
POINTS = [
    {"latent_dim": 16, "learning_rate": 0.002, "kl_weight": 0.05},
    {"latent_dim": 8, "learning_rate": 0.003, "kl_weight": 0.1},
    {"latent_dim": 12, "learning_rate": 0.002, "kl_weight": 0.1},
    {"latent_dim": 24, "learning_rate": 0.004, "kl_weight": 0.02},
    {"latent_dim": 6, "learning_rate": 0.005, "kl_weight": 0.2},
    {"latent_dim": 10, "learning_rate": 0.003, "kl_weight": 0.05},
    {"latent_dim": 20, "learning_rate": 0.002, "kl_weight": 0.02},
]
SMALL = [
    f"--trials={1 + len(POINTS)}",
    "--max-epochs=2",
    "--set=budget.grace_epochs=1",
    "--set=budget.reduction_factor=2",
    f"--set=points_to_evaluate={json.dumps(POINTS)}",
    "--no-retrain",
]

pytestmark = pytest.mark.long


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


class Nodes:
    """A cluster whose head takes no work, on loopback addresses that nobody else on this machine is likely to use."""

    def __init__(self, folder: Path, hidden: list[Path]):
        self.network = f"127.{random.randint(10, 250)}.{random.randint(10, 250)}"
        self.folder = folder
        self.hidden = hidden
        self.temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the paths of its sockets must be short
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": self.temporary,
            "RAY_raylet_start_wait_time_s": "120",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "2",
            "RAY_metrics_report_interval_ms": "1000",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.metrics: dict[str, int] = {}
        head = f"{self.network}.2"
        self.address = f"{head}:{free_port(head)}"
        self.dashboard = f"http://{head}:{free_port(head)}"
        self.isolated = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0

    def start_head(self) -> None:
        port, dashboard = self.address.split(":")[1], self.dashboard.rpartition(":")[2]
        host = f"{self.network}.2"
        self._start(
            host,
            *("--head", f"--port={port}", "--num-cpus=0"),
            *(f"--dashboard-host={host}", f"--dashboard-port={dashboard}", "--disable-usage-stats"),
        )

    def start_worker(self, last: int) -> str:
        """Add a node of one CPU at `network.last` -> its address."""
        host = f"{self.network}.{last}"
        self._start(host, f"--address={self.address}", "--num-cpus=1", hidden=self.hidden)
        return host

    def _start(self, host: str, *flags: str, hidden: list[Path] | None = None) -> None:
        self.metrics[host] = free_port(host)
        arguments = [
            *(str(RAY), "start", "--block", f"--node-ip-address={host}", "--object-store-memory=200000000", *flags),
            f"--metrics-export-port={self.metrics[host]}",
            f"--dashboard-agent-listen-port={free_port(host)}",
            f"--dashboard-agent-grpc-port={free_port(host)}",
            f"--runtime-env-agent-port={free_port(host)}",
        ]
        if hidden and self.isolated:
            mounts = "".join(f"mount -t tmpfs none '{path}' && " for path in hidden)
            arguments = ["unshare", "-m", "sh", "-c", f'{mounts} exec "$@"', "sh", *arguments]
        with (self.folder / f"{host}.log").open("wb") as log:
            self.processes[host] = subprocess.Popen(
                arguments, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

        def joined() -> bool:
            """Nodes on one machine join one after the other: two at once may choose the same names for sockets."""
            assert self.processes[host].poll() is None, (self.folder / f"{host}.log").read_text()
            return host in self.alive()

        wait_for(joined, 150, f"{host} never joined")

    def alive(self) -> set[str]:
        """The addresses of the nodes that the head takes for alive."""
        try:
            return {node["node_ip"] for node in self._known("nodes") if node["state"] == "ALIVE"}
        except OSError:
            return set()

    def account(self) -> str:
        """What the head knows of who works and waits: for a search that stands still."""
        kinds = ("nodes", "placement_groups", "actors", "workers")
        return "\n".join(f"{kind}: {record}" for kind in kinds for record in self._known(kind))

    def _known(self, kind: str) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.dashboard}/api/v0/{kind}?detail=1", timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
        return found

    def stop(self, host: str, number: signal.Signals) -> None:
        """Signal all processes of a node."""
        if self.processes[host].poll() is None:
            os.killpg(self.processes[host].pid, number)

    def stop_all(self) -> None:
        for host in reversed(self.processes):
            self.stop(host, signal.SIGKILL)
            self.processes[host].wait()
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where drivers work; workers don't see it."""
    return tmp_path_factory.mktemp("driver")


@pytest.fixture(scope="module")
def nodes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    made = Nodes(tmp_path_factory.mktemp("logs"), [folder, Path(sklearn.datasets.__file__).resolve().parent / "data"])
    try:
        made.start_head()
        yield made
    finally:
        made.stop_all()


def trials(run: RunFiles) -> list[FrozenTrial]:
    study = read_study(run.journal)
    return study.known() if study else []


def scores(run: RunFiles) -> dict[tuple[int, float], dict[str, float]]:
    """By trial and epoch."""
    return {
        (trial.number, found["epoch"]): {name: found[name] for name in METRICS if name in found}
        for trial in trials(run)
        for found in evaluations(trial)
    }


def stamps(run: RunFiles) -> dict[tuple[int, float], int]:
    """When each evaluation was made, by trial and epoch."""
    return {(trial.number, found["epoch"]): found["timestamp"] for trial in trials(run) for found in evaluations(trial)}


def workers(run: RunFiles) -> set[str]:
    return {trial.user_attrs["worker"] for trial in trials(run) if "worker" in trial.user_attrs}


def started(arguments: list[Any], nodes: Nodes, folder: Path, log: str) -> subprocess.Popen[bytes]:
    with (folder / log).open("wb") as file:
        return subprocess.Popen(
            [str(part) for part in arguments],
            env=nodes.environment,
            cwd=folder,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Its exit status; it is killed where it takes longer."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


# One search: workers join, one is killed and one drained


def search_here(path: str) -> None:
    """The same extractors and trials on this machine alone, without the stages after them."""
    run = RunFiles(Path(path))
    spec = load_spec(run, request(parse(["--run", path, *SMALL])))
    data = sources.load(spec.data)
    with run.claimed(), cluster(None, None, spec.resources):
        pool = RayPool(spec, data, concurrency=2)
        extractors = FeatureExtractors(run, spec, data, pool(Bench(spec, data, {})))
        search_stage(run, spec, pool, extractors)


def entrypoint(folder: Path) -> list[str]:
    """The command of k8s/overlays/local as Kubernetes would be given it, its volumes in a folder, and made small."""
    rendered = subprocess.run(
        ["kubectl", "kustomize", ROOT / "k8s/overlays/local"], capture_output=True, text=True, check=True
    )
    (job,) = (part for part in yaml.safe_load_all(rendered.stdout) if part["kind"] == "RayJob")
    places = {"/specs/": f"{ROOT}/search_spaces/", "/results/": f"{folder}/"}
    words = job["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "tuner.search"]
    for place, here in places.items():
        assert any(word.startswith(place) for word in words)
        words = [word.replace(place, here, 1) if word.startswith(place) else word for word in words]
    return [sys.executable, *words[1:], *SMALL]


def worker_of(run: RunFiles) -> int:
    """The process that the one worker at work so far is."""
    (worker,) = workers(run)
    return int(worker.rpartition(":")[2])


@pytest.fixture(scope="module")
def submitted(nodes: Nodes, folder: Path) -> tuple[RunFiles, dict[tuple[int, float], int], int, str]:
    """A search through the Jobs API: its run, the evaluations before 5 joined, its exit status and what it said.

    Its command is that of the Kubernetes manifests. It starts on worker 3 alone, whose trial is stopped after the first
    evaluation until 4 has joined and taken a trial. Then 3 is killed and 4 is asked to leave; 5 joins when both are
    gone. So there is something left to do at each of these moments, however fast or slow this machine is.
    """
    run = RunFiles(folder / "digits")
    nodes.start_worker(3)
    job = started(
        [RAY, "job", "submit", "--address", nodes.dashboard, "--", *entrypoint(folder)], nodes, folder, "job.log"
    )
    try:

        def alive(found: Any) -> Any:
            assert job.poll() is None, (folder / "job.log").read_text()
            return found

        wait_for(lambda: alive(workers(run)), 200, "no evaluation")
        os.kill(worker_of(run), signal.SIGSTOP)
        nodes.start_worker(4)
        wait_for(lambda: alive(len(workers(run)) == 2), 200, "no evaluation on the node that joined")
        nodes.stop(f"{nodes.network}.3", signal.SIGKILL)
        os.kill(nodes.processes[f"{nodes.network}.4"].pid, signal.SIGTERM)
        wait_for(lambda: len(nodes.alive()) == 1, 120, "they never left")
        before = stamps(run)
        nodes.start_worker(5)
        status = ended(job, 240)
        said = (folder / "job.log").read_text() + (nodes.account() if status else "")
    finally:
        ended(job, 0.1)
    return run, before, status, said


def test_a_search_goes_on_to_its_end_while_a_worker_joins_and_works_one_is_killed_one_drained_and_another_joins(
    submitted,
):
    run, before, status, said = submitted
    assert status == 0, said
    assert "succeeded" in said
    assert {path.name for path in run.export.rglob("*")} >= {"config.json", "decoder.onnx"}
    assert run.report.exists()
    assert list(run.summary().test.models) == ["baseline", "best"]
    rows = table(read_study(run.journal), load(run.spec))
    assert [row["trial"] for row in rows] == list(range(8))
    assert run.summary().trials["failed"] == 0, [row["reason"] for row in rows]
    assert {row["state"] for row in rows} <= {"complete", "pruned"}
    assert [row["latent_dim"] for row in rows[1:]] == [point["latent_dim"] for point in POINTS]
    assert any(trial.user_attrs.get("lost") for trial in trials(run))
    assert len(workers(run)) >= 3
    assert before
    assert before.items() <= stamps(run).items(), "what was evaluated before is kept"


@pytest.mark.long
def test_trials_that_moved_score_to_the_last_bit_as_on_one_machine(submitted, nodes, folder):
    run, *_ = submitted
    here = RunFiles(folder / "here")
    code = f"import test_nodes; test_nodes.search_here({str(here.path)!r})"
    assert ended(started([sys.executable, "-c", code], nodes, folder, "here.log"), 200) == 0, (
        folder / "here.log"
    ).read_text()
    assert run.summary().extractors == here.summary().extractors
    there, alone = scores(run), scores(here)
    both = there.keys() & alone.keys()
    assert {number for number, _ in both} == set(range(8))
    assert len(both) >= 10  # which trials go on to the second epoch depends on who was first
    assert {key: there[key] for key in both} == {key: alone[key] for key in both}


def test_on_the_head_runs_nothing_but_the_job_and_what_hands_out_its_files(submitted, nodes):
    """All that trains, fits, scores and writes programs are tasks and actors; Ray knows where each of them ran."""
    heads = {record["node_id"] for record in nodes._known("nodes") if record["node_ip"] == f"{nodes.network}.2"}
    ran: dict[bool, set[str]] = {True: set(), False: set()}
    for record in nodes._known("tasks"):
        if record["node_id"] and record["type"] != "DRIVER_TASK":
            ran[record["node_id"] in heads].add(record["name"].partition(".")[0])
    assert ran[True] <= {"FileServer", "JobSupervisor"}
    assert ran[False] >= {"ResourceTrainable", "_work"}  # as Tune calls a trainable with resources


def test_workers_saw_neither_the_run_directory_nor_the_data(submitted, nodes):
    if not nodes.isolated:
        pytest.skip("this takes the right to mount")
    host = f"{nodes.network}.5"
    root = Path(f"/proc/{nodes.processes[host].pid}/root")
    for path in nodes.hidden:
        assert list(path.iterdir())
        assert list((root / path.relative_to("/")).iterdir()) == []


def test_data_reach_a_node_once_however_many_trials_it_runs(submitted, nodes):
    """A node gets the four objects that all trials share, and the checkpoint of each trial that moved to it.

    And after the search what benches have beside the data, three times, and a model with each task.
    """
    run, before, *_ = submitted
    host = f"{nodes.network}.5"
    count = re.compile(r"^ray_object_store_dist_count{[^}]*ReceivedFromRemoteRaylet[^}]*} (\S+)$", re.MULTILINE)

    def received() -> float:
        with urllib.request.urlopen(f"http://{host}:{nodes.metrics[host]}/metrics", timeout=30) as answer:
            found = count.search(answer.read().decode())
        return float(found[1]) if found else 0.0

    wait_for(received, 60, "Ray tells of no object")
    begun = {number for number, _ in before}
    assert len(trials(run)) - len(begun) >= 3
    promotion, export = 2 * (1 + len(run.summary().promotion)), 4
    assert received() <= 4 + len(begun) + 3 + promotion + export
