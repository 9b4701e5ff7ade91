"""The export: encoder, decoder and prior as files that work without this package.

The only module that reads the test split, once. Runs alone as `python -m tuner.export RUN`.
"""

import json
import platform
import shutil
import sys
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from tuner import sources
from tuner.alone import run_alone
from tuner.export_files import anomalies, write_files
from tuner.loggers import Trackers
from tuner.model_card import model_card
from tuner.pool import RayPool
from tuner.run import sync_directory, write_atomic
from tuner.scoring import Bench, compared
from tuner.summary import Summary
from tuner.tensorboard import TensorBoard
from tuner.terminal import stage
from tuner.vae.data import Split, as_floats, spread
from tuner.vae.fitted import FittedModel, encode
from tuner.vae.image_grid import interleaved, samples, sheet
from tuner.vae.model import OwnModel
from tuner.vae.neighbours import copied, coverage, knn_accuracy, nearest, recall
from tuner.vae.process import CPU
from tuner.workspace import Workspace

NEIGHBOUR_IMAGES, NEIGHBOURS_SHOWN = 5_000, 20
PART = 10_000  # training images as floats at a time
PROJECTED = 1_000  # test images in TensorBoard's projector
VERSIONS = ("torch", "ray", "optuna", "numpy", "onnx", "onnxruntime", "scikit-learn")


