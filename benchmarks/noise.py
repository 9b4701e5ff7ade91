"""How much of a trial's score is luck: the spread over seeds of its samples, and over starts of its fitted prior.

    python benchmarks/noise.py RUN [--data-dir data] [--seeds 8]

For the promoted trial of a finished run: mean and standard deviation of the distance of as many samples as the search
draws, independent and drawn evenly; and, with 20,000 samples, the distance under mixtures fitted from other starts.
"""

import argparse
import json
import statistics
from pathlib import Path

from tuner.run import RunFiles
from tuner.trainable import SEARCH_PRIOR_IMAGES, SEARCH_SAMPLES
from tuner.vae.process import settle
from tuner.vae.score import Scorer
from tuner.workspace import best_of, open_workspace

MANY = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    settle()
    run = RunFiles(arguments.run)
    workspace = open_workspace(run, arguments.data_dir)
    extractor, data = workspace.extractors["search"], workspace.data
    candidate = best_of(run, run.summary()["best"]["trial"])
    model, parameters = candidate.model, candidate.parameters
    independent: list[float] = []
    even: list[float] = []
    fitted: list[float] = []
    for seed in range(arguments.seeds):
        for distances, evenly in ((independent, False), (even, True)):
            options = {"count": SEARCH_SAMPLES, "prior_count": SEARCH_PRIOR_IMAGES, "evenly": evenly}
            scorer = Scorer(extractor, data.train, data.validation, seed=seed, **options)  # type: ignore[arg-type]
            distances.append(scorer.distance(scorer.samples(model, candidate.prior, SEARCH_SAMPLES)))
        prior = scorer.fit(model, parameters)
        fitted.append(scorer.distance(scorer.samples(model, prior, MANY)))
    for name, distances in (
        (f"{SEARCH_SAMPLES} independent samples", independent),
        (f"{SEARCH_SAMPLES} drawn evenly", even),
        (f"{MANY} drawn evenly, the prior fitted anew", fitted),
    ):
        mean, deviation = statistics.mean(distances), statistics.stdev(distances)
        print(json.dumps({"distance of": name, "mean": round(mean, 3), "deviation": round(deviation, 3)}), flush=True)
    print(f"ratio {statistics.stdev(independent) / statistics.stdev(even):.2f}")


if __name__ == "__main__":
    main()
