"""What every stage works on: a run with its spec, data and extractors."""

import argparse
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
from tuner.extractors import load_extractors, read_program
from tuner.run import Refused, RunFiles, one_line, write_atomic
from tuner.spec import Spec
from tuner.storage import opened
from tuner.study import BASELINE
from tuner.terminal import Progress
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.data import Data, Split, as_floats
from tuner.vae.extractor import FeatureExtractor, Program
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
MOST_GREY = 0.5  # share of pixels; of MNIST's 0.09 are, of Fashion-MNIST's 0.40, of the digits' 0.42
GREY_IMAGES = 1_000


@dataclass(frozen=True)
class Checkpoints:
    """Reads what a run's checkpoints hold; `own` is the code of a user's own model."""

    run: RunFiles
    own: OwnModel | None = None

    def read(self, path: Path) -> Checkpoint:
        """Raises Refused where there is none or it is damaged."""
        try:
            return Checkpoint.from_bytes(path.read_bytes(), self.own)
        except (OSError, ValueError) as error:
            raise Refused(f"{self.run.name_of(path)}: not readable as a checkpoint: {one_line(error)}") from error

    def best(self, path: Path) -> FittedModel:
        """The best evaluation that a checkpoint holds, exactly as it was scored. Raises Refused."""
        best = self.read(path).best
        if best is None:
            raise Refused(f"{self.run.name_of(path)}: holds no scored model")
        return best

    def baseline(self) -> FittedModel:
        """Where the classic settings ended, with N(0, I) as prior. Raises Refused."""
        checkpoint = self.read(self.run.checkpoint(BASELINE))
        model, parameters = (
            checkpoint.state.model,
            checkpoint.parameters.model_copy(update={"prior": "standard_normal"}),
        )
        return FittedModel(model, parameters, standard_normal(model.latent_dim))


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

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.run, self.own)

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
        if value in spec.values(name):
            where = "space" if name in spec.space else "fixed"
            raise ValueError(f"{where}.{name}: {value} does not go with images {why}")
    if spec.features:
        kept = load_extractors(run).get("search")
        program = kept if isinstance(kept, Program) else read_program(spec)
        try:
            program.require_fit(as_floats(data.validation.images[:GREY_IMAGES]))
        except ValueError as error:
            raise ValueError(f"features: {spec.features} {error}") from error
