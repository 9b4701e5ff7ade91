"""The export works without this package, agrees with the checkpoint and says what it is."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from tuner import sources
from tuner.data_spec import DigitsSpec
from tuner.export import VERSIONS, neighbourhood
from tuner.export_files import check_files, write_files
from tuner.scoring import Bench
from tuner.vae import codec
from tuner.vae.data import Split, as_floats
from tuner.vae.extractor import WaveletPackets, draw_untrained
from tuner.vae.fitted import FittedModel
from tuner.vae.flow import Flow
from tuner.vae.metrics import FINAL_METRICS, gap_closed
from tuner.vae.model import Builder
from tuner.vae.neighbours import copied
from tuner.vae.parameters import Parameters
from tuner.vae.prior import Prior, standard_normal
from tuner.vae.shape import ImageShape
from tuner.workspace import Checkpoints

build = Builder(ImageShape(1, 28, 28))

FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    "neighbours.png",
    "onnx/decoder.onnx",
    "onnx/encoder.onnx",
    "onnx/prior.onnx",
    "prior.safetensors",
    "pt2/decoder.pt2",
    "pt2/encoder.pt2",
    "pt2/prior.pt2",
    "samples.png",
}


@pytest.fixture(scope="module")
def export(finished_run) -> Path:
    return finished_run.export


@pytest.fixture(scope="module")
def loaded(export) -> codec.Codec:
    return codec.load(export)


@pytest.fixture(scope="module")
def kept(finished_run) -> FittedModel:
    """What the retrain kept: the exported model."""
    return Checkpoints(finished_run).best(finished_run.kept)


@pytest.fixture(scope="module")
def tested() -> Split:
    return sources.load_test(DigitsSpec())


@pytest.fixture(scope="module")
def digits(workspace) -> torch.Tensor:
    """Fifty images in [0, 1]."""
    return as_floats(workspace.data.validation.images[:50])


def test_the_export_holds_these_files_and_no_others(export):
    assert {str(path.relative_to(export)) for path in export.rglob("*.*")} == FILES


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_onnx_agrees_with_the_codec(export, loaded, digits, batch):
    sessions = {name: onnxruntime.InferenceSession(export / "onnx" / f"{name}.onnx") for name in ("encoder", "decoder")}
    mean, log_variance = sessions["encoder"].run(None, {"images": digits[:batch].numpy()})
    (images,) = sessions["decoder"].run(None, {"latents": mean})
    assert mean.shape == log_variance.shape == (batch, loaded.fitted.model.latent_dim)
    assert np.abs(mean - loaded.encode(digits[:batch]).numpy()).max() < 1e-5 * max(1, np.abs(mean).max())
    assert np.abs(images - loaded.decode(mean).numpy()).max() < 1e-5
    assert np.abs(log_variance - loaded.fitted.model.encode(digits[:batch])[1].numpy()).max() < 1e-4


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_torch_export_agrees_with_the_codec(export, loaded, digits, batch):
    programs = {name: torch.export.load(export / "pt2" / f"{name}.pt2").module() for name in ("encoder", "decoder")}
    mean, log_variance = programs["encoder"](digits[:batch])
    images = programs["decoder"](mean)
    assert log_variance.shape == (batch, loaded.fitted.model.latent_dim)
    assert (mean - loaded.encode(digits[:batch])).abs().max() < 1e-5 * max(1, float(mean.abs().max()))
    assert (images - loaded.decode(mean)).abs().max() < 1e-5


def test_the_prior_is_plain_arrays_of_a_proper_mixture(export, kept):
    parameters = kept.parameters
    prior = load_numpy(export / "prior.safetensors")
    assert prior.keys() == {"weights", "means", "covariances"}
    weights, means, covariances = (prior[name] for name in ("weights", "means", "covariances"))
    components, latents = parameters.prior_components, parameters.latent_dim
    assert weights.shape == (components,)
    assert means.shape == (components, latents)
    assert covariances.shape == (components, latents, latents)
    assert weights.min() > 0
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    assert np.abs(covariances - covariances.transpose(0, 2, 1)).max() <= 1e-6 * np.abs(covariances).max()
    assert np.linalg.eigvalsh(covariances.astype(np.float64)).min() > 0


@pytest.mark.slow
def test_a_bent_prior_leaves_as_arrays_and_programs_that_agree(digits, tmp_path):
    generator = torch.Generator().manual_seed(0)
    parameters = Parameters(latent_dim=2, width=2, prior="flow", prior_components=2, temperature="fitted")
    flow = Flow(2, couplings=2, hidden=3).requires_grad_(False)
    for weight in (*flow.weights, *flow.biases):
        weight.copy_(torch.randn(weight.shape, generator=generator))
    mixture = Prior(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0, 0], [1, 1]]), torch.eye(2).repeat(2, 1, 1), flow)
    bent = FittedModel(build(parameters, seed=0), parameters, mixture, temperature=0.5)
    images = {"shape": [1, 28, 28], "ink": True}
    info = {"images": images, "parameters": parameters.model_dump(), "temperature": 0.5}
    write_files(bent, info, tmp_path, digits)
    drawn, loaded = mixture.sample(20, torch.Generator().manual_seed(1)), codec.load(tmp_path).fitted
    assert torch.equal(loaded.prior.sample(20, torch.Generator().manual_seed(1)), drawn)
    assert torch.equal(loaded.draw(drawn), bent.draw(drawn))
    flat = replace(mixture, flow=None)
    assert (drawn - flat.sample(20, torch.Generator().manual_seed(1))).abs().max() > 0.1
    with pytest.raises(RuntimeError, match="prior as"):
        check_files(replace(bent, prior=flat), digits, tmp_path)
    with pytest.raises(RuntimeError, match="decoder as"):
        check_files(replace(bent, temperature=0.6), digits, tmp_path)


def test_the_config_says_what_it_is_and_where_it_comes_from(export, finished_run, workspace, kept):
    info, summary = json.loads((export / "config.json").read_text()), finished_run.summary()
    assert info["images"] == {
        "shape": [1, 28, 28],
        "values": [0, 1],
        "ink": True,
        "invert": False,
        "resize": None,
    }
    assert info["parameters"] == summary.retrain.parameters
    assert info["temperature"] == kept.temperature
    assert info["test"] == summary.test.exported.model_dump()
    saved = load_file(export / "model.safetensors")
    assert info["weights"] == sum(weight.numel() for weight in saved.values())
    lineage = info["lineage"]
    assert lineage["run"] == finished_run.path.name
    (promoted,) = (entry for entry in summary.promotion if entry.trial == summary.retrain.trial)
    assert (lineage["trial"], lineage["epoch"]) == (promoted.trial, promoted.epoch)
    assert lineage["retrain_epoch"] == summary.retrain.kept_epoch
    assert lineage["seed"] == workspace.spec.seed == 0
    assert lineage["data"] == {"name": "digits", "train_sha256": workspace.data.train.fingerprint()}
    assert {name: lineage["versions"][name] for name in VERSIONS} == {name: version(name) for name in VERSIONS}


def test_the_weights_are_those_of_the_plain_network(export, kept):
    weights = load_file(export / "model.safetensors")
    plain = build(kept.parameters, seed=0).state_dict()
    assert {name: value.shape for name, value in weights.items()} == {k: v.shape for k, v in plain.items()}
    assert weights["down.0.weight"].shape == (32, 1, 3, 3)
    assert weights["mean.weight"].shape == (kept.parameters.latent_dim, 128)
    assert weights["up.1.weight"].shape == (32, 1, 3, 3)
    assert all(torch.equal(value, kept.model.state_dict()[name]) for name, value in weights.items())


WITHOUT_THIS_PACKAGE = """
import sys
import numpy as np
import onnx
import onnxruntime

