"""The cluster of a search: one of its own or one that runs already, with room for a trial, and alive.

One search on nodes that come and go is in test_nodes.
"""

import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import ray
from processes import AS_NOBODY, in_namespaces, processes_of, wait_for
from ray._private import ray_constants
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray._private.utils import get_num_cpus
from ray.autoscaler.v2.sdk import get_cluster_status

import tuner
from tuner.cluster import NO_AUTOSCALER, address_of, alive, cluster, dead_processes, require_ray, slots, worker_awaited
from tuner.search import main
from tuner.spec import Resources
from tuner.vae.errors import Refused

NOWHERE = "http://127.0.0.1:9"  # the port that throws away what it gets


def refusal(given: str | None, wanted: Resources, concurrency: int | None = None) -> str:
    with pytest.raises(Refused) as refused, cluster(address_of(given), concurrency, wanted):
        pytest.fail("it was opened")
    assert not ray.is_initialized()
    (line,) = str(refused.value).splitlines()
    return line


def under_uv_run(folder: Path) -> subprocess.CompletedProcess[str]:
    """What the file `run` in a folder does, its shell being called as `uv run` is."""
    environment = os.environ | {"PYTHONPATH": str(Path(tuner.__file__).parents[1])}
    return subprocess.run(
        ["uv", "run"],
        executable="/bin/sh",  # which does as its first argument says
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def is_starting(pid: int) -> bool:
    """Whether it is a worker of Ray's that has not come up yet."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(word.endswith(b"default_worker.py") for word in words[:3])


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


@pytest.mark.slow
def test_it_is_one_node_on_loopback_with_a_place_for_each_trial_that_is_to_run_at_once():
    with cluster(None, 3, Resources()):
        (node,) = alive()
        assert node["NodeManagerAddress"] == "127.0.0.1"
        assert slots(node["Resources"], Resources()) == max(3, get_num_cpus())
        assert dead_processes() == []
        require_ray()  # raises nothing
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "printed"),
    [
        # else it would keep its state there
        pytest.param("RAY_REDIS_ADDRESS", "127.0.0.1:9", "opened", marks=pytest.mark.long),
        ("RAY_OVERRIDE_RESOURCES", "nonsense", "Ray can't start: Expecting value: line 1 column 1 (char 0)"),
        ("RAY_TMPDIR", "/proc/nowhere", "Ray can't start: /proc/nowhere: No such file or directory"),
    ],
)
def test_what_rays_environment_asks_for_does_no_harm_or_ends_in_one_line(name, value, printed):
    code = """
from tuner.cluster import cluster
from tuner.exits import CutOff
from tuner.spec import Resources
try:
    with cluster(None, 1, Resources()):
        print("opened")
except CutOff as error:
    print(error)
"""
    environment = os.environ | {name: value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (f"{printed}\n", "")


@pytest.mark.slow
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


@pytest.mark.long
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


@pytest.mark.slow
def test_so_it_is_where_ray_breaks_off_a_call():
    code = """
import os, ray, signal, time
from tuner.cluster import cluster
from tuner.exits import CutOff
from tuner.spec import Resources
try:
    with cluster(None, 1, Resources()):
        ray._private.worker._global_node.all_processes["raylet"][0].process.send_signal(signal.SIGKILL)
        raise BrokenPipeError("Broken pipe")  # as ray.wait does, now and then
except CutOff as error:
    os.write(1, f"\\n{error}\\n".encode())
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "Ray's raylet died" in done.stdout.splitlines(), done.stdout + done.stderr


@pytest.mark.long
def test_it_opens_and_works_where_a_worker_dies_before_it_is_up():
    code = """
import ray
from tuner.cluster import cluster
from tuner.spec import Resources
with cluster(None, 2, Resources()):
    print(ray.get(ray.remote(lambda: 7).remote()))
"""
    mark = uuid.uuid4().hex
    body = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"TUNER_TEST": mark}, stdout=subprocess.PIPE, text=True
    )
    starting = wait_for(lambda: list(filter(is_starting, processes_of(mark))), 60, "no worker was started")
    os.kill(starting[0], signal.SIGKILL)
    assert body.communicate(timeout=120)[0] == "7\n"


@pytest.mark.long
@in_namespaces
def test_it_opens_in_half_a_core_for_a_user_without_name_and_home_and_under_uv_run(tmp_path):
    """As containers have it. Under `uv run`, Ray would start each worker by `uv run` in a copy of the folder."""
    code = """
import os, ray
from tuner.cluster import cluster
from tuner.spec import Resources
with cluster(None, None, Resources()):
    there = int(ray.cluster_resources()["CPU"]), ray.get(ray.remote(lambda: os.getuid()).remote())
    print(os.getuid(), *there)
"""
    half = "mount -t tmpfs none /sys/fs/cgroup && echo 50000 100000 > /sys/fs/cgroup/cpu.max"
    (tmp_path / "body.py").write_text(code)
    (tmp_path / "run").write_text(
        f"unshare -rm sh -c '{half} && {' '.join(AS_NOBODY)} {sys.executable} body.py'\nexit $?\n"
    )
    done = under_uv_run(tmp_path)
    assert done.stdout == "12345 1 12345\n", done.stderr


