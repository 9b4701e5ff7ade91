"""What every stage works on: a run with its spec, data and extractors."""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tuner import own_model, sources
from tuner import spec as specs
from tuner.exits import command, refuse, resumable
from tuner.run import Refused, RunFiles, one_line, write_atomic
from tuner.spec import Spec
from tuner.storage import opened
from tuner.study import BASELINE
from tuner.summary import ExtractorInfo
from tuner.terminal import Progress
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.data import Data, Split, as_floats
from tuner.vae.extractor import (
    Classifier,
    FeatureExtractor,
    Program,
    WaveletPackets,
    draw_untrained,
    load_extractor,
    to_bytes,
    train_classifier,
)
from tuner.vae.fitted import FittedModel, Fitter, grey_share
from tuner.vae.image_grid import HELD_OUT, evenly_spaced
from tuner.vae.model import OwnModel
from tuner.vae.prior import standard_normal
from tuner.vae.process import settle
from tuner.vae.score import Scorer
from tuner.vae.seeds import Stream, derive_seed
from tuner.vae.shape import ImageShape

FINAL_SAMPLES = 10_000  # outside of the search a score may cost more
FINAL_PRIOR_IMAGES = 50_000
EXTRACTORS = ("search", "second")  # the search never sees the second, which sees what the first can't
MOST_GREY = 0.5  # share of pixels; of MNIST's 0.09 are, of Fashion-MNIST's 0.40, of the digits' 0.42
GREY_IMAGES = 1_000


@dataclass(frozen=True)
class Workspace:
    """Making one settles the process."""

    run: RunFiles
    spec: Spec
    data: Data
    extractors: dict[str, FeatureExtractor]
    own: OwnModel | None = None

    def __post_init__(self) -> None:
        settle()

    def scorer(self, extractor: str = "search", held_out: Split | None = None) -> Scorer:
        """A scorer with noise that no trial was scored with: on validation, to choose by, or on a `held_out` split."""
        train, validation = self.data.train, self.data.validation
        seed, quasi_random = self._seed, held_out is None
        features = self.extractors[extractor]
        return Scorer(
            features, train, held_out or validation, seed=seed, count=FINAL_SAMPLES, quasi_random=quasi_random
        )

    def fitter(self) -> Fitter:
        """Fits what is exported, guided by the second extractor, which after the promotion scores nothing any more."""
        count, guide = FINAL_PRIOR_IMAGES, self.extractors["second"]
        return Fitter(self.data.train, seed=self._seed, count=count, samples=FINAL_SAMPLES, guide=guide)

    @property
    def _seed(self) -> int:
        return derive_seed(self.spec.seed, Stream.PROMOTE)


def read_checkpoint(run: RunFiles, path: Path, own: OwnModel | None = None) -> Checkpoint:
    """A checkpoint of the run, `own` being the code of a user's own model.

    Raises Refused where there is none or it is damaged.
    """
    try:
        return Checkpoint.from_bytes(path.read_bytes(), own)
    except (OSError, ValueError) as error:
        raise Refused(f"{run.name_of(path)}: not readable as a checkpoint: {one_line(error)}") from error


def best_of(run: RunFiles, path: Path, own: OwnModel | None = None) -> FittedModel:
    """The best evaluation that a checkpoint holds, exactly as it was scored. Raises Refused."""
    best = read_checkpoint(run, path, own).best
    if best is None:
        raise Refused(f"{run.name_of(path)}: holds no scored model")
    return best


def baseline_of(run: RunFiles) -> FittedModel:
    """Where the classic settings ended, with N(0, I) as prior. Raises Refused."""
    checkpoint = read_checkpoint(run, run.checkpoint(BASELINE))
    model, parameters = checkpoint.state.model, checkpoint.parameters.model_copy(update={"prior": "standard_normal"})
    return FittedModel(model, parameters, standard_normal(model.latent_dim))


def open_workspace(run: RunFiles, data_place: Path | None = None, model: str | None = None) -> Workspace:
    """Load what a finished search left, `model` being what --model names.

    Raises ValueError, one line, where something is missing or damaged.
    """
    if not run.spec.exists():
        raise ValueError(f"{run.shown}: not a run directory (no {run.spec.name})")
    own, named = own_model.load(model)
    spec = specs.load(run.spec).with_data_at(data_place)
    spec.require_model(named)
    return Workspace(run, spec, load_data(run, spec), load_extractors(run), own)


def load_data(run: RunFiles, spec: Spec) -> Data:
    """The images, with progress on the terminal where they have to be decoded. Raises ValueError as `sources.load`."""
    with Progress("images") as progress:
        return sources.load(spec.data, run.images, progress.show)


