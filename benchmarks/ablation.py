"""What pays on MNIST, one change at a time: the same seed, order and noise, nine epochs, scored on validation.

    python benchmarks/ablation.py [--data-dir data] [--epochs 9]

The point that the spec tries last of those it is told, with the prior that it is retrained for, and then each change
alone. Distances are those of 10,000 samples, drawn evenly, under the extractor that a search with seed 0 trains;
`reconstruction` has the prior left out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tuner import spec as specs
from tuner.vae import data as datasets
from tuner.vae.data import Data
from tuner.vae.extractor import train_extractor
from tuner.vae.parameters import Parameters
from tuner.vae.process import settle
from tuner.vae.score import Scorer
from tuner.vae.train import State, Stream, derive_seed, train
from tuner.workspace import EXTRACTORS, FINAL_PRIOR_IMAGES, FINAL_SAMPLES

SPEC = Path(__file__).parents[1] / "search_spaces" / "mnist.yaml"
AFTER_TRAINING = {"prior", "prior_components", "contrast"}
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"contrast": "plain"},
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
SHOWN = ("frechet_distance", "frechet_distance_reconstruction", "frechet_distance_standard_normal", "sharpness", "mse")


def begin(data_dir: Path) -> tuple[Parameters, Data, Scorer]:
    """Settle, print floor and base -> base, data, and a scorer as the retrain's under a search's extractors."""
    settle()
    spec = specs.load(SPEC)
    data = datasets.load("mnist", data_dir, download=False)
    extractor, guide = (
        train_extractor(data, derive_seed(0, Stream.EXTRACTOR, number), *shape)
        for number, shape in enumerate(EXTRACTORS.values())
    )
    counts = {"count": FINAL_SAMPLES, "prior_count": FINAL_PRIOR_IMAGES}
    scorer = Scorer(extractor, data.train, data.validation, seed=5, quasi_random=True, guide=guide, **counts)
    print(json.dumps({"floor": round(scorer.floor, 3)}), flush=True)
    base = spec.parameters(spec.points_to_evaluate[-1] | spec.retrain.priors[-1].model_dump())
    print(json.dumps({"base": base.model_dump()}), flush=True)
    return base, data, scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--epochs", type=float, default=9)
    arguments = parser.parse_args()
    base, data, scorer = begin(arguments.data_dir)
    trained: dict[Parameters, State] = {}
    for change in CHANGES:
        parameters = base.model_copy(update=change)
        training = parameters.model_copy(update={name: getattr(base, name) for name in AFTER_TRAINING})
        if training not in trained:
            state, epochs = State.fresh(training, 0, 1), arguments.epochs
            list(train(state, training, data.train.images, [epochs], seed=0, trial=1, total_epochs=epochs))
            trained[training] = state
        model = trained[training].model
        scores = scorer(model, parameters, scorer.fit(model, parameters))
        print(json.dumps({"change": change, **{name: round(scores[name], 4) for name in SHOWN}}), flush=True)


if __name__ == "__main__":
    main()
