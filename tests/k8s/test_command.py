"""The commands of the manifests: the main job, the specs that it is given, and the download of its data."""

import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import ROOT, Manifest, broken, each_overlay, of_kind, pods, rayjob, rendered

from tuner.search import parse
from tuner.spec import load

SPECS = {path.name: path.read_text() for path in (ROOT / "search_spaces").glob("*.yaml")}
DATA = ROOT.parent / "shared/data"


def command(job: Manifest) -> list[str]:
    return shlex.split(job["spec"]["entrypoint"])


def search(job: Manifest) -> tuple[Namespace, Any]:
    """The arguments of a job's command and the spec that it names, as the search itself reads them."""
    arguments = parse(command(job)[3:])
    pairs = [text.split("=", 1) for text in arguments.set]
    overrides = [(key, yaml.safe_load(value)) for key, value in pairs]
    return arguments, load(ROOT / "search_spaces" / arguments.spec.name, overrides)


@each_overlay
def test_the_command_is_the_main_job_in_plain_words_and_its_paths_are_mounted(overlay):
    documents = rendered(overlay)
    job = rayjob(documents)
    assert command(job)[:3] == ["python", "-m", "tuner.search"]
    assert re.fullmatch(r"[A-Za-z0-9 ./:=_-]+", job["spec"]["entrypoint"])  # the submitter's shell finds nothing to do
    arguments, spec = search(job)
    mounted = {mount["mountPath"] for mount in pods(documents)["ray-head"]["spec"]["containers"][0]["volumeMounts"]}
    assert mounted == {"/specs", "/data"} | (set() if overlay == "s3" else {"/results"})
    assert str(arguments.spec.parent) == "/specs"
    assert arguments.data_dir == (None if overlay == "local" else Path("/data"))
    assert arguments.run.startswith("s3://" if overlay == "s3" else "/results/")
    assert spec.resources.gpu == (1 if overlay == "gpu" else 0)


def room(job: Manifest) -> int:
    """The trials that all workers together hold, when each is there."""
    resources = search(job)[1].resources
    trials = 0
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        each = int(limits["cpu"]) // resources.cpu
        if resources.gpu:
            each = min(each, limits.get("nvidia.com/gpu", 0) // resources.gpu)
        trials += int(each) * group["maxReplicas"]
    return trials


@each_overlay
def test_the_concurrency_fills_all_workers(overlay):
    """The autoscaler adds what waiting trials ask for, so as many have to be asked for as all workers hold."""
    job = rayjob(rendered(overlay))
    assert search(job)[0].concurrency == room(job)


@pytest.mark.parametrize(
    ("overlay", "path", "value"),
    [("local", "workers.maxReplicas", 3), ("gpu", "worker.containers.0.resources.limits", {"cpu": "2"})],
)
def test_a_concurrency_that_does_not_fit_the_workers_is_found(overlay, path, value):
    job = rayjob(broken(overlay, path, value))
    assert search(job)[0].concurrency != room(job)


@each_overlay
def test_the_config_map_holds_the_specs_of_the_repository(overlay):
    assert of_kind("ConfigMap", rendered(overlay))["specs"]["data"] == SPECS


def fetch(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command of the Job that fetches the data, for another folder than /data, without the internet."""
    (container,) = pods(rendered("data"))["fetch"]["spec"]["containers"]
    assert container["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]
    python, *words = [*container["command"], *container["args"]]
    assert python == "python"
    words = [word.replace("/data", str(folder)) for word in words]
    nowhere = dict.fromkeys(["http_proxy", "https_proxy"], "http://127.0.0.1:9") | {"no_proxy": ""}
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")} | nowhere
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_job_that_fetches_the_data_downloads_mnist_into_the_data_volume_or_fails(tmp_path):
    done = fetch(tmp_path)
    assert done.returncode == 1
    assert "Error downloading train-images-idx3-ubyte.gz" in done.stderr
    assert str(tmp_path / "MNIST") in done.stderr


@pytest.mark.skipif(not (DATA / "MNIST").is_dir(), reason=f"no MNIST in {DATA}")
def test_the_job_that_fetches_the_data_is_done_where_mnist_is_there():
    assert fetch(DATA).returncode == 0
