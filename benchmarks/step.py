"""One training step on one core: ours, both of them, against the tutorial loop, end to end with evaluation.

    python -m benchmarks.step [--data-dir data] [--quick]

The tutorial loop is what the MNIST tutorials show: torchvision's ToTensor, a DataLoader, the plain network, Adam, the
loss on held-out images after each epoch. Ours is the trial's: the training generator, then the prior fitted and every
score; with the written-out step and with the autograd step that trains any other model, in float32 and in bfloat16.
Same network, batch, images, one thread, two epochs: denormal numbers only come up in the second. Each runs in a process
of its own, turn by turn; all but one under the settings of `tuner/vae/process.py`, the tutorial loop also without.
Without --data-dir the embedded digits are repeated to MNIST's number.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.setting import Pictures, command_of, load_data, plain, repeated, tutorial_loss
from tuner.vae.data import Data
from tuner.vae.extractor import Classifier
from tuner.vae.fitted import Fitter
from tuner.vae.model import Builder
from tuner.vae.parameters import Parameters
from tuner.vae.process import settle
from tuner.vae.score import Scorer
from tuner.vae.shape import ImageShape
from tuner.vae.step import AutogradStep, State, StepMaker, WrittenOutStep
from tuner.vae.train import train

build = Builder(ImageShape(1, 28, 28))

BATCH = 128
MFLOP = 14.2  # a training image, forward and backward; a multiplication and an addition are two
EPOCHS = 2
STEPS: dict[str, StepMaker] = {"autograd step": AutogradStep, "written-out step": WrittenOutStep}
OURS = {
    f"{name}, {precision}": (step, precision) for precision in ("float32", "bfloat16") for name, step in STEPS.items()
}
VARIANTS = ("tutorial", "tutorial, settled", *OURS)


def tutorial(data: Data) -> tuple[float, float]:
    """Seconds of training and of evaluation."""
    model = plain(16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    training = DataLoader(Pictures(data.train), batch_size=BATCH, shuffle=True)
    held_out = DataLoader(Pictures(data.validation), batch_size=BATCH)

    seconds = [0.0, 0.0]
    total = 0.0
    for _ in range(EPOCHS):
        started = time.perf_counter()
        model.train()
        for images, _ in training:
            optimizer.zero_grad()
            loss = tutorial_loss(model, images)
            loss.backward()
            total += loss.item()
            optimizer.step()
        trained = time.perf_counter()
        model.eval()
        with torch.no_grad():
            for images, _ in held_out:
                total += tutorial_loss(model, images).item()
        seconds[0] += trained - started
        seconds[1] += time.perf_counter() - trained
    return seconds[0], seconds[1]


def ours(data: Data, step: StepMaker, precision: str) -> tuple[float, float]:
    """Seconds of training and of evaluation; the extractor is untrained, which takes the same time."""
    count = len(data.train)
    extractor = Classifier(data.shape, 10).eval().requires_grad_(False)
    scorer = Scorer(extractor, data.train, data.validation, seed=0, count=count // 20)
    fitter = Fitter(data.train, seed=0, count=count // 10, samples=count // 20)
    wanted: dict[str, Any] = {
        "latent_dim": 16,
        "batch_size": BATCH,
        "prior": "gaussian_mixture",
        "precision": precision,
    }
    parameters = Parameters(**wanted)
    state = State.fresh(build, parameters, 0, 0)
    seconds = [0.0, 0.0]
    images, epochs = data.train.images, range(1, EPOCHS + 1)
    rules = {"seed": 0, "trial": 0, "total_epochs": EPOCHS}
    for record in train(state, parameters, images, epochs, make_step=step, **rules):
        started = time.perf_counter()
        scorer(fitter(state.model, parameters))
        seconds[0] += record.seconds
        seconds[1] += time.perf_counter() - started
    return seconds[0], seconds[1]


def matrix_product() -> float:
    """GFLOP/s of this core in a product of 1,024 x 1,024 matrices."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    a @ b
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * 1024**3 / statistics.median(seconds) / 1e9


def measure(variant: str, directory: Path | None, images: int) -> None:
    """Train and evaluate as `variant` does, after a short time that warms up."""
    torch.set_num_threads(1)
    if variant != "tutorial":
        settle()
    torch.manual_seed(0)
    run = tutorial
    if variant in OURS:
        step, precision = OURS[variant]
        run = partial(ours, step=step, precision=precision)
    data = load_data(directory)
    run(repeated(data, 10 * BATCH))
    training, evaluation = run(repeated(data, images))
    rate = EPOCHS * images / training
    result = {
        "variant": variant,
        "images_per_second": round(EPOCHS * images / (training + evaluation)),
        "training_alone": round(rate),
        "share_of_float32_product": round(rate * MFLOP / 1e3 / matrix_product(), 3),
    }
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="where MNIST lies")
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    parser.add_argument("--variant", choices=VARIANTS, help="measure one, in this process")
    arguments = parser.parse_args()
    images, rounds = (5_000, 2) if arguments.quick else (50_000, 3)
    if arguments.variant:
        measure(arguments.variant, arguments.data_dir, images)
        return
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            command = command_of("benchmarks.step", *sys.argv[1:], "--variant", variant)
            line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(line, end="", flush=True)
            found[variant].append(json.loads(line)["images_per_second"])
    tutorial_rate = statistics.median(found["tutorial"])
    for variant in VARIANTS[1:]:
        print(f"{variant}: {statistics.median(found[variant]) / tutorial_rate:.2f} times the tutorial loop")


if __name__ == "__main__":
    main()