export, work = sys.argv[1:]
encoder = onnxruntime.InferenceSession(export + "/onnx/encoder.onnx")
decoder = onnxruntime.InferenceSession(export + "/onnx/decoder.onnx")

latents = encoder.run(["mean"], {"images": np.load(work + "/images.npy")})[0]
latents[:, 0] += 1
changed = decoder.run(["images"], {"latents": latents})[0]

random, prior = np.random.default_rng(0), onnxruntime.InferenceSession(export + "/onnx/prior.onnx")
noise = random.standard_normal((2000, latents.shape[1])).astype(np.float32)
drawn = prior.run(["latents"], {"noise": noise, "uniform": random.random(2000, dtype=np.float32)})[0]
samples = decoder.run(["images"], {"latents": drawn})[0]

np.savez(work + "/result.npz", changed=changed, samples=samples)
assert not {"tuner", "torch"} & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.fixture(scope="module")
def without_this_package(export, digits, tmp_path_factory):
    """Images decoded from changed latents, and samples, by onnxruntime and numpy alone in a process of their own."""
    work = tmp_path_factory.mktemp("alone")
    np.save(work / "images.npy", digits.numpy())
    script = work / "script.py"
    script.write_text(WITHOUT_THIS_PACKAGE)
    subprocess.run([sys.executable, "-I", script, export, work], check=True, cwd=work)
    return np.load(work / "result.npz")


