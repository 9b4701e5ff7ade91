"""The cluster of a search: one of its own or one that runs already, with room for a trial, and alive.

One search on nodes that come and go is in test_nodes.
"""

import inspect
import re
import socket
import subprocess
import sys

import pytest
import ray
from ray._private import ray_constants
from ray._private.services import resolve_ip_for_localhost
from ray._private.utils import get_num_cpus
from ray.autoscaler.v2.sdk import get_cluster_status

from tuner.cluster import NO_AUTOSCALER, alive, cluster, dead_processes, require_ray, slots
from tuner.search import main
from tuner.spec import Resources
from tuner.vae.errors import Refused


def refusal(address: str | None, wanted: Resources, concurrency: int | None = None) -> str:
    with pytest.raises(Refused) as refused, cluster(address, concurrency, wanted):
        pytest.fail("it was opened")
    assert not ray.is_initialized()
    (line,) = str(refused.value).splitlines()
    return line


# Places for trials


@pytest.mark.parametrize(
    ("node", "wanted", "places"),
    [
        ({"CPU": 4.0}, Resources(), 4),
        ({"CPU": 3.0}, Resources(cpu=2), 1),
        ({"CPU": 1.0}, Resources(cpu=2), 0),
        ({"CPU": 1.0}, Resources(cpu=0.25), 4),
        ({"CPU": 8.0, "GPU": 2.0}, Resources(cpu=1, gpu=1), 2),
        ({"CPU": 1.0, "GPU": 2.0}, Resources(cpu=1, gpu=0.5), 1),
        ({"CPU": 8.0}, Resources(cpu=1, gpu=1), 0),
        ({"memory": 1e9}, Resources(), 0),
    ],
)
def test_a_node_holds_as_many_trials_as_each_of_its_resources_allows(node, wanted, places):
    assert slots(node, wanted) == places


# A cluster of its own


def test_it_is_one_node_on_loopback_with_a_place_for_each_trial_that_is_to_run_at_once():
    with cluster(None, 3, Resources()):
        (node,) = alive()
        assert node["NodeManagerAddress"] == "127.0.0.1"
        assert slots(node["Resources"], Resources()) == max(3, get_num_cpus())
        assert dead_processes() == []
        require_ray()  # raises nothing
    assert not ray.is_initialized()


def test_signals_do_what_they_did_before_while_it_is_open_and_afterwards():
    """Ray's C++ has handlers of its own, of which Python knows nothing: so they are sent."""
    code = """
import os, signal
from tuner.cluster import cluster
from tuner.spec import Resources
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: print(signal.Signals(number).name))
def send():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
with cluster(None, 1, Resources()):
    send()
send()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["SIGINT", "SIGTERM"] * 2), done.stderr


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_with_too_long_a_path_for_sockets_is_replaced_and_that_is_said(
    tmp_path, monkeypatch, capsys, name
):
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, str(folder))
    with cluster(None, 1, Resources()):
        assert len(alive()) == 1
    assert capsys.readouterr().err == f"note     Ray works in /tmp/ray: {name} is too long a path for its sockets\n"
    assert not list(folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raylet", "gcs_server"])
def test_the_death_of_one_of_its_processes_is_told_by_its_name_at_once(kind):
    """In a process of its own, which Ray may end in its C++ a while later."""
    code = f"""
import os, ray, signal, time
from tuner.cluster import cluster, dead_processes, require_ray
from tuner.spec import Resources
with cluster(None, 1, Resources()):
    process = ray._private.worker._global_node.all_processes[{kind!r}][0].process
    process.send_signal(signal.SIGKILL)
    while not dead_processes():
        time.sleep(0.001)
    try:
        require_ray()
    except Exception as error:
        os.write(1, f"\\n{{type(error).__name__}} {{error}}\\n".encode())  # at once: Ray writes there, too
        os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert f"CutOff Ray's {kind} died" in done.stdout.splitlines(), done.stdout + done.stderr


# One that runs already


@pytest.mark.slow
def test_it_is_joined_as_it_is_and_goes_on_without_us(other_cluster):
    address, environment = other_cluster
    code = f"""
import ray
from tuner.cluster import alive, cluster, dead_processes
from tuner.spec import Resources
with cluster({address!r}, 8, Resources()):
    (node,) = alive()
    print(node["NodeManagerAddress"], node["Resources"]["CPU"], dead_processes(), ray.is_initialized())
print(ray.is_initialized())
"""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout == "127.0.0.2 2.0 [] True\nFalse\n", done.stderr


# No room


def test_a_trial_that_the_own_node_can_never_hold_is_refused_with_what_is_asked_and_what_there_is():
    line = refusal(None, Resources(cpu=0.5, gpu=100), concurrency=3)
    words = "no node can hold a trial: resources asks for 0.5 CPU and 100 GPU; 127.0.0.1 has"
    assert re.fullmatch(rf"{re.escape(words)} {max(3, get_num_cpus())} CPU and \d+ GPU", line), line


@pytest.mark.slow
def test_so_is_one_that_the_cluster_it_is_sent_to_can_never_hold(other_cluster, tmp_path):
    address, environment = other_cluster
    arguments = ["--run", str(tmp_path / "run"), f"--address={address}", "--set=resources.cpu=1000"]
    done = subprocess.run(
        [sys.executable, "-m", "tuner.search", *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: no node can hold a trial: resources asks for 1000 CPU and 0 GPU; 127.0.0.2 has 2 CPU"
    )


# No cluster


@pytest.mark.parametrize("address", ["nowhere", "host:", ":1", "host:port"])
def test_what_is_no_address_is_refused(address):
    assert refusal(address, Resources()) == f"--address {address}: expected HOST:PORT"


@pytest.mark.parametrize("flag", [True, False], ids=["--address, nobody listens", "RAY_ADDRESS, who listens is silent"])
def test_where_no_cluster_answers_the_command_ends_in_one_line(tmp_path, monkeypatch, capsys, flag):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if not flag:
            other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", "nowhere" if flag else address)
        with pytest.raises(SystemExit) as left:
            main(["--run", str(tmp_path / "run"), *([f"--address={address}"] if flag else [])])
    assert left.value.code == 2
    assert capsys.readouterr() == ("", f"error: --address {address}: no Ray cluster answers there\n")
    assert not ray.is_initialized()


# Ray itself; last, since its cluster stays open until the end of the module


def test_what_is_used_of_rays_inner_parts_is_still_there(ray_cluster):
    """None of it is Ray's public interface: with another version of Ray, look here first."""
    assert "ENABLE_RAY_CLUSTER = " in inspect.getsource(ray_constants)
    assert "ray_constants.ENABLE_RAY_CLUSTER" in inspect.getsource(ray._private.services), "which reads it when asked"
    assert resolve_ip_for_localhost("10.1.2.3") == "10.1.2.3"
    assert isinstance(resolve_ip_for_localhost("localhost"), str)
    assert get_num_cpus() >= 1
    node = ray._private.worker._global_node
    assert {"raylet", "gcs_server"} <= node.all_processes.keys()
    assert node.dead_processes() == []
    assert get_cluster_status(ray_cluster).stats.autoscaler_version == NO_AUTOSCALER
