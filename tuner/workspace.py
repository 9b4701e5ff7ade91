"""What every stage works on: a run with its spec, data and extractors."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tuner import own_model, sources
from tuner import spec as specs
from tuner.extractors import has_classes, load_extractors, read_program
from tuner.run import RunFiles
from tuner.scoring import Bench, Pool, Workers
from tuner.spec import Spec
from tuner.study import BASELINE
from tuner.terminal import Progress
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.data import Data, Split, as_floats
from tuner.vae.errors import Refused, refusing
from tuner.vae.extractor import FeatureExtractor, Program
from tuner.vae.fitted import FittedModel, grey_share
from tuner.vae.image_grid import HELD_OUT, evenly_spaced
from tuner.vae.model import OwnModel
from tuner.vae.prior import standard_normal
from tuner.vae.shape import ImageShape

MOST_GREY = 0.5  # share of pixels; of MNIST's 0.09 are, of Fashion-MNIST's 0.40, of the digits' 0.42
LEAST_GREY = 0.001  # below it the temperature is next to none, and logits next to infinite
GREY_IMAGES = 1_000
PAPER = 0.5  # mean grey: strokes are fewer than what they stand on
FLAT = 32  # of 255 greys: digits of 0 to 16, or masks of 0 and 1, that nobody has scaled


@dataclass(frozen=True)
class Checkpoints:
    """Reads what a run's checkpoints hold; `own` is the code of a user's own model."""

    run: RunFiles
    own: OwnModel | None = None

    def read(self, path: Path) -> Checkpoint:
        """Raises Refused where there is none or it is damaged."""
        with refusing(f"{self.run.name_of(path)}: not readable as a checkpoint", OSError, ValueError):
            return Checkpoint.from_bytes(path.read_bytes(), self.own)

    def best(self, path: Path) -> FittedModel:
        """The best evaluation that a checkpoint holds, exactly as it was scored. Raises Refused."""
        best = self.read(path).best
        if best is None:
            raise Refused(f"{self.run.name_of(path)}: holds no scored model")
        return best

    def baseline(self) -> FittedModel:
        """Where the classic settings ended, with N(0, I) as prior. Raises Refused."""
        checkpoint = self.read(self.run.checkpoint(BASELINE))
        model, parameters = checkpoint.state.model, checkpoint.parameters
        parameters = parameters.model_copy(update={"prior": "standard_normal"})
        return FittedModel(model, parameters, standard_normal(model.latent_dim))


@dataclass(frozen=True)
class Workspace:
    """A run with all that its later stages draw on."""

    run: RunFiles
    spec: Spec
    data: Data
    extractors: dict[str, FeatureExtractor]
    own: OwnModel | None = None
    pool: Pool | None = None  # where nothing is scored there is none

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.run, self.own)

    def workers(self, test: Split | None = None) -> Workers:
        """Who scores on validation, to choose by; or on the `test` split."""
        assert self.pool is not None
        return self.pool(Bench(self.spec, self.data, self.extractors, test))


def open_workspace(run: RunFiles, data_place: Path | None = None, model: str | None = None) -> Workspace:
    """Load what a finished search left, `model` being what --model names.

    Raises Refused where something is missing or damaged.
    """
    if not run.spec.exists():
        raise Refused(f"{run.shown}: not a run directory (no {run.spec.name})")
    own, named = own_model.load(model)
    spec = specs.load(run.spec).with_data_at(run.images_at(data_place))
    spec.require_model(named)
    data = load_data(run, spec)
    require_begun_with(run, held_out_bytes(data))
    return Workspace(run, spec, data, load_extractors(run), own)


def load_data(run: RunFiles, spec: Spec) -> Data:
    """The images, with progress on the terminal where they have to be decoded. Raises Refused as `sources.load`."""
    with Progress("images") as progress:
        return sources.load(spec.data, run.images, progress.show)


def held_out_bytes(data: Data) -> bytes:
    """Some validation images as a file of the run, whose report is made from the run's files alone."""
    return save({"images": evenly_spaced(data.validation.images)})


def require_begun_with(run: RunFiles, held_out: bytes) -> None:
    """Raises Refused where the run has begun with other images than those of which these are some."""
    if run.held_out.exists() and run.held_out.read_bytes() != held_out:
        raise Refused(f"{run.shown}: has begun with other images, or its {run.held_out.name} is damaged")


def read_held_out(run: RunFiles, shape: ImageShape) -> Tensor:
    """What is in `held_out`: images (40, C, H, W) in [0, 1]. Raises Refused where it is damaged."""
    with refusing(f"{run.name_of(run.held_out)}: not readable as images", OSError, SafetensorError, KeyError):
        images = load(run.held_out.read_bytes())["images"]
    if images.dtype != torch.uint8 or tuple(images.shape) != (HELD_OUT, *shape):
        raise Refused(f"{run.name_of(run.held_out)}: holds other images than the run's")
    return as_floats(images)


def require_fit(run: RunFiles, spec: Spec, data: Data) -> None:
    """Raises Refused where the spec asks for what does not go with these images."""
    grey, refused, why = grey_share(as_floats(data.train.images[:GREY_IMAGES])), {}, "in colour"
    if data.shape.channels > 1:
        refused = {"temperature": "fitted", "pixels": "binary"}
    elif grey > MOST_GREY:
        refused, why = {"temperature": "fitted"}, f"of more grey ({grey:.0%} of their pixels) than black and white"
    elif grey < LEAST_GREY:
        refused, why = {"temperature": "fitted"}, f"of black and white alone ({grey:.1%} of their pixels are grey)"
    for name, value in refused.items():
        if value in spec.values(name):
            where = "space" if name in spec.space else "fixed"
            raise Refused(f"{where}.{name}: {value} does not go with images {why}")
    if spec.features:
        kept = load_extractors(run).get("search")
        program = kept if isinstance(kept, Program) else read_program(spec)
        try:
            program.require_fit(as_floats(data.validation.images[:GREY_IMAGES]))
        except ValueError as error:
            raise Refused(f"features: {spec.features} {error}") from error


def oddities(spec: Spec, data: Data) -> Iterator[str]:
    """What is seldom meant in images that can be trained on, a line each with its evidence."""
    if data.train.labels is not None and not has_classes(data):
        yield f"one class found in {len(data.train):,} labels: they go unused"
    images = data.train.images[:GREY_IMAGES]
    low, high, mean = int(images.min()), int(images.max()), as_floats(images).mean().item()
    if high - low < FLAT:
        yield f"grey values from {low} to {high} found, where 0 to 255 are black to white"
    if spec.data.ink and mean > PAPER:
        turned = getattr(spec.data, "invert", False)
        why = "data.invert has made them so" if turned else "data.invert turns those of data.name=arrays and folder"
        yield f"mean grey {mean:.2f} found, dark strokes on paper, where bright ones on black are expected: {why}"
