"""Stage 5: encoder, decoder and prior as files that work without this package.

The only module that reads the test split, once. Runs alone as `python -m tuner.export RUN`.
"""

import io
import json
import logging
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from tuner.run import sync_directory, write_atomic
from tuner.study import BASELINE
from tuner.tensorboard import TensorBoard
from tuner.terminal import stage
from tuner.vae import codec
from tuner.vae.data import Split, load_test, pixels
from tuner.vae.extractor import FeatureExtractor
from tuner.vae.image_grid import fixed_noise, grid, png, samples
from tuner.vae.model import VAE
from tuner.vae.neighbours import copied, coverage, knn_accuracy, nearest, recall
from tuner.vae.prior import Sampler
from tuner.vae.score import encode, gap_closed
from tuner.workspace import FittedModel, Workspace, best_of, last_of, retrained, run_alone

TOLERANCE = 1e-5
SAMPLES = 100
NEIGHBOUR_IMAGES, NEIGHBOURS_SHOWN = 5_000, 20
PROJECTED = 1_000  # test images in TensorBoard's projector
VERSIONS = ("torch", "ray", "optuna", "numpy", "onnx", "onnxruntime", "scikit-learn")


class Encoder(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] -> mean (B, Z), and log-variance (B, Z) of a VAE."""

    def __init__(self, model: VAE):
        super().__init__()
        self.trunk, self.mean, self.log_variance = model.encoder, model.mean, model.log_variance

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self.trunk(images)
        mean: Tensor = self.mean(hidden)
        return mean if self.log_variance is None else (mean, self.log_variance(hidden))


class Decoder(nn.Module):
    """Latents (B, Z) -> images (B, 1, 28, 28) in [0, 1]."""

    contrast: Tensor

    def __init__(self, model: VAE):
        super().__init__()
        self.decoder = model.decoder
        self.register_buffer("contrast", model.contrast)

    def forward(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(self.contrast * self.decoder(latents))


def export(workspace: Workspace) -> dict[str, Any]:
    """Score baseline, best and retrained on the test split, write `export/` and return the summary.

    The files are made in a temporary folder and checked against the checkpoint to 1e-5 before they take
    their name. Raises RuntimeError where one disagrees.
    """
    run, spec = workspace.run, workspace.spec
    summary = run.summary()
    candidates = {"best": best_of(workspace.run, summary["best"]["trial"])}
    if "retrain" in summary:
        candidates["retrained"] = retrained(workspace.run)
    chosen = candidates.get("retrained", candidates["best"])

    test = load_test(spec.data.name, workspace.data_directory, spec.data.download)
    scores = score_test(workspace, candidates, test)
    temporary = run.export.with_name(f".{run.export.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    info = {
        "parameters": chosen.parameters.model_dump(),
        "weights": sum(parameter.numel() for parameter in chosen.model.parameters()),
        "test": scores.get("retrained", scores["best"]),
        "lineage": {
            "run": run.name,
            "trial": summary["best"]["trial"],
            "epoch": summary["best"]["epoch"],
            "retrain_epoch": chosen.epoch if "retrained" in candidates else None,
            "seed": spec.seed,
            "data": {"name": spec.data.name, "train_sha256": workspace.data.train.fingerprint()},
            "versions": {name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
        },
    }
    write_files(chosen, info, temporary)
    write_atomic(temporary / "neighbours.png", png(beside_neighbours(chosen, workspace.data.train)))
    check_files(chosen, pixels(test.images[:7]), temporary)
    sync_directory(temporary)
    with closing(TensorBoard(run.tensorboard, spec)) as board:
        images = pixels(test.images[:PROJECTED])
        board.embed(chosen.model.encode(images)[0], test.labels[:PROJECTED], images)
    shutil.rmtree(run.export, ignore_errors=True)
    temporary.rename(run.export)
    sync_directory(run.path)
    return run.update_summary(test=scores)


def score_test(workspace: Workspace, candidates: dict[str, FittedModel], test: Split) -> dict[str, dict[str, float]]:
    """Every score on the test split, for the baseline with samples from N(0, I) and for each candidate.

    The last candidate is the one that is exported: it gets `FINAL_METRICS`, too.
    """
    scorer = workspace.scorer(held_out=test)
    result = {}
    for name, candidate in {"baseline": last_of(workspace.run, BASELINE), **candidates}.items():
        scores = scorer(candidate.model, candidate.parameters, candidate.prior)
        if name == "baseline":
            baseline = scores["frechet_distance"]
        result[name] = scores | {
            "floor": scorer.floor,
            "gap_closed": gap_closed(scores["frechet_distance"], scorer.floor, baseline),
        }
    drawn = scorer.samples(candidate.model, candidate.prior, NEIGHBOUR_IMAGES)
    result[name] |= neighbourhood(candidate.model, drawn, scorer.extractor, workspace.data.train, test)
    return result


def neighbourhood(
    model: VAE, drawn: Tensor, extractor: FeatureExtractor, train: Split, test: Split
) -> dict[str, float]:
    """`FINAL_METRICS` of samples (N, 1, 28, 28): recall and coverage in the extractor's features, copies in pixels.

    The accuracy is that of all test images; its first thousands alone would be another number.
    """
    shown, learned = pixels(test.images), pixels(train.images)
    latents, references = encode(model, shown)[0], encode(model, learned)[0]
    shown = shown[:NEIGHBOUR_IMAGES]
    real, fake, like = (extractor.features(images) for images in (shown, drawn, learned[:NEIGHBOUR_IMAGES]))
    return {
        "recall": recall(real, fake) / recall(real, like),
        "coverage": coverage(real, fake) / coverage(real, like),
        "copied": copied(drawn.flatten(1), learned.flatten(1)) - copied(shown.flatten(1), learned.flatten(1)),
        "knn_accuracy": knn_accuracy(latents, test.labels, references, train.labels),
    }


def beside_neighbours(candidate: FittedModel, train: Split) -> np.ndarray:
    """Samples, and under each row the nearest training images in pixels: a grey picture (H, W) uint8."""
    drawn, learned = samples(candidate.model, candidate.prior, NEIGHBOURS_SHOWN), pixels(train.images)
    closest = learned[nearest(drawn.flatten(1), learned.flatten(1), 1)[1][:, 0]]
    rows = zip(drawn.split(10), closest.split(10), strict=True)
    return grid(torch.cat([images for pair in rows for images in pair]), columns=10, scale=2)


def write_files(candidate: FittedModel, info: dict[str, Any], directory: Path) -> None:
    """Everything of an export, into an existing directory."""
    model = candidate.model.eval().requires_grad_(False)
    write_atomic(directory / "weights.safetensors", save({k: v.contiguous() for k, v in model.state_dict().items()}))
    write_atomic(directory / "model.json", json.dumps(info, indent=2) + "\n")
    prior = io.BytesIO()
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in candidate.prior.state_dict().items()}
    np.savez(prior, **arrays)
    write_atomic(directory / "prior.npz", prior.getvalue())
    latents = torch.zeros(2, model.latent_dim)
    heads = ["mean", "log_variance"][: 1 + model.variational]
    _write_program(Encoder(model), {"images": torch.zeros(2, 1, 28, 28)}, heads, directory / "encoder")
    _write_program(Decoder(model), {"latents": latents}, ["images"], directory / "decoder")
    drawn_from = {"noise": latents, "uniform": torch.zeros(2)}
    _write_program(Sampler(candidate.prior), drawn_from, ["latents"], directory / "prior")
    drawn = codec.load(directory).sample(SAMPLES)
    write_atomic(directory / "samples.png", png(grid(drawn, columns=10, scale=2)))


def _write_program(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], stem: Path) -> None:
    """One network as `stem`.pt2 and `stem`.onnx, the batch size free."""
    shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn of their own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program, buffer = (
            torch.export.export(module.eval(), tuple(inputs.values()), dynamic_shapes=shapes),
            io.BytesIO(),
        )
        torch.export.save(program, buffer)
        write_atomic(stem.with_suffix(".pt2"), buffer.getvalue())
        onnx_program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert onnx_program is not None
    write_atomic(stem.with_suffix(".onnx"), onnx_program.model_proto.SerializeToString())


@torch.no_grad()
def check_files(candidate: FittedModel, images: Tensor, directory: Path) -> None:
    """Compare every file with the checkpoint on batches of 1 and of all `images`. Raises RuntimeError."""
    import onnxruntime

    model, prior = candidate.model.eval(), candidate.prior
    loaded = codec.load(directory)
    stems = ("encoder", "decoder", "prior")
    sessions = {
        stem: onnxruntime.InferenceSession(directory / f"{stem}.onnx", providers=["CPUExecutionProvider"])
        for stem in stems
    }
    programs = {stem: torch.export.load(directory / f"{stem}.pt2").module() for stem in stems}
    files: dict[str, Callable[..., Tensor]] = {
        "encoder": loaded.encode, "decoder": loaded.decode, "prior": loaded.prior.place
    }  # fmt: skip

    def by_onnx(stem: str, *given: Tensor) -> Tensor:
        names = [entry.name for entry in sessions[stem].get_inputs()]
        return torch.from_numpy(sessions[stem].run(None, dict(zip(names, [x.numpy() for x in given], strict=True)))[0])

    readers: dict[str, Callable[..., Tensor]] = {
        "safetensors": lambda stem, *given: files[stem](*given),
        "onnx": by_onnx,
        "pt2": lambda stem, *given: _first(programs[stem](*given)),
    }
    for batch in (images[:1], images):
        latents, noise = model.encode(batch)[0], fixed_noise(len(batch))
        noise = (noise[0][:, : model.latent_dim].contiguous(), noise[1])
        for stem, given, expected in (
            ("encoder", (batch,), latents),
            ("decoder", (latents,), model.draw(latents)),
            ("prior", noise, prior.place(*noise)),
        ):
            for kind, read in readers.items():
                error = (read(stem, *given) - expected).abs().max().item()
                allowed = TOLERANCE * max(1.0, expected.abs().max().item())
                if not error <= allowed:
                    raise RuntimeError(f"{stem} as {kind} differs from the checkpoint by {error:.2g}")


def export_stage(workspace: Workspace) -> None:
    """Export with progress on the terminal."""
    with stage(workspace.run, "export") as progress:
        export(workspace)
        progress.done("checked against the checkpoint, scored on the test split")


def main(argv: list[str] | None = None) -> int:
    return run_alone("tuner.export", "Score a run on the test split and write its model for use.", export_stage, argv)


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


if __name__ == "__main__":
    sys.exit(main())
