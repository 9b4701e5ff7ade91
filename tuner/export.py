"""Stage 5: encoder, decoder and prior as files that work without this package.

The only module that reads the test split, once. Runs alone as `python -m tuner.export RUN`.
"""

import copy
import io
import json
import logging
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import closing, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from tuner import sources
from tuner.own_model import told
from tuner.run import sync_directory, write_atomic
from tuner.summary import Scores, Summary, Tested
from tuner.tensorboard import TensorBoard
from tuner.terminal import stage
from tuner.vae import codec
from tuner.vae.data import Split, as_floats
from tuner.vae.extractor import FeatureExtractor
from tuner.vae.fitted import FittedModel, encode, tempered
from tuner.vae.image_grid import fixed_noise, interleaved, samples, sheet
from tuner.vae.metrics import gap_closed
from tuner.vae.model import Model, OwnModel
from tuner.vae.neighbours import copied, coverage, knn_accuracy, nearest, recall
from tuner.vae.prior import Sampler
from tuner.workspace import Workspace, baseline_of, best_of, run_alone

TOLERANCE, OWN_TOLERANCE = 1e-5, 1e-3  # the second, a quarter of a grey level, for operators that we did not choose
SAMPLES = 100
NEIGHBOUR_IMAGES, NEIGHBOURS_SHOWN = 5_000, 20
PROJECTED = 1_000  # test images in TensorBoard's projector
VERSIONS = ("torch", "ray", "optuna", "numpy", "onnx", "onnxruntime", "scikit-learn")


