"""Do scores that need no labels rank models as those that do? Random models of one space under each.

    python -m benchmarks.label_free NAME [--data-dir data] [--seed 0] [--trials 16] [--models DIR]

NAME is mnist, fashion_mnist or a `.zip` of labelled folders of 32x32 images in colour, as train/CLASS/NAME.jpg. Each
trial is six epochs of 10,000 images at a random point. What they draw is compared with held-out images in the
features of each candidate and of two classifiers that no candidate has anything of: `held_out` is the geometric mean
of these two. A line for each trial; one for each candidate: Spearman's rank correlation with `held_out`, the same among
the better half with its 90 % bootstrap interval, and how many times the best trial's `held_out` that of the candidate's
choice has; and one for each way to spoil real images: how many times that of unspoilt ones each distance is. With
--models what was trained is kept there, and read again.
"""

import io
import math
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.setting import MNIST, parser, say, trained
from tuner import sources
from tuner.data_spec import IdxSpec
from tuner.vae.data import Data, Split, as_floats
from tuner.vae.distance import frechet_distance, moments
from tuner.vae.extractor import (
    FeatureExtractor,
    WaveletPackets,
    draw_untrained,
    from_bytes,
    to_bytes,
    train_classifier,
)
from tuner.vae.fitted import FittedModel, Fitter
from tuner.vae.parameters import Parameters
from tuner.vae.process import settle

IMAGES, EPOCHS, SAMPLES, HELD_OUT = 10_000, 6, 2_500, 5_000
COLOUR_TRAINING = 8_000
KL_WEIGHT = {1: ("absolute", 0.005, 1.0), 3: ("calibrated", 0.2, 20.0)}  # by channels: about the same range
TEMPERATURES = {1: ["one", "fitted"], 3: ["one"]}
DIRECTIONS, QUANTILES = 500, 1_000
RESAMPLES = 2_000
Score = Callable[[Tensor], float]  # of images (N, C, H, W) in [0, 1]


def load(name: str, directory: Path) -> Data:
    if not name.endswith(".zip"):
        return sources.load(IdxSpec(name=name, directory=directory, download=False))
    with zipfile.ZipFile(name) as archive:
        names = sorted(file for file in archive.namelist() if file.endswith(".jpg"))
        pictures = [np.asarray(Image.open(io.BytesIO(archive.read(file)))) for file in names]
    known = sorted({file.split("/")[1] for file in names})
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([known.index(file.split("/")[1]) for file in names])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    training, held_out = order[:COLOUR_TRAINING], order[COLOUR_TRAINING:]
    return Data(Split(images[training], labels[training]), Split(images[held_out], labels[held_out]))


def points(name: str, channels: int, seed: int, count: int) -> list[Parameters]:
    draw, (unit, low, high) = random.Random(f"{name} {seed}"), KL_WEIGHT[channels]

    def log(least: float, most: float) -> float:
        return math.exp(draw.uniform(math.log(least), math.log(most)))

    fixed: dict[str, Any] = {"prior": "gaussian_mixture", "batch_size": 64, "width": 16, "schedule": "cosine"}
    return [
        Parameters(
            latent_dim=round(log(4, 64)),
            learning_rate=log(1e-3, 5e-3),
            kl_weight=log(low, high),
            prior_components=round(draw.uniform(20, 50)),
            **fixed | {"kl_unit": unit, "temperature": draw.choice(TEMPERATURES[channels])},
        )
        for _ in range(count)
    ]


def features_distance(extractor: FeatureExtractor, real: Tensor) -> Score:
    goal = moments(extractor.features(real))
    return lambda images: frechet_distance(goal, moments(extractor.features(images))).item()


