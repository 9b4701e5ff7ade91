"""Keep the evidence of a finished run.

    python -m benchmarks.receipt RUN LOG benchmarks/results/DATE-NAME [--export]

Copies spec, trials.csv, summary.json, the export's config.json, and the log of the command (its first line is the
command) without its lines of progress. Adds the commit, hardware and versions, and a picture of the classic settings'
samples beside the run's, at the same noise. With --export what it takes to score the export again
(`tuner.vae.codec.load`), 1 to 3 MB, and its pictures.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tuner import spec as specs
from tuner.run import RunFiles
from tuner.vae.image_grid import grid, png, samples
from tuner.workspace import Checkpoints

SHOWN, COLUMNS, MARGIN = 80, 10, 24  # images and images a row on either side, pixels between the sides
EXPORTED = ("README.md", "model.safetensors", "prior.safetensors", "samples.png", "neighbours.png")
PROGRESS = re.compile(r"([a-z]+) +(\d+h)?(\d+m)?(\d+s)?  ")  # a stage, its time so far, two spaces
PACKAGES = ("torch", "torchvision", "ray", "optuna", "numpy", "scikit-learn", "onnxruntime")


def keep(run: RunFiles, log: Path, destination: Path, export: bool) -> None:
    destination.mkdir(parents=True)
    for path in (run.spec, run.trials, run.summary_file):
        shutil.copy(path, destination)
    (destination / "export").mkdir()
    for name in ("config.json", *(EXPORTED if export else ())):
        shutil.copy(run.export / name, destination / "export")
    (destination / "log.txt").write_text(without_progress(log.read_text()))
    environment = {
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    (destination / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    (destination / "same_noise.png").write_bytes(png(side_by_side(run)))


def without_progress(log: str) -> str:
    """Of a stage's consecutive lines only the last, which says how it ended."""
    kept: list[str] = []
    stage = None
    for line in log.splitlines(keepends=True):
        found = PROGRESS.match(line)
        if found and found[1] == stage:
            kept.pop()
        stage = found and found[1]
        kept.append(line)
    return "".join(kept)


def side_by_side(run: RunFiles) -> np.ndarray:
    """The classic settings from N(0, I) on the left, what the run exported on the right: (H, W) or (H, W, 3) uint8."""
    summary, ink = run.summary(), specs.load(run.spec).data.ink
    assert summary.best
    ours = Checkpoints(run).best(run.kept if summary.retrain else run.checkpoint(summary.best.trial))
    pictures = [grid(samples(fitted, SHOWN), COLUMNS, ink) for fitted in (Checkpoints(run).baseline(), ours)]
    gap = np.full((len(pictures[0]), MARGIN, *pictures[0].shape[2:]), 255, np.uint8)
    return np.concatenate([pictures[0], gap, pictures[1]], axis=1)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("log", type=Path, metavar="LOG")
    parser.add_argument("destination", type=Path, metavar="DEST")
    parser.add_argument("--export", action="store_true", help="keep weights, prior and pictures of the export too")
    arguments = parser.parse_args()
    keep(RunFiles(arguments.run), arguments.log, arguments.destination, arguments.export)


if __name__ == "__main__":
    main()