class Encoder(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> mean (B, Z), and log-variance (B, Z) where the model has one."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        mean, log_variance = self.model.encode(images)
        return mean if log_variance is None else (mean, log_variance)


class Decoder(nn.Module):
    """Latents (B, Z) -> images (B, C, H, W) in [0, 1]."""

    def __init__(self, fitted: FittedModel):
        super().__init__()
        self.model, self.temperature = fitted.model, fitted.temperature

    def forward(self, latents: Tensor) -> Tensor:
        return tempered(self.model.decode(latents), self.temperature)


def export(workspace: Workspace) -> Summary:
    """Score baseline, best and retrained on the test split, write `export/` and return the summary.

    The files are made in a temporary folder and checked against the checkpoint to 1e-5 before they take
    their name. Raises RuntimeError where one disagrees.
    """
    run, spec = workspace.run, workspace.spec
    summary = run.summary()
    assert summary.best
    models = {"best": best_of(run, run.checkpoint(summary.best.trial), workspace.own)}
    if summary.retrain:
        models["retrained"] = best_of(run, run.retrain_checkpoint, workspace.own)
    chosen = models.get("retrained", models["best"])

    test = sources.load_test(spec.data, run.images)
    tested = score_test(workspace, models, test)
    temporary = run.export.with_name(f".{run.export.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    info = {
        "images": {
            "shape": list(chosen.model.shape),
            "values": [0, 1],
            "ink": spec.data.ink,
            "resize": spec.data.resize,
        },
        "parameters": chosen.parameters.model_dump(),
        "temperature": chosen.temperature,
        "weights": sum(parameter.numel() for parameter in chosen.model.parameters()),
        "test": tested.exported.model_dump(),
        "lineage": {
            "run": run.name,
            "trial": summary.best.trial,
            "epoch": summary.best.epoch,
            "retrain_epoch": chosen.epoch if summary.retrain else None,
            "seed": spec.seed,
            "own_model": spec.own_model and spec.own_model.model_dump(),
            "data": {"name": spec.data.name, "train_sha256": workspace.data.train.fingerprint()},
            "versions": {name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
        },
    }
    write_files(chosen, info, temporary, test.images[:1], workspace.own)
    write_atomic(temporary / "neighbours.png", beside_neighbours(chosen, workspace.data.train, spec.data.ink))
    check_files(chosen, as_floats(test.images[:7]), temporary, workspace.own)
    sync_directory(temporary)
    with closing(TensorBoard(run.tensorboard, spec)) as board:
        images = as_floats(test.images[:PROJECTED])
        labels = None if test.labels is None else test.labels[:PROJECTED]
        board.embed(encode(chosen.model, images)[0], labels, images)
    shutil.rmtree(run.export, ignore_errors=True)
    temporary.rename(run.export)
    sync_directory(run.path)
    return run.update_summary(test=tested)


def score_test(workspace: Workspace, models: dict[str, FittedModel], test: Split) -> Tested:
    """Every score on the test split, for the baseline with samples from N(0, I) and for each of the models.

    The last of them is the one that is exported: it gets `FINAL_METRICS`, too.
    """
    scorer = workspace.scorer(held_out=test)
    scores = {name: scorer(fitted) for name, fitted in {"baseline": baseline_of(workspace.run), **models}.items()}
    baseline = scores["baseline"]["frechet_distance"]
    for found in scores.values():
        found["gap_closed"] = gap_closed(found["frechet_distance"], scorer.floor, baseline)
    *_, (last, exported) = models.items()
    drawn = scorer.samples(exported, NEIGHBOUR_IMAGES)
    scores[last] |= neighbourhood(exported.model, drawn, scorer.extractor, workspace.data.train, test)
    return Tested(floor=scorer.floor, **{name: Scores(**found) for name, found in scores.items()})


def neighbourhood(
    model: Model, drawn: Tensor, extractor: FeatureExtractor, train: Split, test: Split
) -> dict[str, float]:
    """`FINAL_METRICS` of samples (N, C, H, W): recall and coverage in the extractor's features, copies in pixels.

    Neighbours vote only where there are labels.

    The accuracy is that of all test images; its first thousands alone would be another number.
    """
    shown, learned = as_floats(test.images), as_floats(train.images)
    scores = {}
    if test.labels is not None and train.labels is not None:
        latents, references = encode(model, shown)[0], encode(model, learned)[0]
        scores["knn_accuracy"] = knn_accuracy(latents, test.labels, references, train.labels)
    shown = shown[:NEIGHBOUR_IMAGES]
    real, fake, like = (extractor.features(images).flatten(1) for images in (shown, drawn, learned[:NEIGHBOUR_IMAGES]))
    return scores | {
        "recall": recall(real, fake) / recall(real, like),
        "coverage": coverage(real, fake) / coverage(real, like),
        "copied": copied(drawn.flatten(1), learned.flatten(1)) - copied(shown.flatten(1), learned.flatten(1)),
    }


def beside_neighbours(fitted: FittedModel, train: Split, ink: bool) -> bytes:
    """Samples, and under each row the nearest training images in pixels, as a PNG file."""
    drawn, learned = samples(fitted, NEIGHBOURS_SHOWN), as_floats(train.images)
    closest = learned[nearest(drawn.flatten(1), learned.flatten(1), 1)[1][:, 0]]
    return sheet(interleaved(drawn, closest, 10), 10, ink)


def write_files(
    fitted: FittedModel, info: dict[str, Any], directory: Path, image: Tensor, own: OwnModel | None = None
) -> None:
    """Everything of an export, into an empty directory; `image` (1, C, H, W) tells the shape.

    Of a user's own model, made by `own`, programs are left out that PyTorch can't write; config.json says why.
    """
    model = fitted.model.eval()
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}
    write_atomic(directory / "weights.safetensors", save(weights))  # none shares memory with another
    prior = io.BytesIO()
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in fitted.prior.state_dict().items()}
    np.savez(prior, **arrays)
    write_atomic(directory / "prior.npz", prior.getvalue())
    images, latents = torch.zeros(2, *image.shape[1:]), torch.zeros(2, model.latent_dim)
    heads = ["mean"] if model.encode(images)[1] is None else ["mean", "log_variance"]
    programs: dict[str, tuple[nn.Module, dict[str, Tensor], list[str]]] = {
        "encoder": (Encoder(model), {"images": images}, heads),
        "decoder": (Decoder(fitted), {"latents": latents}, ["images"]),
        "prior": (Sampler(fitted.prior), {"noise": latents, "uniform": torch.zeros(2)}, ["latents"]),
    }
    left_out: dict[str, str] = {}
    for name, (module, inputs, outputs) in programs.items():
        theirs = fitted.parameters.model == "own" and name != "prior"  # it may use weights that get no gradient
        try:
            _write_program(module if theirs else _trimmed(module, inputs), inputs, outputs, directory / name)
        except Exception as error:  # PyTorch's exporters raise whatever they meet
            if not theirs:
                raise
            kinds = [kind for kind in PROGRAMS if not (directory / f"{name}.{kind}").exists()]
            left_out |= {f"{name}.{kind}": told(error) for kind in kinds}
    write_atomic(directory / "config.json", json.dumps(info | {"left_out": left_out}, indent=2) + "\n")
    drawn = codec.load(directory, own).sample(SAMPLES)
    write_atomic(directory / "samples.png", sheet(drawn, 10, info["images"]["ink"]))


