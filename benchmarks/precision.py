"""Does bfloat16 come to the same end as float32? One point of the shipped spec in both, several seeds.

    python -m benchmarks.precision [--data-dir data] [--seeds 5] [--epochs 5]

A line a training: the Frechet distance of samples on validation under the search's classifier, seconds of training;
then the means of both precisions with their standard errors, and how many times the images float32 trains.
"""

import math
import statistics
import time

from benchmarks.setting import load_spec, parser, say, trained
from tuner.extractors import make_extractor
from tuner.scoring import Evaluator
from tuner.vae.process import settle


def main() -> None:
    arguments = parser(__doc__, None)
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--epochs", type=float, default=5)
    given = arguments.parse_args()
    settle()
    spec, data = load_spec(given.data_dir)
    extractor = make_extractor("search", spec.seed, data)
    evaluate = Evaluator(spec, data, lambda: extractor)
    found: dict[str, list[tuple[float, float]]] = {"float32": [], "bfloat16": []}
    for seed in range(given.seeds):
        for precision, figures in found.items():
            parameters = spec.with_fixed("precision", precision).parameters(spec.points_to_evaluate[0])
            started = time.perf_counter()
            model = trained(parameters, data.train.images, given.epochs, seed=seed, trial=1)
            seconds = time.perf_counter() - started
            distance = evaluate(model, parameters, given.epochs).scores["frechet_distance"]
            figures.append((distance, seconds))
            say({"seed": seed, "precision": precision, "frechet_distance": distance, "seconds": seconds})
    for precision, figures in found.items():
        distances = [distance for distance, _ in figures]
        error = statistics.stdev(distances) / math.sqrt(len(distances))
        say({"precision": precision, "mean": statistics.mean(distances), "standard_error": error})
    ratios = [slow / fast for (_, slow), (_, fast) in zip(found["float32"], found["bfloat16"], strict=True)]
    say({"float32_seconds_to_bfloat16": statistics.median(ratios)})


if __name__ == "__main__":
    main()
