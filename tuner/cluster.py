"""The Ray cluster that a search runs on: joined or started, with room for a trial, and alive."""

import logging
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants  # whether a cluster of its own listens beyond loopback has no public switch
from ray._private.services import resolve_ip_for_localhost  # what Ray itself makes of an address, before it waits
from ray._private.utils import get_num_cpus, validate_socket_filepath  # as Ray itself counts and measures
from ray.autoscaler.v2.sdk import get_cluster_status

from tuner.exits import CutOff
from tuner.spec import Resources
from tuner.terminal import console
from tuner.vae.errors import Refused

CONNECT_SECONDS = 5
SHORT_FOLDER = "/tmp/ray"  # Ray's own where the environment names none
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
        cpus = max(get_num_cpus(), concurrency or 0)  # knows the limits of containers
        ray.init("local", num_cpus=cpus, include_dashboard=False, _temp_dir=_ray_folder(), **quiet)
    try:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in place
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what goes wrong is told as the trial's reason
        _require_room(wanted)
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's C++ has put the system's default in place


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
