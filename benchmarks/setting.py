"""The setting in which benchmarks measure: data, specs, trials without a search, the tutorial's parts, clock, scale."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from tuner import sources
from tuner import spec as specs
from tuner.extractors import make_extractor
from tuner.scoring import PRIOR_IMAGES, SAMPLES
from tuner.sources.torchvision import torchvision_datasets
from tuner.spec import Spec
from tuner.summary import EXTRACTORS
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.data import Data, Split
from tuner.vae.extractor import train_classifier
from tuner.vae.fitted import FittedModel, Fitter
from tuner.vae.metrics import gap_closed
from tuner.vae.model import VAE, Builder, Model
from tuner.vae.parameters import CLASSIC, Parameters
from tuner.vae.prior import standard_normal
from tuner.vae.process import settle
from tuner.vae.score import Scorer
from tuner.vae.shape import ImageShape
from tuner.vae.step import State
from tuner.vae.train import train

SPECS = Path(__file__).parents[1] / "search_spaces"
MNIST = Path("data")
GOALS = (0.5, 0.8, 0.9, 0.95)
SHOWN = ("frechet_distance", "frechet_distance_reconstruction", "frechet_distance_standard_normal", "sharpness", "mse")


# Command lines and what they print


def parser(description: str | None, data_dir: Path | None) -> argparse.ArgumentParser:
    """A parser with --data-dir, which is `data_dir` unless it is given; None stands for the embedded digits."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = "where MNIST lies" + ("" if data_dir else "; without, the embedded digits")
    result.add_argument("--data-dir", type=Path, default=data_dir, help=told)
    return result


def say(line: Mapping[str, Any], digits: int | None = 4) -> None:
    """Print a line of JSON at once, its numbers rounded unless `digits` is None."""
    if digits is not None:
        line = {name: round(value, digits) if isinstance(value, float) else value for name, value in line.items()}
    print(json.dumps(line), flush=True)


def command_of(module: str, *arguments: object) -> list[str]:
    """A module as a process of its own, which imports what this one does where it is started in the same directory."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def search_command(data_dir: Path | None, run: Path, *arguments: object, images: str = "mnist") -> list[str]:
    """The tuner's own search by the shipped spec, up to the promotion."""
    where = ["--data-dir", data_dir.resolve()] if data_dir else []
    return command_of("tuner.search", spec_file(data_dir, images), *where, "--run", run, "--no-retrain", *arguments)


# Data and specs


def spec_file(data_dir: Path | None, images: str = "mnist") -> Path:
    """The shipped spec of `images` where there is a directory, else the digits'."""
    return SPECS / f"{images if data_dir else 'digits'}.yaml"


def load_data(data_dir: Path | None, images: str = "mnist") -> Data:
    """What the spec names where there is a directory, else the embedded digits."""
    return load_spec(data_dir, images)[1]


def load_spec(data_dir: Path | None, images: str = "mnist") -> tuple[Spec, Data]:
    """A shipped spec and its data."""
    spec = specs.load(spec_file(data_dir, images))
    return spec, sources.load(spec.with_data_at(data_dir).data)


