"""The manifests in k8s/, without a cluster: they render, fit the schemas, and keep the rules that KubeRay 1.7 checks.

Each rule is a function from a manifest to its complaints. It has to be silent on what is rendered and to speak up on a
copy that was broken on purpose.
"""

import functools
import ipaddress
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from tuner import spec as specs
from tuner.search import parse
from tuner.vae import data

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
SPECS = {path.name: path.read_text() for path in sorted((ROOT / "search_spaces").glob("*.yaml"))}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY = "2.60.0"
KUBERNETES = ["1.32", "1.37"]
MADE_BY_USERS = {("Secret", "s3-credentials")}
MODES = {"local": "ReadWriteOnce"}  # kind gives volumes of one node only

CLUSTER = "spec.rayClusterSpec"
HEAD = f"{CLUSTER}.headGroupSpec.template.spec"
WORKERS = f"{CLUSTER}.workerGroupSpecs.0"
WORKER = f"{WORKERS}.template.spec"
DELETIONS = "spec.deletionStrategy.deletionRules"

Manifest = dict[str, Any]
Breaker = Callable[[Manifest], None]


def _kubectl() -> tuple[int, ...]:
    """The client's version; (0,) where there is none."""
    if not shutil.which("kubectl"):
        return (0,)
    told = subprocess.run(["kubectl", "version", "--client", "--output=json"], capture_output=True, text=True)
    version = json.loads(told.stdout)["clientVersion"]
    return int(version["major"]), int(re.sub(r"\D", "", version["minor"]))


pytestmark = pytest.mark.skipif(_kubectl() < (1, 27), reason="no kubectl 1.27 or newer on this machine")
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@functools.cache
def _rendered(folder: Path) -> list[Manifest]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr  # kustomize's warnings too
    return list(yaml.safe_load_all(done.stdout))


def rendered(name: str) -> list[Manifest]:
    """The documents of an overlay, or of `data`; a fresh copy."""
    return deepcopy(_rendered(K8S / name if name == "data" else K8S / "overlays" / name))


def rayjob(overlay: str) -> Manifest:
    (job,) = (document for document in rendered(overlay) if document["kind"] == "RayJob")
    return job


def templates(document: Manifest) -> Iterator[tuple[str, Manifest]]:
    """The pod templates that are written in a document, by name."""
    if document["kind"] in ("Deployment", "Job"):
        yield document["metadata"]["name"], document["spec"]["template"]
    if document["kind"] == "RayJob":
        cluster = document["spec"]["rayClusterSpec"]
        yield "submitter", document["spec"]["submitterPodTemplate"]
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]


def pods(documents: list[Manifest]) -> dict[str, Manifest]:
    """The pods as the operator makes them: the autoscaler beside the head, and workers that wait for the head."""
    found = {name: deepcopy(template) for document in documents for name, template in templates(document)}
    for document in documents:
        if document["kind"] == "RayJob":
            cluster = document["spec"]["rayClusterSpec"]
            if cluster.get("enableInTreeAutoscaling"):
                options = cluster.get("autoscalerOptions", {})
                context = {"securityContext": options["securityContext"]} if "securityContext" in options else {}
                found["head"]["spec"]["containers"].append({"name": "autoscaler", **context})
            for group in cluster["workerGroupSpecs"]:
                spec = found[group["groupName"]]["spec"]
                spec["initContainers"] = [{**spec["containers"][0], "name": "wait-gcs-ready"}]
    return found


def entrypoint(job: Manifest) -> list[str]:
    return shlex.split(job["spec"]["entrypoint"])


def change(path: str, value: Any) -> Breaker:
    """Something that puts `value` at a dotted path of a manifest; parts that are numbers are indices."""

    def breaker(document: Manifest) -> None:
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        node: Any = document
        for part in parents:
            node = node[part] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = value

    return breaker


def drop(path: str) -> Breaker:
    """Something that removes what is at a dotted path."""
    parent, _, last = path.rpartition(".")

    def breaker(document: Manifest) -> None:
        node: Any = document
        for part in parent.split("."):
            node = node[int(part)] if isinstance(node, list) else node[part]
        del node[int(last) if isinstance(node, list) else last]

    return breaker


# Rendering and schemas


def test_there_are_the_overlays_that_the_readme_names():
    named = re.findall(r"^\| `(\w+)` \|", (K8S / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == OVERLAYS == ["gpu", "kueue", "local", "s3", "spot"]


@pytest.mark.parametrize("name", [*OVERLAYS, "data"])
def test_everything_renders_without_a_warning_into_the_one_namespace(name):
    documents = rendered(name)
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(set(names)) == len(names)
    assert ("Namespace", "vae-tuner") in names
    namespaces = {document["metadata"].get("namespace") for document in documents if document["kind"] != "Namespace"}
    assert namespaces == {"vae-tuner"}


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", [*OVERLAYS, "data"])
def test_every_built_in_object_and_pod_template_is_valid_against_the_schemas_of_kubernetes(name, version):
    for document in rendered(name):
        if document["kind"] != "RayJob":
            kubernetes_validate.validate(document, version, strict=True)
        for template_name, template in templates(document):
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            pod["metadata"] = {"name": template_name, **template["metadata"]}
            kubernetes_validate.validate(pod, version, strict=True)


def test_the_schemas_of_kubernetes_are_strict_enough_to_find_a_misspelt_key():
    _, template = next(templates(rayjob("local")))
    template["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalations"] = False
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES[-1], strict=True)


def mapping(required: str, optional: str = "", **types: Any) -> Manifest:
    """A JSON schema: a mapping with these keys and no others."""
    keys = [*required.split(), *optional.split()]
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": {key: types.get(key, {"type": "string"}) for key in keys},
    }


STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
FLAG = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
POSITIVE = {"type": "integer", "minimum": 1}
TEMPLATE = mapping("metadata spec", metadata={"type": "object"}, spec={"type": "object"})  # Kubernetes' own schemas
CONDITION = mapping(
    "ttlSeconds",
    "jobStatus jobDeploymentStatus",
    ttlSeconds=COUNT,
    jobStatus={"enum": ["SUCCEEDED", "FAILED"]},
    jobDeploymentStatus={"enum": ["Failed"]},
)
RULE = mapping(
    "policy condition",
    policy={"enum": ["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]},
    condition=CONDITION | {"oneOf": [{"required": ["jobStatus"]}, {"required": ["jobDeploymentStatus"]}]},
)
RAY_CLUSTER = mapping(
    "rayVersion authOptions enableInTreeAutoscaling headGroupSpec workerGroupSpecs",
    "autoscalerOptions",
    authOptions=mapping("mode", mode={"const": "token"}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=mapping(
        "version securityContext resources idleTimeoutSeconds imagePullPolicy",
        version={"enum": ["v1", "v2"]},
        securityContext={"type": "object"},
        resources={"type": "object"},
        idleTimeoutSeconds=COUNT,
        imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    ),
    headGroupSpec=mapping("rayStartParams template", rayStartParams=STRINGS, template=TEMPLATE),
    workerGroupSpecs={
        "type": "array",
        "minItems": 1,
        "items": mapping(
            "groupName replicas minReplicas maxReplicas rayStartParams template",
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=POSITIVE,
            rayStartParams=STRINGS,
            template=TEMPLATE,
        ),
    },
)
RAY_JOB = mapping(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=mapping("name namespace", "labels", labels=STRINGS),
    spec=mapping(
        "entrypoint backoffLimit activeDeadlineSeconds submitterConfig submitterPodTemplate rayClusterSpec",
        "deletionStrategy shutdownAfterJobFinishes ttlSecondsAfterFinished suspend",
        backoffLimit=COUNT,
        activeDeadlineSeconds=POSITIVE,
        submitterConfig=mapping("backoffLimit", backoffLimit=COUNT),
        submitterPodTemplate=TEMPLATE,
        rayClusterSpec=RAY_CLUSTER,
        deletionStrategy=mapping("deletionRules", deletionRules={"type": "array", "minItems": 1, "items": RULE}),
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        suspend=FLAG,
    ),
)


@each_overlay
def test_the_rayjob_uses_only_fields_that_kuberay_has(overlay):
    assert [error.message for error in Draft202012Validator(RAY_JOB).iter_errors(rayjob(overlay))] == []


@pytest.mark.parametrize(
    "break_it",
    [
        change("spec.backOffLimit", 3),
        change(f"{CLUSTER}.rayVersion", 2.6),
        change(f"{CLUSTER}.authOptions.mode", "tokens"),
        change(f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus", 0),
        change(f"{WORKERS}.maxReplicas", "4"),
        change(f"{DELETIONS}.0.condition.jobStatus", "Complete"),
        change(f"{DELETIONS}.0.condition.jobDeploymentStatus", "Failed"),
        drop(f"{DELETIONS}.0.condition.jobStatus"),
    ],
)
def test_the_schema_of_the_rayjob_finds_a_wrong_field(break_it):
    job = rayjob("local")
    break_it(job)
    assert list(Draft202012Validator(RAY_JOB).iter_errors(job))


# What KubeRay and Kueue check, or do, beyond their schemas


def complaints(cases: Manifest) -> list[str]:
    """The sentences whose condition holds."""
    return [sentence for sentence, holds in cases.items() if holds]


def _groups(job: Manifest) -> list[Manifest]:
    """The head's group and those of the workers."""
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def _deletions(job: Manifest) -> list[Manifest]:
    return job["spec"].get("deletionStrategy", {}).get("deletionRules", [])


def deletion_rules_exclude_shutdown(job: Manifest) -> list[str]:
    rules, shutdown = _deletions(job), job["spec"].get("shutdownAfterJobFinishes")
    said = [(json.dumps(rule["condition"] | {"ttlSeconds": 0}, sort_keys=True), rule["policy"]) for rule in rules]
    return complaints(
        {
            "deletionRules beside shutdownAfterJobFinishes": rules and shutdown,
            "ttlSecondsAfterFinished without shutdownAfterJobFinishes": job["spec"].get("ttlSecondsAfterFinished")
            and not shutdown,
            "a deletion rule twice": len(set(said)) < len(said),
        }
    )


def every_end_frees_the_cluster(job: Manifest) -> list[str]:
    """Success, failure, and a job that never ran or met its deadline: none may leave nodes behind."""
    if job["spec"].get("shutdownAfterJobFinishes"):
        return []
    freed = [rule["condition"].get("jobStatus") for rule in _deletions(job) if rule["policy"] == "DeleteCluster"]
    return complaints({f"{end} leaves the cluster": end not in freed for end in ("SUCCEEDED", "FAILED", None)})


def deleting_workers_excludes_autoscaling(job: Manifest) -> list[str]:
    deletes = any(rule["policy"] == "DeleteWorkers" for rule in _deletions(job))
    scales = job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
    return complaints({"DeleteWorkers with autoscaling": deletes and scales})


def suspending_needs_shutdown(job: Manifest) -> list[str]:
    suspended, shutdown = job["spec"].get("suspend"), job["spec"].get("shutdownAfterJobFinishes")
    return complaints({"suspend without shutdownAfterJobFinishes": suspended and not shutdown})


def the_second_autoscaler_restarts_no_pod(job: Manifest) -> list[str]:
    """It replaces pods itself, so restartPolicy is Never or left out; and it is switched on in one place only."""
    cluster = job["spec"]["rayClusterSpec"]
    scales, options = cluster["enableInTreeAutoscaling"], cluster.get("autoscalerOptions")
    specs_of_pods = [group["template"]["spec"] for group in _groups(job)]
    variables = {item["name"] for pod in specs_of_pods for item in pod["containers"][0].get("env", [])}
    return complaints(
        {
            "autoscalerOptions without autoscaling": options and not scales,
            "not the second autoscaler": scales and (options or {}).get("version") != "v2",
            "restartPolicy": scales and any(pod.get("restartPolicy", "Never") != "Never" for pod in specs_of_pods),
            "switched by an environment variable": "RAY_enable_autoscaler_v2" in variables,
        }
    )


def resources_are_said_once(job: Manifest) -> list[str]:
    counted = {"num-cpus", "num-gpus", "memory", "resources"}
    return complaints(
        {
            f"{group.get('groupName', 'head')}: resources beside rayStartParams": group.get("resources")
            and counted & group["rayStartParams"].keys()
            for group in _groups(job)
        }
    )


def names_leave_room_for_suffixes(job: Manifest) -> list[str]:
    name = job["metadata"]["name"]
    good = re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", name)
    return complaints({f"{name}: not a DNS label of at most 47 characters": not good})


def the_token_is_asked_for(job: Manifest) -> list[str]:
    """Empty authOptions mean no authentication; a token needs Ray 2.52 or newer, said in rayVersion."""
    cluster = job["spec"]["rayClusterSpec"]
    version = tuple(int(part) for part in cluster.get("rayVersion", "0").split("."))
    return complaints(
        {
            "no authOptions.mode: token": cluster.get("authOptions", {}).get("mode") != "token",
            "rayVersion is too old for a token": version < (2, 52),
        }
    )


def the_head_takes_no_trials(job: Manifest) -> list[str]:
    return complaints({"the head has CPUs for trials": _groups(job)[0]["rayStartParams"].get("num-cpus") != "0"})


def the_operator_injects_the_rest(job: Manifest) -> list[str]:
    """Probes, commands and the wait for the head are the operator's; `ray stop` before the end would skip the drain."""
    theirs = {"livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "command", "args"}
    return complaints(
        {
            f"{name}: {key}": key in template["spec"] or key in template["spec"]["containers"][0]
            for name, template in templates(job)
            for key in (*sorted(theirs), "initContainers")
        }
    )


def nodes_have_time_to_drain(job: Manifest) -> list[str]:
    cases = {}
    for group in _groups(job):
        name, pod = group.get("groupName", "head"), group["template"]["spec"]
        variables = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
        seconds = float(variables.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
        cases[f"{name} drains for less than a minute"] = seconds < 60
        cases[f"{name} is killed before it has drained"] = pod.get("terminationGracePeriodSeconds", 30) < seconds + 30
    return complaints(cases)


def the_autoscaler_knows_each_size(job: Manifest) -> list[str]:
    """It reads CPUs from the limits, and scales between bounds of which the lower holds a trial from the start."""
    cases = {}
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        cases["no whole CPUs"] = not str(limits.get("cpu")).isdigit()
        cases["bounds"] = not 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    return complaints(cases)


def concurrency_fills_all_workers(job: Manifest) -> list[str]:
    """The autoscaler adds what waiting trials ask for, so as many have to be asked for as all workers hold."""
    arguments = parse(entrypoint(job)[3:])
    wanted = specs.load(_spec_path(job), [specs.parse_override(text) for text in arguments.set]).resources
    room = 0
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        trials = int(limits["cpu"]) // wanted.cpu
        if wanted.gpu:
            trials = min(trials, int(limits.get("nvidia.com/gpu", 0)) // wanted.gpu)
        room += group["maxReplicas"] * trials
    return complaints({f"--concurrency {arguments.concurrency}, room for {room:g}": arguments.concurrency != room})


def kueue_admits_it(job: Manifest) -> list[str]:
    """What Kueue's webhook asks of a RayJob that names a queue."""
    if "kueue.x-k8s.io/queue-name" not in job["metadata"].get("labels", {}):
        return []
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    sizes = [{group["replicas"], group["minReplicas"], group["maxReplicas"]} for group in groups]
    return complaints(
        {
            "not suspended": job["spec"].get("suspend") is not True,
            "no shutdownAfterJobFinishes": job["spec"].get("shutdownAfterJobFinishes") is not True,
            "autoscaling": job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"],
            "not a fixed size": any(len(size) > 1 for size in sizes),
            "too many groups": len(groups) > 7,
            "a group named head": "head" in [group["groupName"] for group in groups],
        }
    )


RAY_STOP = {"preStop": {"exec": {"command": ["ray", "stop"]}}}
SWITCH = {"name": "RAY_enable_autoscaler_v2", "value": "1"}
TWICE = {"jobStatus": "SUCCEEDED", "ttlSeconds": 9}
CASES: list[tuple[Callable[[Manifest], list[str]], str, Breaker]] = [
    (deletion_rules_exclude_shutdown, "local", change("spec.shutdownAfterJobFinishes", True)),
    (deletion_rules_exclude_shutdown, "local", change("spec.ttlSecondsAfterFinished", 60)),
    (deletion_rules_exclude_shutdown, "local", change(f"{DELETIONS}.1.condition", TWICE)),
    (every_end_frees_the_cluster, "local", drop(f"{DELETIONS}.0")),
    (every_end_frees_the_cluster, "local", drop(f"{DELETIONS}.2")),
    (every_end_frees_the_cluster, "kueue", change("spec.shutdownAfterJobFinishes", False)),
    (deleting_workers_excludes_autoscaling, "local", change(f"{DELETIONS}.0.policy", "DeleteWorkers")),
    (suspending_needs_shutdown, "local", change("spec.suspend", True)),
    (the_second_autoscaler_restarts_no_pod, "local", change(f"{WORKER}.restartPolicy", "Always")),
    (the_second_autoscaler_restarts_no_pod, "local", change(f"{HEAD}.restartPolicy", "OnFailure")),
    (the_second_autoscaler_restarts_no_pod, "local", drop(f"{CLUSTER}.autoscalerOptions.version")),
    (the_second_autoscaler_restarts_no_pod, "local", change(f"{HEAD}.containers.0.env.1", SWITCH)),
    (the_second_autoscaler_restarts_no_pod, "kueue", change(f"{CLUSTER}.autoscalerOptions", {"version": "v2"})),
    (resources_are_said_once, "local", change(f"{CLUSTER}.headGroupSpec.resources", {"CPU": "0"})),
    (names_leave_room_for_suffixes, "local", change("metadata.name", "v" * 48)),
    (names_leave_room_for_suffixes, "local", change("metadata.name", "2-vae")),
    (the_token_is_asked_for, "local", drop(f"{CLUSTER}.authOptions.mode")),
    (the_token_is_asked_for, "local", change(f"{CLUSTER}.rayVersion", "2.51.0")),
    (the_token_is_asked_for, "local", drop(f"{CLUSTER}.rayVersion")),
    (the_head_takes_no_trials, "local", drop(f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus")),
    (the_operator_injects_the_rest, "local", change(f"{WORKER}.containers.0.lifecycle", RAY_STOP)),
    (the_operator_injects_the_rest, "local", change(f"{WORKER}.initContainers", [{"name": "wait"}])),
    (nodes_have_time_to_drain, "local", change(f"{WORKER}.terminationGracePeriodSeconds", 60)),
    (nodes_have_time_to_drain, "local", change(f"{WORKER}.containers.0.env", [])),
    (the_autoscaler_knows_each_size, "local", change(f"{WORKERS}.minReplicas", 0)),
    (the_autoscaler_knows_each_size, "local", drop(f"{WORKER}.containers.0.resources.limits.cpu")),
    (concurrency_fills_all_workers, "local", change(f"{WORKERS}.maxReplicas", 3)),
    (concurrency_fills_all_workers, "gpu", change(f"{WORKER}.containers.0.resources.limits", {"cpu": "2"})),
    (kueue_admits_it, "kueue", change("spec.suspend", False)),
    (kueue_admits_it, "kueue", drop("spec.shutdownAfterJobFinishes")),
    (kueue_admits_it, "kueue", change(f"{CLUSTER}.enableInTreeAutoscaling", True)),
    (kueue_admits_it, "kueue", change(f"{WORKERS}.minReplicas", 1)),
    (kueue_admits_it, "kueue", change(f"{WORKERS}.groupName", "head")),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in CASES))


def _named(rules: list[Callable[..., Any]]) -> list[str]:
    return [rule.__name__ for rule in rules]


@pytest.mark.parametrize("rule", RULES, ids=_named(RULES))
@each_overlay
def test_each_overlay_keeps_each_rule_of_the_operator(overlay, rule):
    assert rule(rayjob(overlay)) == []


@pytest.mark.parametrize(("rule", "overlay", "break_it"), CASES, ids=_named([rule for rule, _, _ in CASES]))
def test_each_rule_of_the_operator_speaks_up_on_a_job_that_breaks_it(rule, overlay, break_it):
    job = rayjob(overlay)
    break_it(job)
    assert rule(job)


# The restricted pod security profile


VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def breaches(pod: Manifest) -> list[str]:
    """What the `restricted` profile would say of a pod's spec."""
    whole = pod.get("securityContext", {})
    cases = {key: pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")} | {"sysctls": whole.get("sysctls")}
    cases |= {f"volume {volume['name']}": volume.keys() - {"name"} - VOLUMES for volume in pod.get("volumes", [])}
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        own = container.get("securityContext", {})
        both, name = whole | own, container["name"]
        dropped, added = own.get("capabilities", {}).get("drop"), own.get("capabilities", {}).get("add", [])
        cases |= {
            f"{name}: privileged": own.get("privileged"),
            f"{name}: allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
            f"{name}: capabilities": dropped != ["ALL"] or set(added) - {"NET_BIND_SERVICE"},
            f"{name}: runAsNonRoot": both.get("runAsNonRoot") is not True,
            f"{name}: runAsUser": both.get("runAsUser") == 0,
            f"{name}: seccomp": both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"),
            f"{name}: procMount": own.get("procMount", "Default") != "Default",
            f"{name}: hostPort": any(port.get("hostPort") for port in container.get("ports", [])),
        }
    return complaints(cases)


@pytest.mark.parametrize("name", [*OVERLAYS, "data"])
def test_the_namespace_enforces_the_restricted_profile_and_every_pod_meets_it_as_user_1000(name):
    documents = rendered(name)
    (namespace,) = (document for document in documents if document["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    found = pods(documents)
    assert {pod: breaches(template["spec"]) for pod, template in found.items()} == {pod: [] for pod in found}
    assert {template["spec"]["securityContext"]["runAsUser"] for template in found.values()} == {1000}


@pytest.mark.parametrize(
    ("pod", "break_it"),
    [
        ("head", drop(f"{CLUSTER}.autoscalerOptions.securityContext")),
        ("head", change(f"{CLUSTER}.autoscalerOptions.securityContext.capabilities.add", ["SYS_PTRACE"])),
        ("head", change(f"{HEAD}.volumes.0.hostPath", {"path": "/"})),
        ("head", change(f"{HEAD}.containers.0.ports.0.hostPort", 6379)),
        ("workers", drop(f"{WORKER}.containers.0.securityContext.allowPrivilegeEscalation")),
        ("workers", drop(f"{WORKER}.securityContext.seccompProfile")),
        ("workers", drop(f"{WORKER}.securityContext.runAsNonRoot")),
        ("workers", change(f"{WORKER}.hostNetwork", True)),
        ("submitter", change("spec.submitterPodTemplate.spec.securityContext.runAsUser", 0)),
        ("submitter", change("spec.submitterPodTemplate.spec.containers.0.securityContext.privileged", True)),
    ],
)
def test_the_restricted_profile_speaks_up_on_a_pod_that_breaks_it(pod, break_it):
    job = rayjob("local")
    break_it(job)
    assert {name for name, template in pods([job]).items() if breaches(template["spec"])} == {pod}


@each_overlay
def test_only_a_head_with_an_autoscaler_gets_a_token_of_the_api_server(overlay):
    holders = {
        name
        for name, template in pods(rendered(overlay)).items()
        if template["spec"].get("automountServiceAccountToken") is not False
    }
    assert holders == ({"head"} if rayjob(overlay)["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] else set())


# References


SOURCES = {
    "configMap": ("ConfigMap", "name"),
    "configMapRef": ("ConfigMap", "name"),
    "configMapKeyRef": ("ConfigMap", "name"),
    "secret": ("Secret", "secretName"),
    "secretRef": ("Secret", "name"),
    "secretKeyRef": ("Secret", "name"),
    "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
}


def dangling(documents: list[Manifest]) -> list[str]:
    """References to what is neither rendered nor made by the user, and volumes that are mounted or defined alone."""
    there = {(document["kind"], document["metadata"]["name"]) for document in documents} | MADE_BY_USERS
    wanted: set[tuple[str, str]] = set()
    cases: Manifest = {}
    made = pods(documents)
    for name, template in made.items():
        pod = template["spec"]
        containers = [*pod["containers"], *pod.get("initContainers", [])]
        volumes = pod.get("volumes", [])
        mounted = {mount["name"] for container in containers for mount in container.get("volumeMounts", [])}
        cases |= {f"{name}: volume {one}": True for one in mounted ^ {volume["name"] for volume in volumes}}
        variables = [item.get("valueFrom", {}) for container in containers for item in container.get("env", [])]
        whole = [source for container in containers for source in container.get("envFrom", [])]
        for source in [*volumes, *variables, *whole]:
            wanted |= {(kind, source[key][field]) for key, (kind, field) in SOURCES.items() if key in source}
        if "serviceAccountName" in pod:
            wanted.add(("ServiceAccount", pod["serviceAccountName"]))
    for document in documents:
        if document["kind"] == "Service":
            selector = document["spec"]["selector"].items()
            chosen = [template for template in made.values() if selector <= template["metadata"]["labels"].items()]
            open_ports = {port["name"] for template in chosen for port in template["spec"]["containers"][0]["ports"]}
            served = {port["targetPort"] for port in document["spec"]["ports"]}
            cases[f"Service {document['metadata']['name']}"] = len(chosen) != 1 or not served <= open_ports
        if document["kind"] == "Deployment":
            labels = document["spec"]["template"]["metadata"]["labels"].items()
            cases["Deployment"] = not document["spec"]["selector"]["matchLabels"].items() <= labels
    return complaints(cases) + [f"{kind} {name}" for kind, name in sorted(wanted - there)]


@pytest.mark.parametrize("name", [*OVERLAYS, "data"])
def test_every_reference_resolves(name):
    assert dangling(rendered(name)) == []


@pytest.mark.parametrize(
    ("kind", "break_it", "complaint"),
    [
        ("ConfigMap", change("metadata.name", "specs-h4sh"), "ConfigMap specs"),
        ("PersistentVolumeClaim", change("metadata.name", "other"), "PersistentVolumeClaim"),
        ("RayJob", change(f"{WORKER}.serviceAccountName", "worker"), "ServiceAccount worker"),
        (
            "RayJob",
            change(f"{WORKER}.containers.0.env.0.valueFrom", {"secretKeyRef": {"name": "a"}}),
            "Secret a",
        ),
        ("RayJob", drop(f"{HEAD}.volumes.2"), "head: volume results"),
        ("Service", change("spec.selector", {"app": "tensorboard"}), "Service tensorboard"),
        ("Service", change("spec.ports.0.targetPort", "web"), "Service tensorboard"),
        ("Deployment", change("spec.selector.matchLabels", {"app": "tensorboard"}), "Deployment"),
    ],
)
def test_a_reference_that_leads_nowhere_is_found(kind, break_it, complaint):
    documents = rendered("local")
    break_it(next(document for document in documents if document["kind"] == kind))
    assert any(found.startswith(complaint) for found in dangling(documents))


@each_overlay
def test_volumes_are_shared_and_tensorboard_only_reads(overlay):
    documents = rendered(overlay)
    claims = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    assert claims.keys() == ({"data"} if overlay == "s3" else {"data", "results"})
    assert {mode for claim in claims.values() for mode in claim["accessModes"]} == {MODES.get(overlay, "ReadWriteMany")}
    found = pods(documents)
    writers = {
        name
        for name, template in found.items()
        for container in template["spec"]["containers"]
        for mount in container.get("volumeMounts", [])
        if mount["name"] in claims and not mount.get("readOnly")
    }
    assert writers == (set() if overlay == "s3" else {"head"})
    assert ("tensorboard" in found) == (overlay != "s3")


# The network


def _selects(selector: Manifest, labels: Manifest) -> bool:
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    return all(
        labels.get(item["key"]) in item["values"]
        for item in selector.get("matchExpressions", [])
        if item["operator"] == "In"
    )


def _is(peer: Manifest, party: Manifest | str) -> bool:
    if isinstance(party, str):
        return "ipBlock" in peer and ipaddress.ip_address(party) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
    spaces = peer.get("namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": "vae-tuner"}})
    here = {"kubernetes.io/metadata.name": party["namespace"]}
    return "ipBlock" not in peer and _selects(spaces, here) and _selects(peer.get("podSelector", {}), party)


def _lets(rule: Manifest, peers: str, party: Manifest | str, port: int) -> bool:
    if "ports" in rule and {"protocol": "TCP", "port": port} not in rule["ports"]:
        return False
    return peers not in rule or any(_is(peer, party) for peer in rule[peers])


def may_connect(policies: list[Manifest], source: Manifest | str, target: Manifest | str, port: int) -> bool:
    """Whether network policies let TCP through; a party is its labels with `namespace` among them, or an address."""
    for party, other, kind, peers in ((source, target, "Egress", "to"), (target, source, "Ingress", "from")):
        if isinstance(party, str) or party["namespace"] != "vae-tuner":
            continue
        ruling = [
            policy["spec"]
            for policy in policies
            if kind in policy["spec"]["policyTypes"] and _selects(policy["spec"]["podSelector"], party)
        ]
        if ruling and not any(_lets(rule, peers, other, port) for one in ruling for rule in one.get(kind.lower(), [])):
            return False
    return True


def _policies(documents: list[Manifest]) -> list[Manifest]:
    return [document for document in documents if document["kind"] == "NetworkPolicy"]


def _parties(documents: list[Manifest]) -> dict[str, Manifest | str]:
    ours = {name: {"namespace": "vae-tuner", **pod["metadata"]["labels"]} for name, pod in pods(documents).items()}
    return {
        **ours,
        "operator": {"namespace": "kuberay-system", "app.kubernetes.io/name": "kuberay-operator"},
        "another pod": {"namespace": "default", "app.kubernetes.io/name": "kuberay-operator"},
        "DNS": {"namespace": "kube-system", "k8s-app": "kube-dns"},
        "API server": "172.18.0.2",
        "internet": "93.184.215.14",
    }


@each_overlay
def test_all_traffic_is_denied_unless_a_policy_allows_it(overlay):
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in _policies(rendered(overlay))}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@each_overlay
def test_every_policy_selects_pods_that_are_there(overlay):
    documents = rendered(overlay)
    labels = [template["metadata"]["labels"] for template in pods(documents).values()]
    for policy in _policies(documents):
        peers = [
            peer["podSelector"]
            for rule in [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]
            for peer in [*rule.get("from", []), *rule.get("to", [])]
            if "podSelector" in peer and "namespaceSelector" not in peer
        ]
        for selector in [policy["spec"]["podSelector"], *peers]:
            assert any(_selects(selector, pod) for pod in labels), (policy["metadata"]["name"], selector)


@each_overlay
@pytest.mark.parametrize(
    ("source", "target", "port", "allowed"),
    [
        ("workers", "head", 6379, True),
        ("head", "workers", 40000, True),
        ("workers", "workers", 40000, True),
        ("submitter", "head", 8265, True),
        ("submitter", "head", 6379, False),
        ("submitter", "workers", 8265, False),
        ("operator", "head", 8265, True),
        ("operator", "head", 6379, False),
        ("operator", "workers", 8265, False),
        ("another pod", "head", 8265, False),
        ("another pod", "workers", 40000, False),
        ("head", "API server", 6443, True),
        ("head", "API server", 22, False),
        ("workers", "API server", 6443, False),
        ("submitter", "API server", 6443, False),
        ("workers", "internet", 443, False),
        ("submitter", "internet", 443, False),
        ("head", "DNS", 53, True),
        ("workers", "DNS", 53, True),
        ("submitter", "DNS", 53, True),
        ("head", "another pod", 80, False),
    ],
)
def test_who_may_speak_to_whom(overlay, source, target, port, allowed):
    documents = rendered(overlay)
    parties = _parties(documents)
    assert may_connect(_policies(documents), parties[source], parties[target], port) == allowed


@each_overlay
def test_only_a_head_that_writes_to_a_bucket_reaches_the_internet(overlay):
    documents = rendered(overlay)
    parties, policies = _parties(documents), _policies(documents)
    reaching = {name for name in pods(documents) if may_connect(policies, parties[name], parties["internet"], 443)}
    assert reaching == ({"head"} if overlay == "s3" else set())


def test_nobody_reaches_tensorboard_but_by_port_forward():
    documents = rendered("local")
    parties = _parties(documents)
    ends = parties.keys() - {"tensorboard"}
    policies = _policies(documents)
    assert not any(may_connect(policies, parties[end], parties["tensorboard"], 6006) for end in ends)
    assert not any(may_connect(policies, parties["tensorboard"], parties[end], 8265) for end in ends)


def test_without_its_policies_everything_would_be_open():
    """The model of the network speaks up: without the denial, and with an allowance too many."""
    documents = rendered("local")
    parties, policies = _parties(documents), _policies(documents)
    ours = [policy for policy in policies if policy["metadata"]["name"] not in ("default-deny", "dns")]
    assert may_connect(ours, parties["another pod"], parties["tensorboard"], 6006)
    next(one for one in policies if one["metadata"]["name"] == "default-deny")["spec"]["ingress"] = [{}]
    assert may_connect(policies, parties["another pod"], parties["head"], 6379)


def test_the_download_of_the_data_reaches_the_internet_and_nothing_reaches_it():
    policies = [*_policies(rendered("data")), *_policies(rendered("gpu"))]
    parties = _parties([*rendered("data"), rayjob("gpu")])
    assert may_connect(policies, parties["fetch-mnist"], parties["internet"], 443)
    assert not may_connect(policies, parties["workers"], parties["fetch-mnist"], 443)


# The command, its spec, and its data


def _spec_path(job: Manifest) -> Path:
    return ROOT / "search_spaces" / Path(entrypoint(job)[3]).name


@each_overlay
def test_the_command_is_the_main_job_in_plain_words_and_its_paths_are_mounted(overlay):
    job = rayjob(overlay)
    words = entrypoint(job)
    assert re.fullmatch(r"[A-Za-z0-9 ./:=_-]+", job["spec"]["entrypoint"])  # the submitter's shell finds nothing to do
    assert words[:3] == ["python", "-m", "tuner.search"]
    arguments = parse(words[3:])
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    mounts = {mount["mountPath"]: mount for mount in head["volumeMounts"]}
    assert str(arguments.spec.parent) == "/specs"
    assert arguments.data_dir in (None, Path("/data"))
    assert (arguments.data_dir is None) == (arguments.spec.name == "digits.yaml")
    run = words[words.index("--run") + 1]
    if overlay == "s3":
        assert run.startswith("s3://")
        assert "/results" not in mounts
    else:
        assert str(Path(run).parent) == "/results"
        assert not mounts["/results"].get("readOnly")


@each_overlay
def test_the_command_searches_a_spec_that_loads(overlay):
    job = rayjob(overlay)
    arguments = parse(entrypoint(job)[3:])
    loaded = specs.load(_spec_path(job), [specs.parse_override(text) for text in arguments.set])
    assert loaded.resources.gpu == (1 if overlay == "gpu" else 0)


@each_overlay
def test_the_config_map_holds_the_specs_of_the_repository(overlay):
    (found,) = (document for document in rendered(overlay) if document["kind"] == "ConfigMap")
    assert found["metadata"]["name"] == "specs"  # no hash: kustomize would not rewrite it inside the RayJob
    assert found["data"] == SPECS


@pytest.mark.parametrize("name", SPECS)
def test_each_spec_in_the_config_map_loads(name, tmp_path):
    (tmp_path / name).write_text(SPECS[name])
    assert specs.load(tmp_path / name).budget.trials > 0


def test_the_head_gets_the_four_variables_of_the_bucket_and_nobody_else_does():
    asked = {
        name: {item["name"] for item in template["spec"]["containers"][0].get("env", []) if "valueFrom" in item}
        for name, template in pods(rendered("s3")).items()
    }
    wanted = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"}
    assert asked == {"head": wanted, "workers": set(), "submitter": set()}


def test_the_job_that_fetches_the_data_loads_mnist_into_the_data_volume(monkeypatch):
    (job,) = (document for document in rendered("data") if document["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    asked = []
    monkeypatch.setattr(data, "load", lambda *arguments: asked.append(arguments))
    assert container["command"] == ["python", "-c"]
    exec(container["args"][0], {})
    assert asked == [("mnist", Path("/data"))]
    assert container["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]


def test_the_volumes_that_the_data_comes_into_are_those_of_the_overlays():
    storage = [document for document in rendered("data") if document["kind"] in ("Namespace", "PersistentVolumeClaim")]
    assert len(storage) == 3
    assert [document for document in storage if document not in rendered("gpu")] == []


# The image and the versions


def instructions(dockerfile: str) -> list[tuple[str, list[str]]]:
    """A Dockerfile's instructions and their words, continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], shlex.split(line)[1:]) for line in joined.splitlines()]


DOCKERFILE = (K8S / "Dockerfile").read_text()


def test_the_image_is_built_of_plain_instructions_and_runs_as_user_1000():
    found = instructions(DOCKERFILE)
    names = [name for name, _ in found]
    assert set(names) == {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER"}
    assert names.index("FROM") == 1
    assert found[0] == ("ARG", [f"RAY_IMAGE=rayproject/ray:{RAY}-py311-cpu"])
    assert found[1] == ("FROM", ["${RAY_IMAGE}"])
    assert found[-1] == ("USER", ["1000"])


def test_the_image_copies_what_is_there_and_what_the_build_is_allowed_to_see():
    allowed = [line[1:] for line in (K8S / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = []
    for name, words in instructions(DOCKERFILE):
        if name == "COPY":
            options, (*sources, _) = words[:1], words[1:]
            assert options == ["--chown=1000:100"]
            copied += sources
    assert sorted(copied) == sorted(allowed)
    assert [source for source in copied if not (ROOT / source).exists()] == []
    needed = {"pyproject.toml", "constraints.txt", "tuner", PROJECT["readme"], *PROJECT["license-files"]}
    assert set(copied) == needed


def test_the_image_installs_the_project_at_the_versions_of_the_constraints():
    (command,) = (words for name, words in instructions(DOCKERFILE) if name == "RUN")
    assert not set("".join(command)) & set(";|&<>`()*?")  # nothing for the shell to do
    assert command[:2] == ["pip", "install"]
    options = dict(zip(command[3:7:2], command[4:7:2], strict=True))
    assert command[2] == "--no-cache-dir"
    assert options == {"--constraint": "constraints.txt", "--extra-index-url": "${TORCH_INDEX}"}
    assert command[7:] == ["ray[default]", ".[export]"]
    assert "export" in PROJECT["optional-dependencies"]


def versions() -> dict[str, set[str]]:
    """Ray's version wherever it is written."""
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    number = r"(\d+\.\d+\.\d+)"
    found = {
        "pyproject.toml": {text.split("==")[1] for text in PROJECT["dependencies"] if text.startswith("ray[")},
        "constraints.txt": {constraints["ray"]},
        "Dockerfile": set(re.findall(rf"ray:?{number}", DOCKERFILE)),
        "README.md": set(re.findall(rf"ray{number}|\| Ray \| {number}", (K8S / "README.md").read_text())),
    }
    found["README.md"] = {number for pair in found["README.md"] for number in pair if number}
    for name in [*OVERLAYS, "data"]:
        images = [
            container["image"]
            for document in rendered(name)
            for _, template in templates(document)
            for container in template["spec"]["containers"]
        ]
        found[f"{name}'s images"] = {re.sub(r"^vae-tuner:ray|-gpu$", "", image) for image in images}
    return found | {f"{name}'s rayVersion": {rayjob(name)["spec"]["rayClusterSpec"]["rayVersion"]} for name in OVERLAYS}


def test_the_version_of_ray_agrees_everywhere():
    found = versions()
    assert found == {place: {RAY} for place in found}


@each_overlay
def test_one_image_serves_all_pods_of_an_overlay(overlay):
    images = {
        container["image"]
        for document in rendered(overlay)
        for _, template in templates(document)
        for container in template["spec"]["containers"]
    }
    assert images == {f"vae-tuner:ray{RAY}-gpu" if overlay == "gpu" else f"vae-tuner:ray{RAY}"}


def test_the_readme_names_paths_and_objects_that_exist():
    text = (K8S / "README.md").read_text()
    assert [path for path in re.findall(r"\bk8s/[\w/.-]+\w", text) if not (ROOT / path).exists()] == []
    there = {
        f"{document['kind'].lower()}/{document['metadata']['name']}"
        for name in ("local", "data")
        for document in rendered(name)
    }
    assert set(re.findall(r"\b(?:rayjob|deployment|service|job)/[\w-]+", text)) <= there
    assert (re.findall(r"--version (\S+)", text), re.findall(r"--namespace (\S+)", text)) == (
        ["1.7.1"],
        ["kuberay-system"],
    )
    assert len(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[0].splitlines()) == 5
