"""A search whose objective is known in closed form: distance from an optimum, without any training."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from tuner.spec import Spec
from tuner.study import Study, open_study

SPACE = {
    "latent_dim": {"type": "int", "low": 4, "high": 32, "log": True},
    "learning_rate": {"type": "float", "low": 3e-4, "high": 1e-2, "log": True},
    "kl_weight": {"type": "float", "low": 1e-2, "high": 3, "log": True},
}
OPTIMUM = {"latent_dim": 8, "learning_rate": 3e-3, "kl_weight": 0.05}  # far from the classic settings
ONE_RUNG = {"trials": 40, "max_epochs": 1, "grace_epochs": 1}
THREE_RUNGS = {"trials": 8, "max_epochs": 4, "grace_epochs": 1, "reduction_factor": 2}


def spec_with(**parts: Any) -> Spec:
    return Spec.model_validate({"space": SPACE, "budget": ONE_RUNG} | parts)


def study_in(directory: Path, spec: Spec) -> Study:
    return open_study(directory / "study.journal", spec)


def bowl(parameters: dict[str, Any]) -> float:
    """Squared distance from the optimum in log space."""
    return sum(math.log(parameters[name] / best) ** 2 for name, best in OPTIMUM.items())


def evaluation(value: float, rung: int = 1, last: bool = True) -> dict[str, Any]:
    """What a trial reports at a rung, with what Ray adds to it."""
    return {
        "hostname": "here",
        "pid": 1,
        "timestamp": 0,
        "rung": rung,
        "epoch": float(2 ** (rung - 1)),
        "outcome": "complete" if last else "running",
        "done": last,
        "seconds_train": 0.0,
        "seconds_score": 0.0,
        "frechet_distance": value,
        "frechet_distance_standard_normal": 10.0,
    }


def random_search(draws: int, repetitions: int) -> float:
    """Median over repetitions of the bowl's best value among uniform draws from the space."""
    random = np.random.default_rng(0)
    total = np.zeros((repetitions, draws))
    for name, best in OPTIMUM.items():
        low, high = SPACE[name]["low"], SPACE[name]["high"]
        whole = SPACE[name]["type"] == "int"
        if whole:
            low, high = low - 0.5, high + 0.5  # whole numbers are the rounded reals
        values = np.exp(random.uniform(math.log(low), math.log(high), total.shape))
        total += np.log((values.round() if whole else values) / best) ** 2
    return float(np.median(total.min(axis=1)))
