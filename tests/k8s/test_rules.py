"""What KubeRay 1.7, Kueue and Kubernetes ask of the manifests that no schema holds, and copies that break each rule."""

from collections.abc import Iterator
from typing import Any

import pytest
from manifests import Manifest, broken, each_overlay, of_kind, pods, rayjob, rendered

USER = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
POWERS = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
HARMLESS = {"runAsGroup", "fsGroup", "fsGroupChangePolicy", "readOnlyRootFilesystem"}
MADE_BY_USERS = {("Secret", "s3-credentials")}
REFERENCES = {
    "configMap": ("ConfigMap", "name"),
    "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
    "secretKeyRef": ("Secret", "name"),
    "secretRef": ("Secret", "name"),
}

# Of the RayJob


def every_end_deletes_the_cluster(documents: list[Manifest]) -> None:
    """By shutdownAfterJobFinishes, or by a rule each for success, failure, and a job that never ran; not by both."""
    spec = rayjob(documents)["spec"]
    if spec.get("shutdownAfterJobFinishes"):
        assert "deletionStrategy" not in spec
        return
    assert "ttlSecondsAfterFinished" not in spec
    rules = spec["deletionStrategy"]["deletionRules"]
    assert {rule["policy"] for rule in rules} == {"DeleteCluster"}
    ends = [{key: value for key, value in rule["condition"].items() if key != "ttlSeconds"} for rule in rules]
    assert ends == [{"jobStatus": "SUCCEEDED"}, {"jobStatus": "FAILED"}, {"jobDeploymentStatus": "Failed"}]


def the_autoscaler_can_do_its_work(documents: list[Manifest]) -> None:
    """It reads CPUs from the limits, and one worker is there from the start."""
    cluster = rayjob(documents)["spec"]["rayClusterSpec"]
    assert cluster.get("autoscalerOptions", {}).get("version") == ("v2" if cluster["enableInTreeAutoscaling"] else None)
    for group in cluster["workerGroupSpecs"]:
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"].isdigit()


