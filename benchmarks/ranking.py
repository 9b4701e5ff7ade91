"""Does the order at a rung hold to the end? Random trials of a spec, none of them stopped, scored at every rung.

    python -m benchmarks.ranking [SPEC.yaml] [--data-dir data] [--trials 30]

Prints each trial's objective at each rung and, for each rung that may stop a trial, Spearman's rank correlation with
the objective at the end, over all trials and over the better half by the final score, where the order matters most.
"""

from pathlib import Path

import optuna
from scipy.stats import spearmanr

from benchmarks.setting import MNIST, models_at, parser, say
from tuner import sources
from tuner import spec as specs
from tuner.extractors import make_extractor
from tuner.scoring import Evaluator
from tuner.spec import DEFAULT
from tuner.study import distributions
from tuner.vae.process import settle


def main() -> None:
    options = parser(__doc__, MNIST)
    options.add_argument("spec", nargs="?", type=Path, default=DEFAULT)
    options.add_argument("--trials", type=int, default=30)
    arguments = options.parse_args()
    settle()
    spec = specs.load(arguments.spec).with_data_at(arguments.data_dir)
    data = sources.load(spec.data)
    evaluate = Evaluator(spec, data, lambda: make_extractor("search", spec.seed, data))
    objective, rungs = spec.objective[0], spec.budget.rungs
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=spec.seed))
    scores = []
    for number in range(arguments.trials):
        searched = study.ask(fixed_distributions=distributions(spec)).params
        parameters = spec.parameters(searched)
        line = []
        for epoch, model in models_at(parameters, data.train.images, rungs, seed=spec.seed, trial=number):
            line.append(round(objective.cost(evaluate(model, parameters, epoch).scores), 3))
        scores.append(line)
        say({"trial": number, **searched, "scores": line}, None)
    better = sorted(scores, key=lambda line: line[-1])[: len(scores) // 2]
    for index, epoch in enumerate(rungs[:-1]):
        everything, half = (
            spearmanr([line[index] for line in part], [line[-1] for line in part]).statistic
            for part in (scores, better)
        )
        print(f"epoch {epoch:g}: rank correlation {everything:.3f} over all, {half:.3f} over the better half")


if __name__ == "__main__":
    main()
