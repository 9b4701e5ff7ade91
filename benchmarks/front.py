"""Is the front of a search with two objectives as good as a sweep of kl_weight at the default learning rate?

    python -m benchmarks.front RUN [--data-dir data]

The sweep: the classic network of 16 latents at the run's epochs and batch size, learning rate 1e-3, nine kl_weights.
For each of its points: the lowest distortion among the search's trials of no higher rate, and how much lower it is; and
the same where two trials may share the images between them, so that rate and distortion are averages of theirs.
"""

from itertools import product
from pathlib import Path

from benchmarks.setting import MNIST, parser, say, trained
from tuner.run import RunFiles
from tuner.scoring import Evaluator
from tuner.study import read_study, table
from tuner.workspace import open_workspace

WEIGHTS = (0.01, 0.03, 0.1, 0.3, 0.5, 1, 2, 4, 10)


def lowest(found: list[tuple[float, float]], rate: float) -> dict[str, float | None]:
    """The lowest distortion at no more than a `rate`, of one of the (rate, distortion) found and of two that share."""
    low = [point for point in found if point[0] <= rate]
    high = [point for point in found if point[0] > rate]
    alone = [distortion for _, distortion in low]
    shared = [a[1] + (rate - a[0]) / (b[0] - a[0]) * (b[1] - a[1]) for a, b in product(low, high)]
    return {"front": min(alone, default=None), "shared": min(alone + shared, default=None)}


def main() -> None:
    options = parser(__doc__, MNIST)
    options.add_argument("run", type=Path, metavar="RUN")
    arguments = options.parse_args()
    run = RunFiles(arguments.run)
    workspace = open_workspace(run, arguments.data_dir)
    spec, data = workspace.spec, workspace.data
    evaluate = Evaluator(spec, data, lambda: workspace.extractors["search"])
    study = read_study(run.journal)
    rows = table(study, spec) if study else []
    found = [(row["rate"], row["distortion"]) for row in rows if "rate" in row]
    better = {"front": 0, "shared": 0}
    for number, weight in enumerate(WEIGHTS):
        parameters = spec.baseline.model_copy(update={"kl_weight": weight})
        model = trained(parameters, data.train.images, spec.budget.max_epochs, seed=spec.seed, trial=number)
        scores = evaluate(model, parameters, spec.budget.max_epochs).scores
        best = lowest(found, scores["rate"])
        for kind, distortion in best.items():
            better[kind] += distortion is not None and distortion <= scores["distortion"]
        say({"kl_weight": weight, "rate": scores["rate"], "distortion": scores["distortion"], **best}, 2)
    for kind, count in better.items():
        print(f"{kind}: as good or better at {count} of {len(WEIGHTS)} points")


if __name__ == "__main__":
    main()