def the_head_takes_no_trials(documents: list[Manifest]) -> None:
    assert rayjob(documents)["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def a_token_is_asked_for(documents: list[Manifest]) -> None:
    """Without authOptions, or with empty ones, KubeRay asks for none."""
    assert rayjob(documents)["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def nodes_have_time_to_drain(documents: list[Manifest]) -> None:
    """A minute, and half of one to end in; a `ray stop` before the end would skip it."""
    for name in ("ray-head", "ray-worker"):
        pod = pods(documents)[name]["spec"]
        assert {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "60"} in pod["containers"][0]["env"]
        assert pod["terminationGracePeriodSeconds"] >= 90
        assert "lifecycle" not in pod["containers"][0]


def kueue_admits_it(documents: list[Manifest]) -> None:
    """Kueue starts what names a queue: suspended, of a fixed size, and deleted with the job."""
    job = rayjob(documents)
    queued = "kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {})
    assert job["spec"].get("suspend", False) == queued
    if queued:
        assert job["spec"].get("shutdownAfterJobFinishes")
        assert not job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
        for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
            assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


# Of all pods


def pods_meet_the_restricted_profile(documents: list[Manifest]) -> None:
    """The namespace enforces it, and every pod forgoes more than it forbids."""
    labels = of_kind("Namespace", documents)["vae-tuner"]["metadata"]["labels"]
    assert labels.get("pod-security.kubernetes.io/enforce") == "restricted"
    for template in pods(documents).values():
        pod = template["spec"]
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        for volume in pod.get("volumes", []):
            assert volume.keys() <= {"name", "configMap", "emptyDir", "persistentVolumeClaim"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert not any("hostPort" in port for port in container.get("ports", []))
            context = pod["securityContext"] | container.get("securityContext", {})
            assert context | USER | POWERS == context
            assert context.keys() <= {*USER, *POWERS, *HARMLESS}


def only_the_autoscaler_gets_a_token_of_the_api_server(documents: list[Manifest]) -> None:
    for template in pods(documents).values():
        scales = any(container["name"] == "autoscaler" for container in template["spec"]["containers"])
        assert template["spec"].get("automountServiceAccountToken", True) == scales


def mappings(node: Any) -> Iterator[Manifest]:
    """All mappings in a document, at any depth."""
    if isinstance(node, dict):
        yield node
    if isinstance(node, dict | list):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from mappings(inner)


def references_resolve(documents: list[Manifest]) -> None:
    there = {(one["kind"], one["metadata"]["name"]) for one in documents} | MADE_BY_USERS
    for mapping in mappings(documents):
        for key in mapping.keys() & REFERENCES.keys():
            kind, field = REFERENCES[key]
            assert (kind, mapping[key][field]) in there
    for template in pods(documents).values():
        containers = template["spec"]["containers"]
        mounts = {mount["name"] for container in containers for mount in container.get("volumeMounts", [])}
        assert mounts == {volume["name"] for volume in template["spec"].get("volumes", [])}
    for name, service in of_kind("Service", documents).items():
        assert service["spec"]["selector"] == pods(documents)[name]["metadata"]["labels"]


OF_PODS = [pods_meet_the_restricted_profile, only_the_autoscaler_gets_a_token_of_the_api_server, references_resolve]
BROKEN = [
    (every_end_deletes_the_cluster, "local", "job.shutdownAfterJobFinishes", True),
    (every_end_deletes_the_cluster, "local", "job.ttlSecondsAfterFinished", 60),
    (every_end_deletes_the_cluster, "local", "job.deletionStrategy.deletionRules.0", None),
    (
        every_end_deletes_the_cluster,
        "local",
        "job.deletionStrategy.deletionRules.0.condition.jobDeploymentStatus",
        "Failed",
    ),
    (every_end_deletes_the_cluster, "local", "job.deletionStrategy.deletionRules.0.policy", "DeleteWorkers"),
    (the_autoscaler_can_do_its_work, "local", "cluster.autoscalerOptions.version", None),
    (the_autoscaler_can_do_its_work, "kueue", "cluster.autoscalerOptions", {"version": "v2"}),
    (the_autoscaler_can_do_its_work, "local", "workers.minReplicas", 0),
    (the_autoscaler_can_do_its_work, "local", "worker.containers.0.resources.limits.cpu", "1500m"),
    (the_head_takes_no_trials, "local", "cluster.headGroupSpec.rayStartParams.num-cpus", None),
    (a_token_is_asked_for, "local", "cluster.authOptions.mode", None),
    (nodes_have_time_to_drain, "local", "worker.terminationGracePeriodSeconds", 60),
    (nodes_have_time_to_drain, "local", "worker.containers.0.env.0", None),
    (nodes_have_time_to_drain, "local", "worker.containers.0.lifecycle", {"preStop": {}}),
    (kueue_admits_it, "local", "job.suspend", True),
    (kueue_admits_it, "kueue", "job.suspend", None),
    (kueue_admits_it, "kueue", "job.shutdownAfterJobFinishes", None),
    (kueue_admits_it, "kueue", "cluster.enableInTreeAutoscaling", True),
    (kueue_admits_it, "kueue", "workers.minReplicas", 1),
    (pods_meet_the_restricted_profile, "local", "Namespace/vae-tuner.metadata.labels", {}),
    (pods_meet_the_restricted_profile, "local", "cluster.autoscalerOptions.securityContext", None),
    (pods_meet_the_restricted_profile, "local", "head.volumes.0", {"name": "specs", "hostPath": {"path": "/"}}),
    (pods_meet_the_restricted_profile, "local", "head.containers.0.ports.0.hostPort", 6379),
    (pods_meet_the_restricted_profile, "local", "worker.hostNetwork", True),
    (pods_meet_the_restricted_profile, "local", "worker.securityContext.seccompProfile", None),
    (pods_meet_the_restricted_profile, "local", "worker.containers.0.securityContext.privileged", True),
    (only_the_autoscaler_gets_a_token_of_the_api_server, "local", "worker.automountServiceAccountToken", None),
    (only_the_autoscaler_gets_a_token_of_the_api_server, "local", "cluster.enableInTreeAutoscaling", False),
    (references_resolve, "local", "ConfigMap/specs.metadata.name", "specs-h4sh"),
    (references_resolve, "local", "PersistentVolumeClaim/results.metadata.name", "other"),
    (references_resolve, "local", "worker.containers.0.envFrom", [{"secretRef": {"name": "another"}}]),
    (references_resolve, "local", "head.volumes.2", None),
    (references_resolve, "local", "Service/tensorboard.spec.selector", {"app": "tensorboard"}),
]


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, *_ in BROKEN))
@each_overlay
def test_each_overlay_keeps_each_rule(overlay, rule):
    rule(rendered(overlay))


@pytest.mark.parametrize("rule", OF_PODS)
def test_the_pod_that_fetches_the_data_keeps_the_rules_of_pods(rule):
    rule(rendered("data"))


@pytest.mark.parametrize(("rule", "overlay", "path", "value"), BROKEN)
def test_each_rule_finds_what_breaks_it(rule, overlay, path, value):
    documents = broken(overlay, path, value)
    with pytest.raises(AssertionError):
        rule(documents)


def test_the_head_alone_gets_the_credentials_of_the_bucket():
    given = [name for name, template in pods(rendered("s3")).items() if "s3-credentials" in str(template)]
    assert given == ["ray-head"]