@pytest.mark.long
def test_where_no_worker_comes_up_that_is_said(capsys):
    with cluster(None, 1, Resources()):
        ray.get(ray.remote(lambda: None).remote())
        with worker_awaited(Resources(), seconds=0.5):
            time.sleep(1)
        assert capsys.readouterr().err == ""
        everything = ray.remote(num_cpus=ray.cluster_resources()["CPU"])
        everything(lambda: time.sleep(60)).remote()
        with worker_awaited(Resources(), seconds=0.5):
            time.sleep(1)
        said = "no worker has come up in 0.5 s; no node may have room: see `ray status`"
        assert capsys.readouterr().err == f"warning: {said}\n"


@pytest.mark.long
def test_so_is_why_where_ray_knows(tmp_path):
    """Ray's own way with `uv run`, on a machine without uv."""
    code = """
import os, ray, time
from tuner.cluster import worker_awaited
from tuner.spec import Resources
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
with worker_awaited(Resources(), seconds=8):
    time.sleep(9)
"""
    (tmp_path / "body.py").write_text(code)
    (tmp_path / "run").write_text(f"{sys.executable} body.py\nexit $?\n")
    done = under_uv_run(tmp_path)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: no worker")]
    assert re.match(r"warning: no worker has come up in 8 s; Ray's last words: .*uv: not found \(/", line), line


# One that runs already


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [{}, {"RAY_ADDRESS": "auto", "http_proxy": NOWHERE, "https_proxy": NOWHERE, "all_proxy": NOWHERE}],
    ids=["--address", "RAY_ADDRESS=auto, past a proxy as Ray does"],
)
def test_it_is_joined_as_it_is_and_goes_on_without_us(other_cluster, more):
    address, environment = other_cluster
    code = f"""
import ray
from tuner.cluster import address_of, alive, cluster, dead_processes
from tuner.spec import Resources
with cluster(address_of({None if "RAY_ADDRESS" in more else address!r}), 8, Resources()):
    (node,) = alive()
    print(node["NodeManagerAddress"], node["Resources"]["CPU"], dead_processes(), ray.is_initialized())
print(ray.is_initialized())
"""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | more, capture_output=True, text=True, timeout=120
        )
        assert done.stdout == "127.0.0.2 2.0 [] True\nFalse\n", done.stderr


# No room


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["--address", "RAY_ADDRESS"])
@pytest.mark.parametrize("address", ["nowhere", "host:", ":1", "host:port", "ray://host:10001", "http://host:8265"])
def test_what_is_no_address_is_refused_by_the_name_of_who_gave_it(monkeypatch, name, address):
    if name == "RAY_ADDRESS":
        monkeypatch.setenv(name, address)
    for given in [address] if name == "--address" else [None, "", "auto"]:  # which Ray takes from there, too
        assert refusal(given, Resources()).startswith(f"{name} {address}: expected HOST:PORT of a cluster's head, auto")


def test_local_is_rays_word_for_a_cluster_of_our_own(monkeypatch):
    assert address_of(None) is address_of("local") is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert address_of(None) is None


@pytest.mark.slow
@pytest.mark.parametrize("flag", [True, False], ids=["--address, nobody listens", "RAY_ADDRESS, who listens is silent"])
def test_where_no_cluster_answers_the_command_ends_in_one_line_before_anything_is_made(
    tmp_path, monkeypatch, capsys, flag
):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if not flag:
            other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", "nowhere" if flag else address)
        with pytest.raises(SystemExit) as left:
            main(["--run", str(tmp_path / "run"), *([f"--address={address}"] if flag else [])])
    assert left.value.code == 2
    name = "--address" if flag else "RAY_ADDRESS"
    assert capsys.readouterr() == ("", f"error: {name} {address}: no Ray cluster answers there\n")
    assert not ray.is_initialized()
    assert not (tmp_path / "run").exists()


@in_namespaces
def test_auto_where_no_cluster_runs_is_refused(tmp_path):
    """Ray looks through all processes of the machine, so here are no others."""
    code = "from tuner.cluster import address_of; address_of(None)"
    command = ["unshare", "-Urpf", "--mount-proc", sys.executable, "-c", code]
    environment = os.environ | {"RAY_ADDRESS": "auto", "RAY_TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tuner.vae.errors.Refused: RAY_ADDRESS auto: Could not find any running Ray instance"), last


# Ray itself; last, since its cluster stays open until the end of the module


def test_what_is_used_of_rays_inner_parts_is_still_there(ray_cluster):
    """None of it is Ray's public interface: with another version of Ray, look here first."""
    assert "ENABLE_RAY_CLUSTER = " in inspect.getsource(ray_constants)
    assert "ray_constants.ENABLE_RAY_CLUSTER" in inspect.getsource(ray._private.services), "which reads it when asked"
    assert "RAY_ENABLE_UV_RUN_RUNTIME_ENV = " in inspect.getsource(ray_constants)
    assert "if ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV" in inspect.getsource(ray._private.worker)
    assert canonicalize_bootstrap_address("10.1.2.3:4") == "10.1.2.3:4"
    assert ray_constants.GLOBAL_GRPC_OPTIONS == (("grpc.enable_http_proxy", 0),)
    assert callable(init_grpc_channel)
    assert get_num_cpus() >= 1
    node = ray._private.worker._global_node
    assert {"raylet", "gcs_server"} <= node.all_processes.keys()
    assert node.dead_processes() == []
    assert get_cluster_status(ray_cluster).stats.autoscaler_version == NO_AUTOSCALER