def test_a_latent_is_changed_and_decoded_with_onnxruntime_and_numpy_alone(without_this_package, loaded, digits):
    latents = loaded.encode(digits)
    latents[:, 0] += 1
    changed = without_this_package["changed"]
    assert np.abs(changed - loaded.decode(latents).numpy()).max() < 1e-5
    assert np.abs(changed - loaded.decode(loaded.encode(digits)).numpy()).max() > 0.1


def test_numpy_alone_samples_what_the_codec_samples(without_this_package, loaded):
    ours, theirs = loaded.sample(2000), without_this_package["samples"]
    assert theirs.mean() == pytest.approx(float(ours.mean()), rel=0.03)
    assert theirs.std() == pytest.approx(float(ours.std()), rel=0.03)
    assert np.abs(theirs.mean(0) - ours.numpy().mean(0)).max() < 0.06


def test_a_file_that_differs_from_the_checkpoint_is_not_let_through(run_copy, kept, digits):
    check_files(kept, digits, run_copy.export)
    path = run_copy.export / "model.safetensors"
    weights = load_file(path)
    weights["start.weight"][0] += 0.1
    save_file(weights, path)
    with pytest.raises(RuntimeError, match="decoder as safetensors differs from the checkpoint by"):
        check_files(kept, digits, run_copy.export)


def test_another_models_program_is_not_let_through(run_copy, digits):
    other = Checkpoints(run_copy).best(run_copy.checkpoint(run_copy.summary().best.trial))
    with pytest.raises(RuntimeError, match="encoder as safetensors differs"):
        check_files(other, digits, run_copy.export)
    state = {name: value.contiguous() for name, value in other.model.state_dict().items()}
    save_file(state, run_copy.export / "model.safetensors")
    with pytest.raises(RuntimeError, match="encoder as pt2 differs"):
        check_files(other, digits, run_copy.export)


def test_an_onnx_file_with_other_weights_is_not_let_through(run_copy, kept, digits):
    path = run_copy.export / "onnx" / "decoder.onnx"
    program = onnx.load(path)
    for tensor in program.graph.initializer:
        if len(tensor.dims) > 1:
            weights = 1.01 * onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights.astype(np.float32), tensor.name))
    onnx.save(program, path)
    with pytest.raises(RuntimeError, match="decoder as onnx differs"):
        check_files(kept, digits, run_copy.export)


def test_the_accuracy_of_the_latents_neighbours_is_scikit_learns(workspace, finished_run, loaded, tested):
    train = workspace.data.train
    classifier = KNeighborsClassifier(5).fit(loaded.encode(train.images).numpy(), train.labels.numpy())
    expected = classifier.score(loaded.encode(tested.images).numpy(), tested.labels.numpy())
    scores = finished_run.summary().test.exported.model_dump()
    assert scores["knn_accuracy"] == pytest.approx(expected, abs=0.003)  # one image, should distances be equal
    assert 0 < scores["recall"] < 1.5
    assert 0 < scores["coverage"] < 1.5
    assert -1 < scores["copied"] < 1


class Copier(nn.Module):
    """A model that has learned images (N, C, H, W) in [0, 1] by heart, and draws each as often as any other."""

    latent_dim = 2

    def __init__(self, images: torch.Tensor):
        super().__init__()
        self.images = images
        self.shape = ImageShape(*images.shape[1:])

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return images.flatten(1)[:, 300 : 300 + self.latent_dim], None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        share = torch.special.ndtr(latents[:, 0])  # of a standard normal: uniform
        chosen = (share * len(self.images)).long().clamp(max=len(self.images) - 1)
        return torch.logit(self.images[chosen], 1e-4)


