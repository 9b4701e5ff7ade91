"""What it costs the search that TPE looks at a part of the trials alone: the same search with all of them.

    python -m benchmarks.bounded [--trials 1500] [--workers 16] [--seeds 6] [--first 0]

Trials answer from the formula of benchmarks.driver without its noise, and end in a random order. A line is one search:
the best distance found (the formula's least is 3), the median of the latest hundred, and the seconds of the core.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.driver import BUDGET, SPACE, distance
from tuner.searcher import Point, Points, StudySearcher
from tuner.spec import Spec
from tuner.study import open_study


class Whole(Points):
    """All trials."""

    def __call__(self) -> list[Point]:
        return [point for _, point in sorted((self.running | self.ended).items())]

    def _forget(self) -> None:
        pass


def search(points: type[Points], trials: int, workers: int, seed: int) -> dict[str, float]:
    budget = BUDGET | {"trials": trials, "max_epochs": 1}
    spec = Spec.model_validate({"space": SPACE, "budget": budget, "seed": seed})
    found: list[float] = []
    live: list[tuple[str, dict[str, Any]]] = []
    order, started = random.Random(seed), time.thread_time()
    with tempfile.TemporaryDirectory() as folder:
        study = open_study(Path(folder) / "study.journal", spec)
        searcher = StudySearcher(study, spec)
        searcher.points = points(study, spec)
        while len(found) < trials:
            while len(live) < workers and searcher.remaining:
                name = str(len(found) + len(live))
                proposed = searcher.suggest(name)
                assert isinstance(proposed, dict)
                live.append((name, proposed["parameters"]))
            name, parameters = live.pop(order.randrange(len(live)))
            value = distance(parameters, 1, 1)
            scores = {"frechet_distance": value, "frechet_distance_standard_normal": 2 * value}
            result: dict[str, Any] = {"epoch": 1.0, "rung": 1, "seconds_train": 0.0, "seconds_score": 0.0}
            result |= {"timestamp": 0, "hostname": "here", "pid": 0, "outcome": "complete", "done": True}
            searcher.on_trial_complete(name, result | scores)
            found.append(value)
    checks = {f"best at {count}": min(found[:count]) for count in (300, 600, 1000, 1500, 2000) if count <= trials}
    return checks | {"median of the last 100": float(np.median(found[-100:])), "seconds": time.thread_time() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=16, help="trials at once")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        for points in (Points, Whole):
            found = search(points, arguments.trials, arguments.workers, seed)
            shown = {name: round(value, 3) for name, value in found.items()}
            said = {"seed": seed, "workers": arguments.workers, "looks at": points.__name__.lower()}
            print(json.dumps(said | shown), flush=True)


if __name__ == "__main__":
    main()