def run_alone(module: str, description: str, work: Callable[[Workspace], object], argv: Sequence[str] | None) -> int:
    """One stage as a command of its own: `python -m MODULE RUN [FLAGS]` -> exit status.

    Ends the process with one line and status 2 where the run can't be worked on.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("run", metavar="RUN", help="run directory or URL of a search")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where images lie or are downloaded to")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="the model of your own that the search began with")
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    with resumable(command(module, given)), opened(arguments.run) as run:
        try:
            workspace = open_workspace(run, arguments.data_dir, arguments.model)
            if not run.summary().best:
                model = ["--model", arguments.model] if arguments.model else []
                again = command("tuner.search", ["--run", run.shown, *model])
                raise Refused(f"{run.shown}: its search has not ended; go on with {again}")
        except ValueError as error:
            refuse(error)
        with run.claimed():
            work(workspace)
    return 0


def keep_held_out(run: RunFiles, data: Data) -> None:
    """Write some validation images, for a report that is made from the run's files alone."""
    write_atomic(run.held_out, save({"images": evenly_spaced(data.validation.images)}))


def read_held_out(run: RunFiles, shape: ImageShape) -> Tensor:
    """What `keep_held_out` wrote: images (40, C, H, W) in [0, 1]. Raises Refused where it is damaged."""
    try:
        images = load(run.held_out.read_bytes())["images"]
    except (OSError, SafetensorError, KeyError) as error:
        raise Refused(f"{run.name_of(run.held_out)}: not readable as images: {one_line(error)}") from error
    if images.dtype != torch.uint8 or tuple(images.shape) != (HELD_OUT, *shape):
        raise Refused(f"{run.name_of(run.held_out)}: holds other images than the run's")
    return as_floats(images)


def require_fit(run: RunFiles, spec: Spec, data: Data) -> None:
    """Raises ValueError, one line, where the spec asks for what does not go with these images."""
    grey, refused, why = grey_share(as_floats(data.train.images[:GREY_IMAGES])), {}, "in colour"
    if data.shape.channels > 1:
        refused = {"temperature": "fitted", "pixels": "binary"}
    elif grey > MOST_GREY:
        refused, why = {"temperature": "fitted"}, f"of more grey ({grey:.0%} of their pixels) than black and white"
    for name, value in refused.items():
        entry = spec.space.get(name)
        if value in (entry.ends() if entry else [spec.fixed.get(name)]):
            raise ValueError(f"{'space' if entry else 'fixed'}.{name}: {value} does not go with images {why}")
    if spec.features:
        kept = load_extractors(run).get("search")
        program = kept if isinstance(kept, Program) else read_program(spec)
        try:
            program.require_fit(as_floats(data.validation.images[:GREY_IMAGES]))
        except ValueError as error:
            raise ValueError(f"features: {spec.features} {error}") from error


def read_program(spec: Spec) -> Program:
    """The user's feature extractor. Raises ValueError where its file is not the one of the spec."""
    assert spec.features
    assert spec.features_sha256
    program = load_extractor(spec.features, spec.features_sha256)
    if not isinstance(program, Program):
        raise ValueError(f"{spec.features}: no program of torch.export")
    return program


def needs_training(name: str, spec: Spec, data: Data) -> bool:
    """Whether an extractor of a run is a classifier."""
    return (data.classes or 0) > 1 and not (spec.features and name == "search")


def make_extractor(name: str, spec: Spec, data: Data) -> FeatureExtractor:
    """One of a run's extractors: the same spec and data give the same one.

    Where there are labels, two classifiers; else untrained networks, which rank models as those do, and for the second
    another family: wavelet packets. The user's own program takes the place of the first.
    """
    seed = derive_seed(spec.seed, Stream.EXTRACTOR, EXTRACTORS.index(name))
    if needs_training(name, spec, data):
        return train_classifier(data, seed, deep=name == "second")
    if name == "second":
        return WaveletPackets(data.shape)
    return read_program(spec) if spec.features else draw_untrained(data.shape, seed)


def keep_extractor(run: RunFiles, data: Data, name: str, extractor: FeatureExtractor) -> None:
    """Write a frozen extractor; describe it by kind, hash and how often a classifier is right on validation."""
    content, held_out = to_bytes(extractor), data.validation
    write_atomic(run.extractor(name, extractor.kind), content)
    accuracy = None
    if isinstance(extractor, Classifier) and held_out.labels is not None:
        accuracy = extractor.accuracy(as_floats(held_out.images), held_out.labels)
    described = ExtractorInfo(kind=extractor.kind, sha256=hashlib.sha256(content).hexdigest(), accuracy=accuracy)
    run.update_summary(extractors={name: described})


def load_extractors(run: RunFiles) -> dict[str, FeatureExtractor]:
    """The run's extractors; empty before they were made. Raises ValueError where a file is not the frozen one."""
    described = run.summary().extractors
    return {name: load_extractor(run.extractor(name, info.kind), info.sha256) for name, info in described.items()}
