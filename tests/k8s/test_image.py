"""The image that all pods run, and Ray's version wherever it is written."""

import re
import tomllib

from manifests import K8S, ROOT, each_folder, of_kind, pods, rendered
from packaging.specifiers import SpecifierSet

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
(RAY,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
DOCKERFILE = (K8S / "Dockerfile").read_text()
INSTRUCTIONS = [line.split() for line in DOCKERFILE.replace("\\\n", " ").splitlines() if not line.startswith("#")]


def test_the_image_installs_the_project_at_the_versions_of_the_constraints_and_runs_as_user_1000():
    assert INSTRUCTIONS[0] == ["ARG", f"RAY_IMAGE=rayproject/ray:{RAY}-py311-cpu"]
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.11")
    assert ["FROM", "${RAY_IMAGE}"] in INSTRUCTIONS
    (install,) = (" ".join(words) for name, *words in INSTRUCTIONS if name == "RUN")
    index = "--extra-index-url ${TORCH_INDEX}"
    assert install == f'pip install --no-cache-dir --constraint constraints.txt {index} "ray[default]" .'
    assert INSTRUCTIONS[-1] == ["USER", "1000"]


def test_the_image_copies_what_the_build_needs_and_is_allowed_to_see():
    allowed = [line[1:] for line in (K8S / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"]
    copies = [words for name, *words in INSTRUCTIONS if name == "COPY"]
    assert {owner for owner, *_ in copies} == {"--chown=1000:100"}
    copied = [source for _, *sources, _ in copies for source in sources]
    assert sorted(copied) == sorted(allowed)
    built = {"pyproject.toml", "constraints.txt", "tuner", "search_spaces"}
    assert set(copied) == built | {PROJECT["readme"], *PROJECT["license-files"]}
    assert all((ROOT / source).exists() for source in copied)


@each_folder
def test_one_image_of_the_version_of_ray_serves_all_pods(folder):
    documents = rendered(folder)
    containers = [container for pod in pods(documents).values() for container in pod["spec"]["containers"]]
    images = {container["image"] for container in containers if container["name"] != "autoscaler"}  # it has the head's
    assert images == {f"vae-tuner:ray{RAY}-gpu" if folder == "gpu" else f"vae-tuner:ray{RAY}"}
    for job in of_kind("RayJob", documents).values():
        assert job["spec"]["rayClusterSpec"]["rayVersion"] == RAY


def test_no_text_names_another_version_of_ray():
    for text in (DOCKERFILE, (K8S / "README.md").read_text()):
        assert set(re.findall(r"ray(?::| \| )?(\d+\.\d+\.\d+)", text, re.IGNORECASE)) == {RAY}
