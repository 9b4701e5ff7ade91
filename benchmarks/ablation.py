"""What pays on MNIST, one change at a time: the same seed, order and noise, nine epochs, scored on validation.

    python -m benchmarks.ablation [--data-dir data] [--epochs 9]

The last of the points that the spec names, with the prior that it is retrained for, and then each change
alone. Distances are those of 10,000 samples, quasi-random, under the extractor that a search with seed 0 trains;
`reconstruction` has the prior left out.
"""

from typing import Any

from benchmarks.setting import MNIST, SHOWN, parser, say, shipped_point, trained
from tuner.vae.model import Model
from tuner.vae.parameters import Parameters

AFTER_TRAINING = {"prior", "prior_components", "temperature"}
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": "one"},
    {"prior_components": 10},
    {"prior_components": 50},
    {"prior": "gaussian_mixture"},
    {"prior": "flow", "prior_components": 40},
    {"prior": "standard_normal"},
    {"schedule": "constant"},
    {"warmup_steps": 0},
    {"learning_rate": 0.001},
    {"latent_dim": 16},
    {"latent_dim": 24},
    {"kl_weight": 0.3},
    {"kl_weight": 0.01},
    {"kl_warmup_epochs": 2.0},
    {"batch_size": 128},
    {"width": 32},
    {"likelihood": "bernoulli", "kl_weight": 0.3},
)


def main() -> None:
    options = parser(__doc__, MNIST)
    options.add_argument("--epochs", type=float, default=9)
    arguments = options.parse_args()
    base, data, fitter, scorer = shipped_point(arguments.data_dir)
    models: dict[Parameters, Model] = {}
    for change in CHANGES:
        parameters = base.model_copy(update=change)
        training = parameters.model_copy(update={name: getattr(base, name) for name in AFTER_TRAINING})
        if training not in models:
            models[training] = trained(training, data.train.images, arguments.epochs, seed=0, trial=1)
        scores = scorer(fitter(models[training], parameters))
        say({"change": change, **{name: scores[name] for name in SHOWN}})


if __name__ == "__main__":
    main()
