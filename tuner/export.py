"""Stage 5: encoder, decoder and prior as files that work without this package.

The only module that reads the test split, once. Runs alone as `python -m tuner.export RUN`.
"""

import json
import platform
import shutil
import sys
from contextlib import closing
from importlib.metadata import version

from torch import Tensor

from tuner import sources
from tuner.export_files import write_files
from tuner.run import sync_directory, write_atomic
from tuner.summary import Scores, Summary, Tested
from tuner.tensorboard import TensorBoard
from tuner.terminal import stage
from tuner.vae.data import Split, as_floats
from tuner.vae.extractor import FeatureExtractor
from tuner.vae.fitted import FittedModel, encode
from tuner.vae.image_grid import interleaved, samples, sheet
from tuner.vae.metrics import gap_closed
from tuner.vae.model import Model
from tuner.vae.neighbours import copied, coverage, knn_accuracy, nearest, recall
from tuner.workspace import Workspace, run_alone

NEIGHBOUR_IMAGES, NEIGHBOURS_SHOWN = 5_000, 20
PROJECTED = 1_000  # test images in TensorBoard's projector
VERSIONS = ("torch", "ray", "optuna", "numpy", "onnx", "onnxruntime", "scikit-learn")


def export(workspace: Workspace) -> Summary:
    """Score baseline, best and retrained on the test split, write `export/` and return the summary.

    The files are made in a temporary folder and checked against the checkpoint to 1e-5 before they take
    their name. Raises RuntimeError where one disagrees.
    """
    run, spec = workspace.run, workspace.spec
    summary = run.summary()
    assert summary.best
    models = {"best": workspace.checkpoints.best(run.checkpoint(summary.best.trial))}
    if summary.retrain:
        models["retrained"] = workspace.checkpoints.best(run.retrain_checkpoint)
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
    write_files(chosen, info, temporary, as_floats(test.images[:7]), workspace.own)
    write_atomic(temporary / "neighbours.png", beside_neighbours(chosen, workspace.data.train, spec.data.ink))
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
    scores = {name: scorer(fitted) for name, fitted in {"baseline": workspace.checkpoints.baseline(), **models}.items()}
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
