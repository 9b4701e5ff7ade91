"""Every overlay renders, and the README of k8s/ speaks of what is there."""

import re

from manifests import K8S, OVERLAYS, ROOT, each_folder, of_kind, rendered

README = (K8S / "README.md").read_text()


@each_folder
def test_everything_renders_without_a_warning_into_the_one_namespace(folder):
    documents = rendered(folder)
    assert list(of_kind("Namespace", documents)) == ["vae-tuner"]
    inside = [document for document in documents if document["kind"] != "Namespace"]
    assert {document["metadata"].get("namespace") for document in inside} == {"vae-tuner"}


def test_the_volumes_that_the_data_comes_into_are_those_of_the_overlays():
    storage = [one for one in rendered("data") if one["kind"] in ("Namespace", "PersistentVolumeClaim")]
    assert len(storage) == 3
    assert all(one in rendered("gpu") for one in storage)


def test_the_readme_names_the_overlays_and_paths_and_objects_that_exist():
    assert sorted(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == OVERLAYS
    assert [path for path in re.findall(r"\bk8s/[\w/.-]+\w", README) if not (ROOT / path).exists()] == []
    documents = [*rendered("local"), *rendered("data")]
    there = {f"{document['kind'].lower()}/{document['metadata']['name']}" for document in documents}
    assert set(re.findall(r"\b(?:rayjob|deployment|service|job)/[\w-]+", README)) <= there
