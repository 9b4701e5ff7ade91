"""The Ray cluster that a search runs on: joined or started, with room for a trial, and alive."""

import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants  # what a cluster of our own does without has no public switch
from ray._private.grpc_utils import init_grpc_channel  # past proxies and with certificates, as Ray itself connects
from ray._private.services import canonicalize_bootstrap_address  # what Ray makes of an address, before it waits
from ray._private.utils import get_num_cpus, validate_socket_filepath  # the cores of a container, as Ray counts them
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import RayError

from tuner.exits import CutOff
from tuner.spec import Resources
from tuner.terminal import console
from tuner.vae.errors import Refused, named, refusing

CONNECT_SECONDS = 5
SHORT_FOLDER = "/tmp/ray"  # Ray's own where the environment names none
DEAD_SECONDS = 0.2  # until a process whose connections broke is known to be dead
WORKER_SECONDS = 60  # as long as Ray itself waits for a worker's first word
NO_AUTOSCALER = "0"  # the version of the autoscaler's state where there is none


# A cluster of our own, as on a Mac: Ray takes 127.0.0.1 for its address and opens ports nowhere else. And its workers
# run in this environment as it is, where `uv run` would have each made from a copy of this folder.
OWN = {"ENABLE_RAY_CLUSTER": False, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": False}

# With the first Ray starts workers before they are asked for, and waits for ever for one that dies before it is up;
# without the second it does again for ever what takes more memory than there is.
SYSTEM = {"prestart_worker_first_driver": False, "task_oom_retries": 3}


def address_of(given: str | None) -> str | None:
    """The cluster to join, in Ray's words: `given` or RAY_ADDRESS; None for one of our own.

    Raises Refused where no cluster answers: Ray itself waits minutes for one that isn't there.
    """
    name, address = "--address", given
    if given in (None, "", "auto") and os.environ.get("RAY_ADDRESS"):
        name, address = "RAY_ADDRESS", os.environ["RAY_ADDRESS"]
    if not address or address == "local":
        return None
    found, _, port = address.rpartition(":")
    if address != "auto" and ("://" in address or not (found and port.isdigit())):
        raise Refused(
            f"{name} {address}: expected HOST:PORT of a cluster's head, auto or local; Ray Client (ray://) and the "
            "dashboard can't run a search, but `ray job submit` can"
        )
    with refusing(f"{name} {address}"):
        place = canonicalize_bootstrap_address(address)
        channel = init_grpc_channel(place, ray_constants.GLOBAL_GRPC_OPTIONS)
    try:
        grpc.channel_ready_future(channel).result(CONNECT_SECONDS)
    except grpc.FutureTimeoutError as error:
        raise Refused(f"{name} {address}: no Ray cluster answers there") from error
    finally:
        channel.close()
    return address


@contextmanager
def cluster(address: str | None, concurrency: int | None, wanted: Resources) -> Iterator[None]:
    """Join the Ray cluster that `address_of` found, or start one that listens on this machine's loopback alone.

    Raises CutOff where Ray can't start or dies, and Refused where it can't join or no node can ever hold a trial.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the older reporter honours verbose=0
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the driver is the single writer
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune would return as if all was done
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "inf"  # of its own state, which the journal replaces
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": True}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    before = {name: getattr(ray_constants, name) for name in OWN}
    try:
        if address:
            with refusing(f"Ray can't join {address}"):
                ray.init(address=address, **quiet)
        else:
            vars(ray_constants).update(OWN)
            # Ray asks for a token on a cluster it starts; without this one it would leave one in the home directory.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            os.environ.pop("RAY_REDIS_ADDRESS", None)  # where another cluster keeps its state
            logging.getLogger("ray._private.utils").setLevel(logging.CRITICAL)  # it warns of less than a core
            cpus = max(1, get_num_cpus(), concurrency or 0)  # knows the limits of containers
            mine: dict[str, Any] = {"_temp_dir": _ray_folder(), "_system_config": SYSTEM}
            try:
                ray.init("local", num_cpus=cpus, include_dashboard=False, **mine, **quiet)
            except Exception as error:  # its processes were slow to come up, or died, or can't be where they are told
                raise CutOff(named("Ray can't start", error)) from error
        _restore(on_sigterm)  # Ray has put its own in place
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what goes wrong is told as the trial's reason
        _require_room(wanted)
        with worker_awaited(wanted):
            yield
    except (OSError, RayError):  # also what Ray makes of it where it dies in the midst of a call
        time.sleep(DEAD_SECONDS)
        require_ray()
        raise
    finally:
        ray.shutdown()
        vars(ray_constants).update(before)
        _restore(on_sigterm)  # Ray's C++ has put the system's default in place


def _restore(on_sigterm: Any) -> None:
    """Another thread than the first, as some notebooks have, may set no handler."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)


def _ray_folder() -> str:
    """Where a cluster of our own keeps its logs and sockets; sockets' paths have to be short."""
    folder = str(get_default_ray_temp_dir())
    try:
        validate_socket_filepath(f"{folder}/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store")
    except OSError:
        said = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        console().print(f"note     Ray works in {SHORT_FOLDER}: {said} is too long a path for its sockets")
        return SHORT_FOLDER
    return folder


def _require_room(wanted: Resources) -> None:
    """Ray itself would wait for ever for a node that is large enough; where nodes come by themselves, so do we."""
    version = get_cluster_status(ray.get_runtime_context().gcs_address).stats.autoscaler_version
    if version == NO_AUTOSCALER and not any(slots(node["Resources"], wanted) for node in alive()):
        there = "; ".join(
            f"{node['NodeManagerAddress']} has {node['Resources'].get('CPU', 0):g} CPU and "
            f"{node['Resources'].get('GPU', 0):g} GPU"
            for node in alive()
        )
        raise Refused(
            f"no node can hold a trial: resources asks for {wanted.cpu:g} CPU and {wanted.gpu:g} GPU; {there}"
        )


@contextmanager
def worker_awaited(wanted: Resources, seconds: float = WORKER_SECONDS) -> Iterator[None]:
    """Say so where no worker comes up in time, with Ray's last words: it tries for ever, and tells its logs alone."""
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())

    def tell() -> None:
        told = [line for line in _lines(logs / "raylet.out") if " E " in line] + _lines(logs / "raylet.err")
        # a disk that is nearly full is told of every ten seconds, and keeps no worker from coming up
        lines = [line for line in told if "file_system_monitor" not in line]
        said = f"Ray's last words: {lines[-1].strip()} ({logs})" if lines else "no node may have room: see `ray status`"
        print(f"warning: no worker has come up in {seconds:g} s; {said}", file=sys.stderr)

    timer = threading.Timer(seconds, tell)
    timer.daemon = True
    timer.start()
    first = ray.remote(num_cpus=wanted.cpu, num_gpus=wanted.gpu)(_come_up).remote()
    first.future().add_done_callback(lambda _: timer.cancel())
    try:
        yield
    finally:
        timer.cancel()


def _come_up() -> None:
    """Import what whatever comes next in this worker takes longest to import, while the driver still does so."""
    import torch  # noqa: F401


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []


def slots(node: dict[str, float], wanted: Resources) -> int:
    """How many trials a node with these resources holds at once."""
    slots = int(node.get("CPU", 0) / wanted.cpu)
    return min(slots, int(node.get("GPU", 0) / wanted.gpu)) if wanted.gpu else slots


def alive() -> list[dict[str, Any]]:
    """The nodes that are there, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def dead_processes() -> list[str]:
    """Which of the processes that a cluster of our own can't do without have died."""
    node = ray._private.worker._global_node  # Ray tells nobody else that its own processes are gone
    return sorted({"raylet", "gcs_server"} & {kind for kind, _ in node.dead_processes()}) if node else []


def require_ray() -> None:
    """Raises CutOff where the cluster that this process started has died: Ray would take a minute."""
    if dead_processes():
        raise CutOff(f"Ray's {' and '.join(dead_processes())} died")