def export(workspace: Workspace, show: Callable[[str], None]) -> Summary:
    """Score baseline, best and retrained on the test split, write `export/` and return the summary.

    The files are checked against the checkpoint to 1e-5 before they are written. Raises RuntimeError where one
    disagrees.
    """
    run, spec = workspace.run, workspace.spec
    summary = run.summary()
    assert summary.best
    checkpoints = workspace.checkpoints
    models = {"best": checkpoints.best(run.checkpoint(summary.best.trial))}
    if summary.retrain:
        models |= {"refitted": checkpoints.best(run.refitted), "retrained": checkpoints.best(run.kept)}
    chosen = models.get("retrained", models["best"])

    test = sources.load_test(spec.data, run.images)
    workers = workspace.workers(test)
    scored = {"real": None, "baseline": checkpoints.baseline(), **models}
    trial = summary.retrain.trial if summary.retrain else summary.best.trial
    (promoted,) = (entry for entry in summary.promotion if entry.trial == trial)
    info = {
        "images": {
            "shape": list(chosen.model.shape),
            "values": [0, 1],
            "ink": spec.data.ink,
            "invert": getattr(spec.data, "invert", False),
            "resize": spec.data.resize,
        },
        "parameters": chosen.parameters.model_dump(),
        "temperature": chosen.temperature,
        "weights": sum(parameter.numel() for parameter in chosen.model.parameters()),
        "lineage": {
            "run": run.name,
            "trial": promoted.trial,
            "epoch": promoted.epoch,
            "retrain_epoch": chosen.epoch if summary.retrain else None,
            "seed": spec.seed,
            "own_model": spec.own_model and spec.own_model.model_dump(),
            "data": {"name": spec.data.name, "train_sha256": workspace.data.train.fingerprint()},
            "versions": {name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
        },
    }
    show("scoring on the test split, and writing the files")
    (files, latents), final, *measured = workers.map(
        _work,
        [
            (files_of, chosen, info, workspace.own),
            (neighbourhood, chosen),
            *((Bench.score, it) for it in scored.values()),
        ],
    )
    measured[-1].scores.update(final)
    tested = compared(dict(zip(scored, measured, strict=True)))
    config = json.loads(files["config.json"]) | {"test": tested.exported.model_dump()}
    files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    found, trials = (summary.retrain or summary.best).searched, sum(summary.trials.values())
    files["README.md"] = model_card(run.name, spec, trials, found, config).encode()
    temporary = run.export.with_name(f".{run.export.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, content in files.items():
        write_atomic(temporary / name, content)
    with closing(TensorBoard(run.tensorboard, spec)) as board:
        labels = None if test.labels is None else test.labels[:PROJECTED]
        board.embed(latents, labels, as_floats(test.images[:PROJECTED]))
    shutil.rmtree(run.export, ignore_errors=True)
    temporary.rename(run.export)
    sync_directory(run.path)
    Trackers(run, spec, "export").export(run.export, tested.exported.model_dump())
    return run.update_summary(test=tested)


def _work(bench: Bench, work: Callable[..., Any], *arguments: object) -> Any:
    """Different work side by side, where a pool's map is given one kind."""
    return work(bench, *arguments)


def files_of(
    bench: Bench, fitted: FittedModel, info: dict[str, Any], own: OwnModel | None
) -> tuple[dict[str, bytes], Tensor]:
    """The files of an export by name, each checked, and the latents of some test images for the projector."""
    assert bench.test is not None
    train, validation, test = (split.to(CPU) for split in (bench.data.train, bench.data.validation, bench.test))
    info = info | {"anomaly": anomalies(fitted, validation)}
    with TemporaryDirectory() as folder:
        write_files(fitted, info, Path(folder), as_floats(test.images[:7]), own)
        found = [path for path in Path(folder).rglob("*") if path.is_file()]
        files = {str(path.relative_to(folder)): path.read_bytes() for path in found}
    files["neighbours.png"] = beside_neighbours(fitted, train, bench.spec.data.ink)
    return files, encode(fitted.model, as_floats(test.images[:PROJECTED]))[0]


def neighbourhood(bench: Bench, fitted: FittedModel) -> dict[str, float]:
    """`FINAL_METRICS` of a model: recall and coverage in the extractor's features, copies in pixels.

    Neighbours vote only where there are labels. That accuracy is of all test images; its first thousands alone would be
    another number.
    """
    scorer, train, test = bench.scorer(), bench.data.train, bench.test
    assert test is not None
    fitted = fitted.to(scorer.device)
    drawn = scorer.samples(fitted, min(NEIGHBOUR_IMAGES, len(train)))
    shown, scores = as_floats(test.images), {}
    if test.labels is not None and train.labels is not None:
        parts = [encode(fitted.model, as_floats(part))[0] for part in train.images.split(PART)]
        latents = encode(fitted.model, shown)[0]
        scores["knn_accuracy"] = knn_accuracy(latents, test.labels, torch.cat(parts), train.labels)
    shown = spread(shown, NEIGHBOUR_IMAGES)
    sets = (shown, drawn, as_floats(train.images[:NEIGHBOUR_IMAGES]))
    learned = train.images.flatten(1)
    real, fake, like = (scorer.extractor.features(images).flatten(1) for images in sets)
    return scores | {
        **{score.__name__: score(real, fake) / best for score in (recall, coverage) if (best := score(real, like))},
        "copied": copied(drawn.flatten(1), learned) - copied(shown.flatten(1), learned),
    }


def beside_neighbours(fitted: FittedModel, train: Split, ink: bool) -> bytes:
    """Samples, and under each row the nearest training images in pixels, as a PNG file."""
    drawn = samples(fitted, NEIGHBOURS_SHOWN)
    closest = as_floats(train.images[nearest(drawn.flatten(1), train.images.flatten(1), 1)[1][:, 0]])
    return sheet(interleaved(drawn, closest, 10), 10, ink)


def export_stage(workspace: Workspace, pool: RayPool) -> None:
    """Export with progress on the terminal."""
    with stage(workspace.run, "export") as progress:
        export(workspace, progress.show)
        progress.done("checked against the checkpoint, scored on the test split")
        for file, reason in json.loads((workspace.run.export / "config.json").read_text("utf-8"))["left_out"].items():
            progress.done(f"without {file}: {reason}")


def main(argv: list[str] | None = None) -> int:
    return run_alone("tuner.export", "Score a run on the test split and write its model for use.", export_stage, argv)


if __name__ == "__main__":
    sys.exit(main())
