"""Keep the evidence of a finished run: `python benchmarks/receipt.py RUN LOG DEST`.

Copies spec, trials.csv, summary.json, what of the export it takes to score it again (`tuner.vae.codec.load`), the
pictures, the report without the library that draws its figures, and the log of the command (its first line is the
command). Adds the commit, hardware and versions, and a picture of the classic settings' samples beside the run's, at
the same noise.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tuner.run import RunFiles
from tuner.study import BASELINE
from tuner.vae.image_grid import grid, png, samples
from tuner.workspace import best_of, last_of, retrained

SHOWN, COLUMNS, MARGIN = 80, 10, 24  # images and images a row on either side, pixels between the sides
EXPORTED = ("model.json", "weights.safetensors", "prior.npz", "samples.png", "neighbours.png")
PACKAGES = ("torch", "torchvision", "ray", "optuna", "numpy", "scikit-learn", "onnxruntime")


def keep(run: RunFiles, log: Path, destination: Path) -> None:
    destination.mkdir(parents=True)
    for path in (run.spec, run.trials, run.summary_file):
        shutil.copy(path, destination)
    (destination / "export").mkdir()
    for name in EXPORTED:
        shutil.copy(run.export / name, destination / "export")
    library = re.compile(r"<script>.*?</script>", re.DOTALL)
    (destination / "report.html").write_text(library.sub("", run.report.read_text(), count=1))
    shutil.copy(log, destination / "log.txt")
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


def side_by_side(run: RunFiles) -> np.ndarray:
    """The classic settings from N(0, I) on the left, what the run exported on the right: grey (H, W) uint8."""
    ours = retrained(run) if run.retrained.exists() else best_of(run, run.summary()["best"]["trial"])
    pictures = [grid(samples(who.model, who.prior, SHOWN), COLUMNS) for who in (last_of(run, BASELINE), ours)]
    gap = np.full((pictures[0].shape[0], MARGIN), 255, np.uint8)
    return np.concatenate([pictures[0], gap, pictures[1]], axis=1)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    keep(RunFiles(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))
