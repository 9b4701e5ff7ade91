"""Does one space fit any images? The same search with the KL weight in its calibrated unit and in the absolute one.

    python -m benchmarks.kl_unit [--data-dir data] [--folder PHOTOS] [--trials 30] [--seed 0]

On MNIST, Fashion-MNIST and a folder of labelled images in colour, at 32x32, Optuna's TPE searches latents, learning
rate and KL weight, told nothing but to try a weight of 1 first. No trial is stopped: each is six epochs of 10,000
images, and the search's classifier scores it. Prints a line a trial, and for each data set and unit how many trials it
took to come within 5 % of the best of both.
"""

from pathlib import Path

import optuna

from benchmarks.setting import MNIST, parser, say, trained
from tuner import sources
from tuner.extractors import make_extractor
from tuner.scoring import Evaluator
from tuner.spec import Spec
from tuner.study import distributions
from tuner.vae.data import Data, Split
from tuner.vae.process import settle

IMAGES, EPOCHS, NEAR = 10_000, 6, 1.05
RANGES = {"calibrated": (0.1, 10.0), "absolute": (0.001, 3.0)}


def space(data: dict[str, object], unit: str, seed: int) -> Spec:
    low, high = RANGES[unit]
    ranges = {"latent_dim": ("int", 8, 64), "learning_rate": ("float", 3e-4, 1e-2), "kl_weight": ("float", low, high)}
    return Spec.model_validate(
        {
            "data": data,
            "space": {
                name: {"type": kind, "low": least, "high": most, "log": True}
                for name, (kind, least, most) in ranges.items()
            },
            "fixed": {
                "kl_unit": unit,
                "width": 16,
                "batch_size": 64,
                "schedule": "cosine",
                "prior": "gaussian_mixture",
                "prior_components": 20,
            },
            "seed": seed,
        }
    )


def search(name: str, spec: Spec, data: Data, trials: int) -> list[float]:
    """The distance of each trial in turn."""
    evaluate = Evaluator(spec, data, lambda: make_extractor("search", spec.seed, data))
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=spec.seed))
    study.enqueue_trial({"kl_weight": 1.0})
    found = []
    for number in range(trials):
        trial = study.ask(fixed_distributions=distributions(spec))
        parameters = spec.parameters(trial.params)
        model = trained(parameters, data.train.images, EPOCHS, seed=spec.seed, trial=number)
        distance = evaluate(model, parameters, EPOCHS).scores["frechet_distance"]
        study.tell(trial, distance)
        found.append(distance)
        say({"data": name, "unit": parameters.kl_unit, "trial": number, **trial.params, "distance": distance})
    return found


def main() -> None:
    options = parser(__doc__, MNIST)
    options.add_argument("--folder", type=Path, help="a folder or .zip of labelled images")
    options.add_argument("--trials", type=int, default=30)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    settle()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    where = {"directory": str(arguments.data_dir), "download": False}
    sets: dict[str, dict[str, object]] = {name: {"name": name, **where} for name in ("mnist", "fashion_mnist")}
    if arguments.folder:
        sets["folder"] = {"name": "folder", "directory": str(arguments.folder), "size": 32}
    for name, described in sets.items():
        whole = sources.load(space(described, "absolute", arguments.seed).data)
        labels = whole.train.labels
        train = Split(whole.train.images[:IMAGES], labels if labels is None else labels[:IMAGES])
        data = Data(train, whole.validation)
        found = {unit: search(name, space(described, unit, arguments.seed), data, arguments.trials) for unit in RANGES}
        best = min(map(min, found.values()))
        for unit, distances in found.items():
            near = [number for number, distance in enumerate(distances, 1) if distance <= NEAR * best]
            say({"data": name, "unit": unit, "best": min(distances), "first": distances[0], "trials": near[:1] or None})


if __name__ == "__main__":
    main()
