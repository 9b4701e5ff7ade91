"""What the driver itself costs per trial and per reported result, as the study grows to 1,000 trials.

    python benchmarks/driver_cost.py [--trials 1000] [--results 3]

The real searcher, stopping rule, journal, trials.csv, checkpoints and TensorBoard files; what is left out is Ray and
the training: reports are made up, with a checkpoint and pictures of the real sizes.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tuner.run import RunFiles
from tuner.searcher import StudySearcher, SuccessiveHalving
from tuner.spec import Spec
from tuner.study import open_study
from tuner.tensorboard import TensorBoard
from tuner.terminal import Progress
from tuner.trials import Driver
from tuner.vae.score import METRICS

SPACE = {
    "latent_dim": {"type": "int", "low": 4, "high": 64, "log": True},
    "learning_rate": {"type": "float", "low": 3e-4, "high": 1e-2, "log": True},
    "kl_weight": {"type": "float", "low": 0.01, "high": 3, "log": True},
}
CHECKPOINT = 5_500_000  # bytes: weights, Adam's moments, the best evaluation
PICTURE = (258, 258)


class Extractord:
    """In place of the extractors: there are none, the floor is given."""

    kept: tuple[()] = ()

    def begin(self, name: str) -> None:
        pass


def report(random: np.random.Generator, number: int, rung: int, last: bool) -> dict[str, Any]:
    scores = {name: float(random.uniform(1, 100)) for name in METRICS}
    return scores | {
        "trial": number,
        "rung": rung,
        "epoch": float(3 ** (rung - 1)),
        "images_per_second": 3000.0,
        "seconds_train": 1.0,
        "seconds_score": 0.1,
        "hostname": "here",
        "pid": number % 8,
        "timestamp": 0,
        "outcome": "complete" if last else "running",
        "done": last,
        "checkpoint": bytes(CHECKPOINT),
        "image_grids": {"samples": np.zeros(PICTURE, np.uint8), "reconstructions": np.zeros(PICTURE, np.uint8)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--results", type=int, default=3, help="evaluations a trial")
    arguments = parser.parse_args()
    budget = {"trials": arguments.trials, "max_epochs": 3 ** (arguments.results - 1), "grace_epochs": 1}
    spec = Spec.model_validate({"space": SPACE, "budget": budget})
    random = np.random.default_rng(0)
    spent: dict[str, list[float]] = defaultdict(list)

    def timed(what: str, work: Any, *parts: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = work(*parts, **named)
        spent[what].append(time.perf_counter() - started)
        return result

    with tempfile.TemporaryDirectory() as folder, Progress("search") as progress:
        run = RunFiles(Path(folder))
        study = open_study(run.journal, spec)
        searcher, rule = StudySearcher(study, spec), SuccessiveHalving(study, spec)
        board = TensorBoard(run.tensorboard, spec)
        board.start_search()
        driver = Driver(run, spec, study, Extractord(), progress, board)  # type: ignore[arg-type]
        driver.floor = 1.0
        for number in range(arguments.trials):
            config = timed("propose", searcher.suggest, str(number))
            trial = SimpleNamespace(config=config, trial_id=str(number))
            timed("start", driver.on_trial_start, 0, [], trial)
            for rung in range(1, arguments.results + 1):
                result = report(random, number, rung, rung == arguments.results)
                if not result["done"]:
                    timed("decide", rule.on_trial_result, None, trial, result)
                    timed("tell", searcher.on_trial_result, str(number), result)
                else:
                    timed("end", searcher.on_trial_complete, str(number), result=result)
                timed("keep", driver.on_trial_result, 0, [], trial, result)
                timed("step", driver.on_step_end, 0, [])
            timed("table", driver.on_trial_complete, 0, [], trial)
            if number + 1 in (10, 50, 100, 200, 500, 1000) or number + 1 == arguments.trials:
                recent = {what: 1000 * float(np.median(times[-30:])) for what, times in spent.items()}
                per_result = recent["decide"] + recent["tell"] + recent["keep"] + recent["step"]
                per_trial = recent["propose"] + recent["start"] + recent["end"] + recent["table"]
                line = {"trials": number + 1, "ms_a_result": per_result, "ms_a_trial": per_trial, **recent}
                print(json.dumps({key: round(value, 2) for key, value in line.items()}), flush=True)
        board.close()


if __name__ == "__main__":
    main()