def test_training_images_are_copies_of_themselves(bench, tested):
    learned = as_floats(bench.data.train.images)
    copies = FittedModel(Copier(learned), Parameters(latent_dim=2), standard_normal(2))
    scores = neighbourhood(replace(bench, test=tested), copies)
    held_out = copied(as_floats(tested.images).flatten(1), learned.flatten(1))
    assert scores.keys() == FINAL_METRICS.keys()
    assert scores["copied"] == pytest.approx(1 - held_out, abs=0.01)
    assert scores["coverage"] == pytest.approx(1, abs=0.01)


def test_where_test_images_repeat_and_so_cover_nothing_nothing_is_said_of_coverage(bench, tested):
    repeated = Split(tested.images[:20].repeat_interleave(8, 0), tested.labels[:20].repeat_interleave(8))
    copies = FittedModel(Copier(as_floats(bench.data.train.images)), Parameters(latent_dim=2), standard_normal(2))
    assert neighbourhood(replace(bench, test=repeated), copies).keys() == FINAL_METRICS.keys() - {"coverage"}


def test_without_labels_neighbours_do_not_vote_and_groups_of_features_are_compared_as_one(bench, tested):
    data = replace(bench.data, train=Split(bench.data.train.images))
    copies = FittedModel(Copier(as_floats(data.train.images)), Parameters(latent_dim=2), standard_normal(2))
    for extractor in (draw_untrained(data.shape, seed=0), WaveletPackets(data.shape)):
        unlabelled = Bench(bench.spec, data, {"search": extractor}, Split(tested.images))
        scores = neighbourhood(unlabelled, copies)
        assert scores.keys() == FINAL_METRICS.keys() - {"knn_accuracy"}
        assert scores["coverage"] == pytest.approx(1, abs=0.02)


def test_the_samples_show_ink_on_paper(export):
    picture = np.asarray(Image.open(export / "samples.png"))
    assert picture.shape == (10 * 30 * 2 - 4, 10 * 30 * 2 - 4)
    assert picture.max() == 255
    assert picture.min() < 50
    assert 0.05 < (picture < 128).mean() < 0.5


@pytest.mark.slow
def test_the_test_scores_are_those_of_the_exported_models_on_the_test_split(bench, finished_run, kept, tested):
    summary = finished_run.summary()
    assert len(tested) == 400
    scorer = replace(bench, test=tested).scorer()
    models = {
        "baseline": Checkpoints(finished_run).baseline(),
        "best": Checkpoints(finished_run).best(finished_run.checkpoint(summary.best.trial)),
        "refitted": Checkpoints(finished_run).best(finished_run.refitted),
        "retrained": kept,
    }
    assert summary.test.models.keys() == models.keys()
    assert summary.test.real.frechet_distance == pytest.approx(scorer.floor, rel=1e-9)
    assert (summary.test.real.gap_closed, summary.test.baseline.gap_closed) == (1, 0)
    baseline = summary.test.baseline.frechet_distance
    for name, fitted in models.items():
        reported, scores = summary.test.models[name].model_dump(), scorer(fitted)
        final = FINAL_METRICS.keys() if name == "retrained" else set()
        errors = {"frechet_distance_error", "gap_closed_error"}
        assert reported.keys() == scores.keys() | {"gap_closed"} | errors | final
        assert (reported["gap_closed_error"] > 0) == (name != "baseline")
        assert reported["frechet_distance_error"] > 0
        for metric, value in scores.items():
            assert reported[metric] == pytest.approx(value, rel=1e-9), (name, metric)
        closed = gap_closed(reported["frechet_distance"], scorer.floor, baseline)
        assert reported["gap_closed"] == pytest.approx(closed)


def test_the_test_split_is_no_part_of_training_or_validation(workspace, tested):
    seen = {
        image.numpy().tobytes() for split in (workspace.data.train, workspace.data.validation) for image in split.images
    }
    shared = sum(image.numpy().tobytes() in seen for image in tested.images)
    assert shared == 0
