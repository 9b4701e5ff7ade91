"""One small real run that all workers of a session share; and a Ray cluster for the tests of one module."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from plain_pool import PlainWorkers
from runs import command

from tuner.cluster import cluster
from tuner.job import load_spec
from tuner.run import RunFiles, write_atomic
from tuner.scoring import Bench
from tuner.search import parse, request
from tuner.spec import OwnModelSpec, Resources
from tuner.vae.process import settle
from tuner.workspace import Workspace, open_workspace

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file that needs the finished run first, the others after those that don't: no worker waits for it. Of these the
    ones with most slow tests first: no worker is left alone with them at the end."""
    waiting = {item.path for item in items if "finished_run" in getattr(item, "fixturenames", ())}
    slow = Counter(item.path for item in items if {"slow", "long"} & {mark.name for mark in item.iter_markers()})
    first = next((item.path for item in items if item.path in waiting), None)
    items.sort(key=lambda item: (item.path != first, item.path in waiting, -slow[item.path]))


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of pytest-xdist's workers, each of which has a folder of its own in it."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def _settled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Settled as each trial is, so that scores are equal to the last bit; clusters of our own alone, and a cache.

    Ctrl-C means what it means in a terminal: a shell that starts a command in the background has it ignored, and the
    commands that the tests start would inherit that.
    """
    settle()
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["XDG_CACHE_HOME"] = str(shared_folder(tmp_path_factory) / "cache")
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, for what is to make its extractors."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vae-tuner"


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's files in a folder of the test's own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.fixture(scope="session")
def small_flags() -> list[str]:
    """Five trials of at most four epochs on the digits, and four epochs of retraining."""
    return [
        "--trials=5",
        "--concurrency=2",
        "--set=budget.max_epochs=4",
        "--set=budget.grace_epochs=1",
        "--set=budget.reduction_factor=2",
        "--set=retrain.epochs=4",
        "--set=retrain.priors=[{prior: gaussian_mixture, prior_components: 5}]",
    ]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, small_flags: list[str]) -> RunFiles:
    """A run that went through all stages. To be read only: `run_copy` is there to be changed.

    The first of pytest-xdist's workers to ask makes it, the others wait for it. It is made in a process of its own:
    whoever asks may have a cluster open.
    """
    folder = shared_folder(tmp_path_factory)
    run = RunFiles(folder / "finished" / "run")
    with (folder / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not run.report.exists():
            done = subprocess.run(command(run.path, *small_flags), cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            (folder / "finished" / "stderr.txt").write_text(done.stderr)
    return run


@pytest.fixture(scope="session")
def workspace(finished_run: RunFiles) -> Workspace:
    """The finished run's, which scores in this process."""
    return replace(open_workspace(finished_run), pool=PlainWorkers)


@pytest.fixture(scope="session")
def bench(workspace: Workspace) -> Bench:
    """What the finished run's models were scored with on validation."""
    return Bench(workspace.spec, workspace.data, workspace.extractors)


@pytest.fixture(scope="session")
def lend_extractors(finished_run: RunFiles) -> Callable[[RunFiles], None]:
    """A function that gives another run the extractors of the finished one."""

    def lend(run: RunFiles) -> None:
        shutil.copytree(finished_run.extractors, run.extractors)
        run.update_summary(extractors=finished_run.summary().extractors)

    return lend


@pytest.fixture(scope="session")
def begin_run(lend_extractors: Callable[[RunFiles], None]) -> Callable[..., RunFiles]:
    """A function that begins a run of the digits as the command does, with the extractors of the finished one.

    It takes the run's path, the command's arguments, and what is known of the user's own model that they name.
    """

    def begin(path: Path, *arguments: str, own: OwnModelSpec | None = None) -> RunFiles:
        run = RunFiles(path)
        write_atomic(run.spec, load_spec(run, request(parse([*arguments])), own).to_yaml())
        lend_extractors(run)
        return run

    return begin


@pytest.fixture
def run_copy(finished_run: RunFiles, tmp_path: Path) -> RunFiles:
    """The finished run once more, to be changed."""
    return RunFiles(Path(shutil.copytree(finished_run.path, tmp_path / "copy")))


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[str]:
    """The address of a local cluster with room for four trials at once, shut down after the module."""
    assert not ray.is_initialized()
    with cluster(None, 4, Resources()):
        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def other_cluster() -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster that someone else started on this machine: its address, and the environment it is found in.

    It is no test's own: Ray replaces 127.0.0.1 in an address, so it listens on 127.0.0.2.
    """
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the paths of its sockets must be short
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}
    flags = ["--node-ip-address=127.0.0.2", "--port=0", "--num-cpus=2", "--include-dashboard=false"]
    arguments = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", *flags, "--disable-usage-stats"]
    node = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    watchdog = threading.Timer(60, node.kill)  # ends the reading below
    watchdog.start()
    try:
        assert node.stdout is not None
        said = ""
        while "will now block" not in said:
            line = node.stdout.readline()
            assert line, f"it did not start: {said}"
            said += line
        watchdog.cancel()
        found = re.search(r"--address='(127\.0\.0\.2:\d+)'", said)
        assert found, said
        yield found[1], environment
    finally:
        watchdog.cancel()
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
        shutil.rmtree(folder, ignore_errors=True)
