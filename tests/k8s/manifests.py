"""The manifests of k8s/ as kubectl renders them, and copies that are broken on purpose."""

import functools
import json
import re
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
each_folder = pytest.mark.parametrize("folder", [*OVERLAYS, "data"])

PLACES = {
    "job": "RayJob/vae-tuner.spec",
    "cluster": "RayJob/vae-tuner.spec.rayClusterSpec",
    "head": "RayJob/vae-tuner.spec.rayClusterSpec.headGroupSpec.template.spec",
    "workers": "RayJob/vae-tuner.spec.rayClusterSpec.workerGroupSpecs.0",
    "worker": "RayJob/vae-tuner.spec.rayClusterSpec.workerGroupSpecs.0.template.spec",
}

Manifest = dict[str, Any]


@functools.cache
def _kubectl() -> tuple[int, ...]:
    """The client's version; (0,) where there is none."""
    if not shutil.which("kubectl"):
        return (0,)
    told = subprocess.run(["kubectl", "version", "--client", "--output=json"], capture_output=True, text=True)
    version = json.loads(told.stdout)["clientVersion"]
    return int(version["major"]), int(re.sub(r"\D", "", version["minor"]))


@functools.cache
def _rendered(folder: Path) -> list[Manifest]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")  # no warning either
    return list(yaml.safe_load_all(done.stdout))


def rendered(folder: str) -> list[Manifest]:
    """The documents of an overlay, or of `data`; a fresh copy."""
    if _kubectl() < (1, 27):
        pytest.skip("no kubectl 1.27 or newer on this machine")
    return deepcopy(_rendered(K8S / folder if folder == "data" else K8S / "overlays" / folder))


def broken(folder: str, path: str, value: Any = None) -> list[Manifest]:
    """The documents with `value` at a path such as Service/tensorboard.spec.ports.0 or worker.volumes, or without."""
    documents = rendered(folder)
    first, _, rest = path.partition(".")
    target, *keys = f"{PLACES.get(first, first)}.{rest}".split(".")
    node: Any = {f"{document['kind']}/{document['metadata']['name']}": document for document in documents}[target]
    for key in keys[:-1]:
        node = node[int(key)] if isinstance(node, list) else node[key]
    last: Any = int(keys[-1]) if isinstance(node, list) else keys[-1]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return documents


def of_kind(kind: str, documents: list[Manifest]) -> dict[str, Manifest]:
    """The documents of a kind, by name."""
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def rayjob(documents: list[Manifest]) -> Manifest:
    (job,) = of_kind("RayJob", documents).values()
    return job


def pods(documents: list[Manifest]) -> dict[str, Manifest]:
    """The templates of all pods, by the name of their first container; KubeRay adds the autoscaler to the head."""
    found = []
    for document in deepcopy(documents):
        if document["kind"] in ("Deployment", "Job"):
            found.append(document["spec"]["template"])
        if document["kind"] == "RayJob":
            cluster = document["spec"]["rayClusterSpec"]
            head = cluster["headGroupSpec"]["template"]
            if cluster["enableInTreeAutoscaling"]:
                context = cluster["autoscalerOptions"].get("securityContext", {})
                head["spec"]["containers"].append({"name": "autoscaler", "securityContext": context})
            found += [document["spec"]["submitterPodTemplate"], head]
            found += [group["template"] for group in cluster["workerGroupSpecs"]]
    return {template["spec"]["containers"][0]["name"]: template for template in found}