def _write_program(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], stem: Path) -> None:
    """One network as `stem`.pt2 and `stem`.onnx, the batch size free."""
    given = tuple(inputs.values())
    shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs)
    names: dict[str, Any] = {"input_names": list(inputs), "output_names": outputs}
    buffer = io.BytesIO()
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # the exporters print where they give up
        warnings.simplefilter("ignore")  # and warn of their own deprecations
        program = torch.export.export(module, given, dynamic_shapes=shapes)
        torch.export.save(program, buffer)
        write_atomic(stem.with_suffix(".pt2"), buffer.getvalue())
        as_onnx = torch.onnx.export(program, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    assert as_onnx is not None
    write_atomic(stem.with_suffix(".onnx"), as_onnx.model_proto.SerializeToString())


def _trimmed(module: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    """A copy in which weights that have no part in the output take no room."""
    module = copy.deepcopy(module).eval().requires_grad_(True)
    outputs = module(*inputs.values())
    total = torch.stack([part.sum() for part in (outputs if isinstance(outputs, tuple) else (outputs,))]).sum()
    weights = list(module.parameters())
    if weights:
        gradients = torch.autograd.grad(total, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is None:
                weight.data = weight.data.new_empty(0)
    return module.requires_grad_(False)


@torch.no_grad()
def check_files(fitted: FittedModel, images: Tensor, directory: Path, own: OwnModel | None = None) -> None:
    """Compare every file with the checkpoint on batches of 1 and of all `images`. Raises RuntimeError.

    Of a user's own model, a program that differs or can't be read is taken away, and config.json says why.
    """
    loaded = codec.load(directory, own)
    of_weights: dict[str, Callable[..., Tensor]] = {
        "encoder": loaded.encode,
        "decoder": loaded.decode,
        "prior": loaded.fitted.prior.place,
    }
    cases: dict[str, list[tuple[tuple[Tensor, ...], Tensor]]] = {stem: [] for stem in of_weights}
    for batch in (images[:1], images):
        latents = fitted.model.encode(batch)[0]
        normal, uniform = fixed_noise(len(batch))
        noise = normal[:, : fitted.model.latent_dim].contiguous()
        cases["encoder"].append(((batch,), latents))
        cases["decoder"].append(((latents,), fitted.draw(latents)))
        cases["prior"].append(((noise, uniform), fitted.prior.place(noise, uniform)))
    left_out: dict[str, str] = {}
    for stem, read in of_weights.items():
        _compare(f"{stem} as safetensors", read, cases[stem], TOLERANCE)
        theirs = fitted.parameters.model == "own" and stem != "prior"
        for kind, reader in PROGRAMS.items():
            path = directory / f"{stem}.{kind}"
            try:
                if path.exists():
                    _compare(f"{stem} as {kind}", reader(path), cases[stem], OWN_TOLERANCE if theirs else TOLERANCE)
            except Exception as error:  # PyTorch and onnxruntime raise whatever they meet
                if not theirs:
                    raise
                path.unlink()
                left_out[path.name] = told(error)
    if left_out:
        info = json.loads((directory / "config.json").read_text())
        info["left_out"] |= left_out
        write_atomic(directory / "config.json", json.dumps(info, indent=2) + "\n")


def _compare(
    what: str, read: Callable[..., Any], cases: list[tuple[tuple[Tensor, ...], Tensor]], tolerance: float
) -> None:
    """Raises RuntimeError where what is read of inputs is not what is expected."""
    for given, expected in cases:
        found = read(*given)
        error = ((found[0] if isinstance(found, tuple) else found) - expected).abs().max().item()
        if not error <= tolerance * max(1.0, expected.abs().max().item()):
            raise RuntimeError(f"{what} differs from the checkpoint by {error:.2g}")


def _onnx(path: Path) -> Callable[..., Tensor]:
    """The first output of an ONNX file as a function of its inputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*given: Tensor) -> Tensor:
        inputs = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
        return torch.from_numpy(session.run(None, inputs)[0])

    return run


PROGRAMS: dict[str, Callable[[Path], Callable[..., Any]]] = {
    "pt2": lambda path: torch.export.load(path).module(),
    "onnx": _onnx,
}


def export_stage(workspace: Workspace) -> None:
    """Export with progress on the terminal."""
    with stage(workspace.run, "export") as progress:
        export(workspace)
        progress.done("checked against the checkpoint, scored on the test split")
        for file, reason in json.loads((workspace.run.export / "config.json").read_text())["left_out"].items():
            progress.done(f"without {file}: {reason}")


def main(argv: list[str] | None = None) -> int:
    return run_alone("tuner.export", "Score a run on the test split and write its model for use.", export_stage, argv)


if __name__ == "__main__":
    sys.exit(main())
