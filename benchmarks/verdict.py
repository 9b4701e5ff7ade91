"""Score finished runs on labelled images, on the test split, by extractors that no search saw, beside the classic one.

    python -m benchmarks.verdict RUN [RUN ...] [--data-dir data] [--classic-epochs 59]

Runs are those of one search: the first as it ended, others with its winner retrained and exported under other seeds.
The classic settings are the first run's baseline, and the same trained for --classic-epochs: what the winner had in
all. Extractors: other seeds of the run's two, a wider network, one without convolutions and a residual one; and the
run's own, of which the first chose among trials and epochs, and the second among the promoted before it guided the
matched mixture. A line for each: floor, the classic distances, and mean and spread over the runs of distance, its
ratio to the floor, and the gap closed against either classic.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.setting import MNIST, parser, say, trained
from tuner import sources
from tuner.extractors import load_extractors
from tuner.run import RunFiles
from tuner.scoring import SAMPLES
from tuner.study import BASELINE
from tuner.vae import codec
from tuner.vae.data import Data
from tuner.vae.extractor import FEATURES, Classifier, FeatureExtractor, fit
from tuner.vae.fitted import FittedModel
from tuner.vae.metrics import FINAL_METRICS, gap_closed
from tuner.vae.score import Scorer
from tuner.vae.shape import ImageShape
from tuner.workspace import Checkpoints, open_workspace

SHOWN = ("frechet_distance", "gap_closed", "sharpness", *FINAL_METRICS)


class Flat(Classifier):
    """No convolution: the pixels -> 256 -> 64."""

    def __init__(self, shape: ImageShape, classes: int):
        super().__init__(shape, classes)
        first, second = nn.Linear(shape.numbers, 256), nn.Linear(256, FEATURES)
        self.trunk = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU())


class Block(nn.Module):
    """Two convolutions of 3x3 and a way past them."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        return F.gelu(images + self.second(F.gelu(self.first(images))))


class Residual(Classifier):
    """A convolution of 5x5 with stride 2, a block, a convolution of 3x3; means of 2x2 between; GELU."""

    def __init__(self, shape: ImageShape, classes: int):
        super().__init__(shape, classes)
        map_size = math.prod(-(-(side // 4) // 2) for side in shape[1:])
        self.trunk = nn.Sequential(
            *(nn.Conv2d(shape.channels, 24, 5, stride=2, padding=2), nn.GELU(), Block(24), nn.AvgPool2d(2)),
            *(nn.Conv2d(24, 48, 3, padding=1), nn.GELU(), nn.AvgPool2d(2, ceil_mode=True)),
            *(nn.Flatten(), nn.Linear(48 * map_size, FEATURES), nn.GELU()),
        )


UNSEEN: dict[str, Callable[..., Classifier]] = {
    "another seed": Classifier,
    "wider": partial(Classifier, width=32),
    "another seed of the deep one": partial(Classifier, deep=True),
    "no convolutions": Flat,
    "residual": Residual,
}


def extractors(run: RunFiles, data: Data) -> dict[str, FeatureExtractor]:
    result = {f"the run's {name} extractor": extractor for name, extractor in load_extractors(run).items()}
    for seed, (name, make) in enumerate(UNSEEN.items(), start=1_000):
        torch.manual_seed(seed)
        result[name] = fit(make(data.shape, data.classes), data.train)
    return result


def drawn(fitted: FittedModel, seed: int = 77) -> Tensor:
    return fitted.draw(fitted.prior.sample(SAMPLES, torch.Generator().manual_seed(seed)))


def main() -> None:
    options = parser(__doc__, MNIST)
    options.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    options.add_argument("--classic-epochs", type=int, default=59)
    arguments = options.parse_args()
    runs = [RunFiles(path) for path in arguments.runs]
    workspace = open_workspace(runs[0], arguments.data_dir)
    spec, data = workspace.spec, workspace.data
    test = sources.load_test(spec.data)

    baseline = Checkpoints(runs[0]).baseline()
    pictures = {"classic": drawn(baseline)}
    epochs = arguments.classic_epochs
    longer = trained(spec.baseline, data.train.images, epochs, seed=spec.seed, trial=BASELINE)
    pictures["classic, as long"] = drawn(replace(baseline, model=longer))
    for run in runs:
        export, tested = codec.load(run.export), run.summary().test
        assert tested
        pictures[run.name] = drawn(export.fitted)
        prior = export.fitted.prior
        components, latents = prior.means.shape
        free = components * (1 + latents + latents * (latents + 1) // 2)  # a covariance is symmetric
        if prior.flow is not None:
            free += sum(weight.numel() for weight in prior.flow.parameters())
        count = {"weights": export.info["weights"], "free numbers of the prior": free}
        scores = {name: export.info["test"][name] for name in SHOWN}
        say(
            {
                "run": run.name,
                **count,
                "prior": export.fitted.parameters.prior,
                "floor": tested.real.frechet_distance,
                **scores,
            }
        )
    classic = sum(weight.numel() for weight in baseline.model.parameters())
    say({"classic weights": classic})

    for name, extractor in extractors(runs[0], data).items():
        scorer = Scorer(extractor, data.train, test, seed=88, count=SAMPLES)
        distances = {who: scorer.distance(images) for who, images in pictures.items()}
        line: dict[str, Any] = {"extractor": name}
        if isinstance(extractor, Classifier):
            line["right"] = extractor.accuracy(test)
        line |= {"floor": scorer.floor} | {who: distances[who] for who in ("classic", "classic, as long")}
        ours = [distances[run.name] for run in runs]
        for key, values in {
            "distance": ours,
            "over the floor": [value / scorer.floor for value in ours],
            "gap closed": [gap_closed(value, scorer.floor, distances["classic"]) for value in ours],
            "gap closed, as long": [gap_closed(value, scorer.floor, distances["classic, as long"]) for value in ours],
        }.items():
            line[key] = statistics.mean(values)
            line[f"{key}, spread"] = max(values) - min(values)
        say(line)


if __name__ == "__main__":
    main()
