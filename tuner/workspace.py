"""What every stage works on: a run with its spec, data and extractors."""

import argparse
import hashlib
import io
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuner import spec as specs
from tuner.exits import command, refuse, resumable
from tuner.run import Refused, RunFiles, one_line, write_atomic
from tuner.spec import Spec
from tuner.storage import opened
from tuner.vae import data as datasets
from tuner.vae.data import Data, Split, pixels
from tuner.vae.extractor import FeatureExtractor, load_extractor, to_bytes
from tuner.vae.model import VAE, build
from tuner.vae.parameters import Parameters
from tuner.vae.prior import Prior, standard_normal
from tuner.vae.process import settle
from tuner.vae.score import Scorer
from tuner.vae.train import Stream, derive_seed

FINAL_SAMPLES = 10_000  # outside of the search a score may cost more
FINAL_PRIOR_IMAGES = 50_000
# Name: width, and whether it is deep. The search never sees the second, which sees what the first can't.
EXTRACTORS = {"search": (16, False), "second": (16, True)}


@dataclass(frozen=True)
class FittedModel:
    """A model with the parameters it was trained with and the prior it was scored with."""

    model: VAE
    parameters: Parameters
    prior: Prior
    epoch: float

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and plain containers only."""
        return {
            "parameters": self.parameters.model_dump(),
            "model": {name: tensor.clone() for name, tensor in self.model.state_dict().items()},
            "prior": self.prior.state_dict(),
            "epoch": self.epoch,
        }

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> "FittedModel":
        """Raises whatever what is no such mapping provokes."""
        parameters = Parameters.model_validate(saved["parameters"])
        model = build(parameters, seed=0)
        model.load_state_dict(saved["model"])
        prior, epoch = Prior.from_state_dict(saved["prior"]), saved["epoch"]
        prior.place(torch.zeros(1, parameters.latent_dim), torch.zeros(1))
        if not isinstance(epoch, int | float):
            raise TypeError(f"epoch is {epoch!r}")
        return cls(model.eval(), parameters, prior, epoch)


@dataclass(frozen=True)
class Workspace:
    """Making one settles the process."""

    run: RunFiles
    spec: Spec
    data: Data
    extractors: dict[str, FeatureExtractor]
    data_directory: Path

    def __post_init__(self) -> None:
        settle()

    def scorer(self, extractor: str = "search", held_out: Split | None = None) -> Scorer:
        """A scorer with noise that no trial was scored with: on validation, to choose by, or on a `held_out` split.

        Its fits are guided by the second extractor, which after the promotion scores nothing any more.
        """
        return Scorer(
            self.extractors[extractor],
            self.data.train,
            held_out or self.data.validation,
            seed=derive_seed(self.spec.seed, Stream.PROMOTE),
            count=FINAL_SAMPLES,
            prior_count=FINAL_PRIOR_IMAGES,
            quasi_random=held_out is None,
            guide=self.extractors["second"],
        )


def best_of(run: RunFiles, trial: int) -> FittedModel:
    """The best evaluation of a trial, exactly as it was scored. Raises Refused where the file is damaged."""
    path = run.checkpoint(trial)
    with reading(run, path):
        return FittedModel.from_state_dict(load_tensors(path.read_bytes())["best"])


def last_of(run: RunFiles, trial: int) -> FittedModel:
    """Where a trial ended, with N(0, I) as its prior: what the baseline is. Raises Refused as `best_of`."""
    path = run.checkpoint(trial)
    with reading(run, path):
        saved = load_tensors(path.read_bytes())
        parameters = saved["best"]["parameters"] | {"prior": "standard_normal"}
        return FittedModel.from_state_dict(
            {
                "parameters": parameters,
                "model": saved["last"]["model"],
                "prior": standard_normal(parameters["latent_dim"]).state_dict(),
                "epoch": saved["report"]["epoch"],
            }
        )


def retrained(run: RunFiles) -> FittedModel:
    """What the retrain kept. Raises Refused where the file is damaged."""
    with reading(run, run.retrained):
        return FittedModel.from_state_dict(load_tensors(run.retrained.read_bytes()))


def open_workspace(run: RunFiles, data_directory: Path | None = None) -> Workspace:
    """Load what a finished search left. Raises ValueError, one line, where something is missing or damaged."""
    if not run.spec.exists():
        raise ValueError(f"{run.shown}: not a run directory (no {run.spec.name})")
    spec = specs.load(run.spec)
    directory = data_directory or spec.data.directory
    data = datasets.load(spec.data.name, directory, spec.data.download)
    return Workspace(run, spec, data, load_extractors(run), directory)


def run_alone(module: str, description: str, work: Callable[[Workspace], object], argv: Sequence[str] | None) -> int:
    """One stage as a command of its own: `python -m MODULE RUN [--data-dir DIR]` -> exit status.

    Ends the process with one line and status 2 where the run can't be worked on.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("run", metavar="RUN", help="run directory or URL of a search")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where MNIST lies or is downloaded to")
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    with resumable(command(module, given)), opened(arguments.run) as run:
        try:
            workspace = open_workspace(run, arguments.data_dir)
            if "best" not in run.summary():
                raise Refused(
                    f"{run.shown}: its search has not ended; go on with python -m tuner.search --run {run.shown}"
                )
        except ValueError as error:
            refuse(error)
        with run.claimed():
            work(workspace)
    return 0


def keep_extractor(run: RunFiles, data: Data, name: str, extractor: FeatureExtractor) -> None:
    """Write a frozen extractor; describe it by hash, shape and how often it is right on the validation split."""
    content = to_bytes(extractor)
    write_atomic(run.extractor(name), content)
    accuracy = extractor.accuracy(pixels(data.validation.images), data.validation.labels)
    shape = {"width": extractor.width, "deep": extractor.deep}
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "accuracy": accuracy, **shape}
    run.update_summary(extractors={name: entry})


def load_extractors(run: RunFiles) -> dict[str, FeatureExtractor]:
    """The run's extractors; empty before they were trained. Raises ValueError where a file is not the frozen one."""
    described = run.summary().get("extractors", {})
    return {name: load_extractor(run.extractor(name), entry["sha256"]) for name, entry in described.items()}


@contextmanager
def reading(run: RunFiles, path: Path) -> Iterator[None]:
    """Turn whatever a damaged checkpoint provokes into Refused."""
    try:
        yield
    except Exception as error:
        raise Refused(f"{run.name_of(path)}: not readable as a checkpoint: {one_line(error)[:200]}") from error


def load_tensors(content: bytes) -> dict[str, Any]:
    """Tensors, numbers and plain containers from the bytes of a checkpoint; nothing in it is run.

    Raises whatever what is no checkpoint provokes, and ValueError where a checksum differs, which torch ignores.
    """
    if zipfile.ZipFile(io.BytesIO(content)).testzip():
        raise ValueError("a checksum differs")
    saved: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return saved