def repeated(data: Data, images: int) -> Data:
    """That many training images, a fifth as many to validate on: the first, or all over again."""

    def sized(split: Split, count: int) -> Split:
        index = torch.arange(count) % len(split)
        return Split(split.images[index], split.labels if split.labels is None else split.labels[index])

    return Data(sized(data.train, images), sized(data.validation, images // 5))


# Trials without a search


def models_at(
    parameters: Parameters, images: Tensor, epochs: Sequence[float], *, seed: int, trial: int
) -> Iterator[tuple[float, Model]]:
    """A trial's training, to the last of `epochs` -> each epoch with the model there, which training on moves."""
    state, most = State.fresh(Builder(ImageShape(*images.shape[1:])), parameters, seed, trial), epochs[-1]
    for record in train(state, parameters, images, epochs, seed=seed, trial=trial, total_epochs=most):
        yield record.epoch, state.model


def trained(parameters: Parameters, images: Tensor, epochs: float, *, seed: int, trial: int) -> Model:
    *_, (_, model) = models_at(parameters, images, [epochs], seed=seed, trial=trial)
    return model


def shipped_point(data_dir: Path) -> tuple[Parameters, Data, Fitter, Scorer]:
    """MNIST's last named point, with the prior of its retrain; data; a fitter and a scorer as the retrain's.

    Settles the process and prints point and floor. The extractors are those that a search with seed 0 trains.
    """
    settle()
    spec, data = load_spec(data_dir)
    extractor, guide = (make_extractor(name, spec.seed, data) for name in EXTRACTORS)
    fitter = Fitter(data.train, seed=5, count=PRIOR_IMAGES, samples=SAMPLES, guide=guide)
    scorer = Scorer(extractor, data.train, data.validation, seed=5, count=SAMPLES, quasi_random=True)
    say({"floor": scorer.floor}, 3)
    base = spec.parameters(spec.points_to_evaluate[-1] | spec.retrain.priors[-1].model_dump())
    say({"base": base.model_dump()})
    return base, data, fitter, scorer


# What the MNIST tutorials show


def plain(latent_dim: int, width: int = 32) -> VAE:
    """The network in PyTorch's own layers."""
    model = VAE(ImageShape(1, 28, 28), latent_dim, width)
    last = nn.ConvTranspose2d(width, 1, 3, stride=2, padding=1, output_padding=1)
    last.load_state_dict(model.up[-1].state_dict())
    model.up[-1] = last
    return model


class Pictures(Dataset[tuple[Tensor, int]]):
    """As torchvision's MNIST hands them out."""

    def __init__(self, split: Split):
        torchvision_datasets()  # torchvision beside a CPU build of torch
        from torchvision.transforms import ToTensor

        self.split, self.transform = split, ToTensor()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        assert self.split.labels is not None
        picture = Image.fromarray(self.split.images[index, 0].numpy())
        return self.transform(picture), int(self.split.labels[index])


def tutorial_loss(model: Model, images: Tensor, kl_weight: float = 1.0) -> Tensor:
    """Summed over a batch (B, 1, 28, 28): squared error of one draw, and the weighted KL divergence."""
    mean, log_variance = model.encode(images)
    assert log_variance is not None
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    error = F.mse_loss(torch.sigmoid(model.decode(latents)), images, reduction="sum")
    return error - 0.5 * kl_weight * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())


# Clock and scale of whole searches


def watch(command: list[str], folder: Path, kept: Path, seconds: float) -> list[tuple[float, Path]]:
    """Run a command for `seconds`, with nothing cached; copy each checkpoint that appears in `folder` -> (its time, its
    copy)."""
    kept.mkdir(parents=True)
    found: list[tuple[float, Path]] = []
    seen: set[tuple[str, int]] = set()
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=(kept / "stderr.txt").open("w"),
        start_new_session=True,
        env=os.environ | {"XDG_CACHE_HOME": str(kept / "cache")},
    )
    while time.monotonic() - started < seconds and process.poll() is None:
        for file in sorted(folder.glob("*.pt")):
            try:
                stamp = (file.name, file.stat().st_mtime_ns)
                if stamp not in seen:
                    copy = kept / f"{len(found):04d}.pt"
                    shutil.copy(file, copy)
                    seen.add(stamp)
                    found.append((time.monotonic() - started, copy))
            except FileNotFoundError:
                continue  # no longer among the best
        time.sleep(0.1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return found


def unseen_scorer(spec: Spec, data: Data) -> tuple[Scorer, float]:
    """A scorer with noise and an extractor that nobody searched with, and the classic settings' distance under it."""
    settle()
    scorer = Scorer(train_classifier(data, 22), data.train, data.validation, seed=33, count=5_000)
    classic = CLASSIC.model_copy(update={"batch_size": spec.baseline.batch_size})
    model = trained(classic, data.train.images, spec.budget.max_epochs, seed=spec.seed, trial=0)
    fitted = FittedModel(model, classic, standard_normal(classic.latent_dim))
    return scorer, scorer.distance(scorer.samples(fitted, scorer.count))


def reached(found: list[tuple[float, Path]], scorer: Scorer, baseline: float) -> dict[str, Any]:
    """When each goal was reached, in seconds since the command; None where it was not."""
    result: dict[str, Any] = {str(goal): None for goal in GOALS}
    best = -float("inf")
    for seconds, file in found:
        fitted = Checkpoint.from_bytes(file.read_bytes()).best
        assert fitted
        distance = scorer.distance(scorer.samples(fitted, scorer.count))
        best = max(best, gap_closed(distance, scorer.floor, baseline))
        for goal in GOALS:
            if result[str(goal)] is None and best >= goal:
                result[str(goal)] = round(seconds, 1)
        if best >= GOALS[-1]:
            break
    return result | {
        "checkpoints": len(found),
        "first_checkpoint": round(found[0][0], 1) if found else None,
        "best": round(best, 4) if found else None,
    }