def sliced_wasserstein(real: Tensor) -> Score:
    """Squared, of pixels: the mean over random directions of the distance in one dimension. Bonneel et al. 2015."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(real[0].numel(), DIRECTIONS, generator=generator), dim=0)
    levels = torch.linspace(0, 1, QUANTILES)

    def quantiles(images: Tensor) -> Tensor:
        return torch.quantile(images.flatten(1) @ directions, levels, dim=0)

    goal = quantiles(real)
    return lambda images: (quantiles(images) - goal).square().mean().item()


def spoilt(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Real images (N, C, H, W) spoilt step by step: blurred, with noise, without some of the classes."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    blurred = {sigma: gaussian_filter(images.numpy(), (0, 0, sigma, sigma)) for sigma in (0.4, 0.6, 1.0)}
    result = {f"blur {sigma}": torch.from_numpy(pictures) for sigma, pictures in blurred.items()}
    result |= {f"noise {amount}": (images + amount * noise).clamp(0, 1) for amount in (0.03, 0.06, 0.12)}
    result |= {f"{dropped} classes less": images[labels >= dropped] for dropped in (1, 3, 5)}
    return result


def generators(name: str, data: Data, seed: int, count: int, models: Path | None) -> list[FittedModel]:
    """The trained models of all points."""
    first = seed * IMAGES % max(1, len(data.train) - IMAGES + 1)
    few = Split(data.train.images[first : first + IMAGES])
    fitter = Fitter(few, seed=seed, count=IMAGES, samples=SAMPLES)
    result = []
    for trial, parameters in enumerate(points(name, data.shape.channels, seed, count)):
        file = models and models / f"{Path(name).stem}-{seed}-{trial:02d}.pt"
        if file and file.exists():
            result.append(FittedModel.from_state_dict(torch.load(file)))
            continue
        model = trained(parameters, few.images, EPOCHS, seed=seed, trial=trial)
        result.append(fitter(model, parameters, EPOCHS))
        if file:
            torch.save(result[-1].state_dict(), file)
    return result


def held_out(name: str, data: Data, deep: bool, models: Path | None) -> FeatureExtractor:
    """A classifier that no candidate has anything of: wider than these, and of another seed."""
    file = models and models / f"{Path(name).stem}-{'deep' if deep else 'shallow'}.safetensors"
    if file and file.exists():
        return from_bytes(file.read_bytes())
    extractor = train_classifier(data, 1_001 + deep, width=24, deep=deep)
    if file:
        file.write_bytes(to_bytes(extractor))
    return extractor


def summary(scores: list[float], true: list[float]) -> dict[str, float]:
    """How a candidate's scores go with those of the held-out classifiers."""
    found, truth = np.array(scores), np.array(true)
    better = np.argsort(truth)[: len(truth) // 2]
    draws = np.random.default_rng(0).integers(len(better), size=(RESAMPLES, len(better)))
    resampled = [spearmanr(found[better[draw]], truth[better[draw]]).statistic for draw in draws]
    low, high = np.nanquantile(resampled, (0.05, 0.95))
    return {
        "all": spearmanr(found, truth).statistic,
        "better_half": spearmanr(found[better], truth[better]).statistic,
        "low": low,
        "high": high,
        "pick": truth[found.argmin()] / truth.min(),
    }


def main() -> None:
    options = parser(__doc__, MNIST)
    options.add_argument("name", metavar="NAME")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--trials", type=int, default=16)
    options.add_argument("--models", type=Path, metavar="DIR")
    arguments = options.parse_args()
    settle()
    seed, data = arguments.seed, load(arguments.name, arguments.data_dir)
    assert data.train.labels is not None
    real = as_floats(data.validation.images[:HELD_OUT])
    unseen = [features_distance(held_out(arguments.name, data, deep, arguments.models), real) for deep in (False, True)]
    candidates: dict[str, Score] = {
        "classifier": features_distance(train_classifier(data, seed), real),
        "untrained": features_distance(draw_untrained(data.shape, seed), real),
        "wavelets": features_distance(WaveletPackets(data.shape), real),
        "sliced_wasserstein": sliced_wasserstein(real),
    }

    def scored(images: Tensor) -> dict[str, float]:
        mean = math.prod(score(images) for score in unseen) ** (1 / len(unseen))
        return {"held_out": mean} | {name: score(images) for name, score in candidates.items()}

    rows = []
    for trial, fitted in enumerate(generators(arguments.name, data, seed, arguments.trials, arguments.models)):
        given = fitted.parameters
        rows.append(scored(fitted.draw(fitted.prior.sample_quasi_random(SAMPLES, seed))))
        point = {key: getattr(given, key) for key in ("latent_dim", "learning_rate", "kl_weight", "temperature")}
        say({"trial": trial, **point, **rows[-1]})
    for name in candidates:
        say({"score": name, **summary([row[name] for row in rows], [row["held_out"] for row in rows])}, 3)
    images, labels = as_floats(data.train.images[:HELD_OUT]), data.train.labels[:HELD_OUT]
    clean = scored(images)
    for name, worse in spoilt(images, labels).items():
        say({"spoilt": name, **{key: value / clean[key] for key, value in scored(worse).items()}}, 2)


if __name__ == "__main__":
    main()
