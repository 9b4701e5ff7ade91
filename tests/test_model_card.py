"""The export is a model of the Hugging Face Hub: its own library reads card, configuration and weights, offline."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from huggingface_hub.repocard_data import EvalResult

from tuner import spec as specs
from tuner.model_card import TASK, model_card
from tuner.run import RunFiles
from tuner.spec import Spec
from tuner.vae import codec
from tuner.vae.model import VAE
from tuner.vae.shape import ImageShape


@pytest.fixture(scope="module")
def export(finished_run: RunFiles) -> Path:
    return finished_run.export


@pytest.fixture(scope="module")
def card(export: Path) -> ModelCard:
    return ModelCard.load(export / "README.md")


def test_its_head_says_what_the_hub_asks_for_but_the_licence(card, export):
    said = card.data.to_dict()
    assert (said["library_name"], said["pipeline_tag"], said["datasets"]) == ("vae-tuner", TASK, ["digits"])
    assert "vae" in said["tags"]
    assert "license" not in said
    assert "# license: " in (export / "README.md").read_text().splitlines()[1]


def test_its_scores_are_those_of_the_test_split_with_their_errors(card, finished_run):
    tested = finished_run.summary().test.exported
    found: dict[str, EvalResult] = {result.metric_type: result for result in card.data.eval_results}
    assert card.data.model_name == finished_run.name
    assert {(result.dataset_type, result.dataset_split) for result in found.values()} == {("digits", "test")}
    distance, error = re.fullmatch(r"(\S+) ± (\S+)", found["frechet_distance"].metric_value).groups()
    assert float(distance) == pytest.approx(tested.frechet_distance, abs=float(error))
    assert float(error) == pytest.approx(tested.frechet_distance_error, rel=0.1)
    assert found["mse"].metric_value == pytest.approx(tested.mse, rel=1e-3)
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in rows} == {3, 5}
    for score, result in found.items():
        said = result.metric_value if isinstance(result.metric_value, str) else f"{result.metric_value:.4g}"
        assert any(line.startswith(f"| {score} | {said} | ") for line in rows)


def test_it_links_to_files_that_are_there_and_says_how_the_model_was_found(card, export, finished_run):
    for target in re.findall(r"\]\(([^)]+)\)", card.text):
        assert (export / target).exists()
    assert f"{sum(finished_run.summary().trials.values())} trials were searched by frechet_distance" in card.text
    for name in specs.load(finished_run.spec).space:
        assert f"| {name} | " in card.text


def test_its_program_runs_with_onnxruntime_and_numpy_alone(card, export):
    (block,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    checks = "\nimport sys\nassert sampled.shape == (64, *decoded.shape[1:]) == (64, *images.shape[1:])"
    checks += "\nassert not {'tuner', 'torch'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", block + checks], cwd=export, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class OnTheHub(VAE, PyTorchModelHubMixin):
    """The network, made of what config.json says."""

    def __init__(self, images: dict[str, Any], parameters: dict[str, Any], **_: Any):
        super().__init__(ImageShape(*images["shape"]), parameters["latent_dim"], parameters["width"])


def test_the_hubs_mixin_loads_the_network_from_config_and_weights(export):
    network, expected = OnTheHub.from_pretrained(export, strict=True), codec.load(export).fitted.model
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network.encode(images)[0], expected.encode(images)[0])


def test_a_folders_name_that_yaml_might_misread_stays_a_name(export, tmp_path):
    (tmp_path / "yes: [1] <b>*x*").mkdir()
    data = {"name": "folder", "directory": str(tmp_path / "yes: [1] <b>*x*"), "invert": True}
    spec = Spec.model_validate({"data": data, "space": {"latent_dim": {"type": "int", "low": 2, "high": 4}}})
    info = codec.load(export).info | {"left_out": {"decoder.onnx": "RuntimeError: a branch"}}
    info["images"] = info["images"] | {"resize": "shorter side to 64, centre crop", "invert": True}
    found = ModelCard(model_card("null", spec, 3, info["parameters"], info))
    (result, *_) = found.data.eval_results
    assert (found.data.model_name, result.dataset_name) == ("null", "yes: [1] <b>*x*")
    assert not found.data.datasets
    assert r"trained on yes: \[1\] \<b\>\*x\*." in found.text, "nor does Markdown misread it"
    assert "There is no decoder.onnx: RuntimeError: a branch" in found.text
    assert "inverted before they are encoded; shorter side to 64, centre crop.\n" in found.text
