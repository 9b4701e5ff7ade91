"""Everything fits the schemas of Kubernetes, and the RayJobs fit KubeRay's own; fields that these lack are refused."""

import functools

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft4Validator
from manifests import ROOT, Manifest, broken, each_folder, each_overlay, pods, rayjob, rendered

OLDEST, NEWEST = "1.32", "1.37"  # of Kubernetes, as k8s/README.md says
CRD = ROOT.parent / "shared/kuberay/ray.io_rayjobs-1.7.0.yaml"

with_crd = pytest.mark.skipif(not CRD.exists(), reason=f"no {CRD}")


def check_by_kubernetes(documents: list[Manifest], version: str) -> None:
    """Raises ValidationError on an object of Kubernetes' own, or a pod of any object, that does not fit."""
    for document in documents:
        if document["kind"] != "RayJob":
            kubernetes_validate.validate(document, version, strict=True)
    for name, template in pods(documents).items():
        pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": name, **template["metadata"]}}
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@each_folder
def test_every_built_in_object_and_every_pod_fits_the_schemas_of_kubernetes(folder, version):
    check_by_kubernetes(rendered(folder), version)


@pytest.mark.parametrize("path", ["NetworkPolicy/head.spec.egresses", "worker.containers.0.securityContext.privilege"])
def test_the_schemas_of_kubernetes_find_a_misspelt_field(path):
    documents = broken("local", path, [])
    with pytest.raises(kubernetes_validate.ValidationError):
        check_by_kubernetes(documents, NEWEST)


def strict(schema: Manifest) -> Manifest:
    """The schema of a CRD as JSON schema: at all depths, unknown fields are refused and nullable ones may be null.

    x-kubernetes-int-or-string needs nothing more: a CRD says the same in an anyOf beside it.
    """
    made = dict(schema)
    if "properties" in schema:
        made["properties"] = {name: strict(field) for name, field in schema["properties"].items()}
        open_ended = {"x-kubernetes-preserve-unknown-fields", "x-kubernetes-embedded-resource"}
        made["additionalProperties"] = bool(schema.keys() & open_ended)
    for key in schema.keys() & {"items", "additionalProperties"}:
        made[key] = strict(schema[key])
    return {"anyOf": [made, {"type": "null"}]} if schema.get("nullable") else made


@functools.cache
def kuberay() -> Draft4Validator:
    versions = yaml.load(CRD.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    return Draft4Validator(strict(schema))


def faults(job: Manifest) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in kuberay().iter_errors(job)]


@with_crd
@each_overlay
def test_the_rayjob_fits_the_schema_of_kuberay(overlay):
    job = rayjob(rendered(overlay))
    assert job["apiVersion"] == "ray.io/v1"
    assert faults(job) == []


@with_crd
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("job.backOffLimit", 3),
        ("job.deletionStrategy.deletionRules.0.condition.jobStatus", "Complete"),
        ("cluster.rayVersion", 2.6),
        ("cluster.autoscalerOptions.idleTimeout", 60),
        ("cluster.headGroupSpec.rayStartParams.num-cpus", 0),
        ("workers.maxReplicas", None),
        ("worker.containers.0.securityContext.privilege", False),
        ("worker.containers.0.resources.limits.cpu", [2]),
    ],
)
def test_the_schema_of_kuberay_finds_what_is_misspelt_mistyped_or_missing(path, value):
    (fault,) = faults(rayjob(broken("local", path, value)))
    assert path.split(".")[-1] in fault
