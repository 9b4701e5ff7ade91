"""Trials per minute on 1, 2, 4 and 8 workers, with a trial that sleeps instead of computing.

    python -m benchmarks.scaling [--seconds 5] [--rounds 6]

Ideal is one trial every `seconds` on each worker. Counted for each worker is the time from the end of its first trial
to the end of its last, so that neither the start of processes nor the last trials' wait for each other is in it.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
from ray import cloudpickle, tune

from tuner.cluster import cluster
from tuner.spec import Resources, Spec
from tuner.study import open_study
from tuner.trials import run_trials

SPACE = {"learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}


class Sleeper(tune.Trainable):  # type: ignore[misc]
    """One evaluation that takes its time and no core."""

    def setup(self, config: dict[str, Any], seconds: float = 1.0) -> None:
        self.seconds = seconds
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.value = new_config["parameters"]["learning_rate"]
        return True

    def step(self) -> dict[str, Any]:
        time.sleep(self.seconds)
        return {
            "rung": 1,
            "epoch": 1.0,
            "outcome": "complete",
            "done": True,
            "seconds_train": self.seconds,
            "seconds_score": 0.0,
            "frechet_distance": self.value,
            "frechet_distance_standard_normal": 1.0,
        }


def measure(workers: int, seconds: float, rounds: int) -> dict[str, float]:
    budget = {"trials": workers * rounds, "max_epochs": 1, "grace_epochs": 1}
    spec = Spec.model_validate({"space": SPACE, "budget": budget})
    with tempfile.TemporaryDirectory() as folder, cluster(None, workers, Resources()):
        study = open_study(Path(folder) / "study.journal", spec)
        trainable = tune.with_parameters(Sleeper, seconds=seconds)
        run_trials(study, spec, trainable, Path(folder) / "ray", workers, [])
        done = [
            (trial.datetime_complete.timestamp(), trial.user_attrs["worker"])
            for trial in study.trials
            if trial.datetime_complete and trial.state == optuna.trial.TrialState.COMPLETE
        ]
    ends: dict[str, list[float]] = {}
    for time_of_end, worker in sorted(done):
        ends.setdefault(worker, []).append(time_of_end)
    rate = sum(60 * (len(times) - 1) / (times[-1] - times[0]) for times in ends.values() if len(times) > 1)
    ideal = 60 * workers / seconds
    return {"workers": len(ends), "trials": len(done), "per_minute": round(rate, 2), "share_of_ideal": rate / ideal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long a trial sleeps")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=6, help="trials a worker")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: a worker's rate takes two trials at least")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    for workers in arguments.workers:
        result = measure(workers, arguments.seconds, arguments.rounds)
        print(json.dumps(result), flush=True)
    print(f"ratio {result['share_of_ideal']:.2f}")


if __name__ == "__main__":
    main()
