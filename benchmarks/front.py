"""Is the front of a search with two objectives as good as a sweep of kl_weight at the default learning rate?

    python benchmarks/front.py RUN [--data-dir data]

The sweep: the classic network of 16 latents at the run's epochs and batch size, learning rate 1e-3, nine kl_weights.
For each of its points: the lowest distortion among the search's trials of no higher rate, and how much lower it is.
"""

import argparse
import json
from pathlib import Path

from tuner.run import Run
from tuner.trainable import search_scorer
from tuner.vae.process import settle
from tuner.vae.train import State, train
from tuner.workspace import open_workspace

WEIGHTS = (0.01, 0.03, 0.1, 0.3, 0.5, 1, 2, 4, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    settle()
    run = Run(arguments.run)
    workspace = open_workspace(run, arguments.data_dir)
    spec, data = workspace.spec, workspace.data
    scorer = search_scorer(spec, data, workspace.judges["search"])
    found = [(row["rate"], row["distortion"]) for row in run.read_trials() if "rate" in row]
    better = 0
    for number, weight in enumerate(WEIGHTS):
        parameters = spec.baseline.model_copy(update={"kl_weight": weight})
        state, epochs = State.fresh(parameters, spec.seed, number), spec.budget.max_epochs
        images = data.train.images
        for _ in train(state, parameters, images, [epochs], seed=spec.seed, trial=number, total_epochs=epochs):
            scores = scorer(state.model, parameters, scorer.fit(state.model, parameters))
        front = min((distortion for rate, distortion in found if rate <= scores["rate"]), default=None)
        line = {"kl_weight": weight, "rate": round(scores["rate"], 2), "distortion": round(scores["distortion"], 2)}
        line |= {"front": front and round(front, 2), "lower by": front and round(scores["distortion"] - front, 2)}
        better += front is not None and front <= scores["distortion"]
        print(json.dumps(line), flush=True)
    print(f"as good or better at {better} of {len(WEIGHTS)} points")


if __name__ == "__main__":
    main()
