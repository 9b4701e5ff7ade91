"""The peers of `search.py`, each a command of its own, as their documentation shows them.

    python -m benchmarks.peers tune|optuna|syne_tune ours|tutorial FOLDER [--images mnist] [--data-dir data] [--seed 0]

Ray Tune as in its own MNIST example, a function trainable with OptunaSearch and ASHA; Optuna alone, two processes on
one journal, with its own pruner; Syne Tune's local back end with ASHA (`pip install syne-tune`). Each first trains the
extractor that it scores with, as ours does, and keeps the model of each epoch in FOLDER.
"""

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.setting import Pictures, load_data, models_at, parser, plain, spec_file, tutorial_loss
from tuner import spec as specs
from tuner.spec import Spec
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.data import Data
from tuner.vae.extractor import FeatureExtractor, train_classifier
from tuner.vae.fitted import Fitter
from tuner.vae.model import Model
from tuner.vae.parameters import Parameters
from tuner.vae.process import settle
from tuner.vae.score import Scorer
from tuner.vae.step import State

LOOPS = ("ours", "tutorial")
WORKERS = 2
ABSOLUTE = [  # nobody but us counts the weight in the images' own squared error
    ("fixed.kl_unit", "absolute"),
    ("space.kl_weight", {"type": "float", "low": 0.001, "high": 3, "log": True}),
    ("points_to_evaluate", []),
]

# The training loops: a model an epoch


def our_loop(parameters: Parameters, spec: Spec, data: Data, seed: int) -> Iterator[tuple[float, Model]]:
    settle()
    epochs = range(1, int(spec.budget.max_epochs) + 1)
    yield from models_at(parameters, data.train.images, epochs, seed=spec.seed, trial=seed)


def tutorial_loop(parameters: Parameters, spec: Spec, data: Data, seed: int) -> Iterator[tuple[float, Model]]:
    torch.manual_seed(seed)
    model = plain(parameters.latent_dim, parameters.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=parameters.learning_rate)
    loader = DataLoader(Pictures(data.train), batch_size=parameters.batch_size, shuffle=True)
    for epoch in range(1, int(spec.budget.max_epochs) + 1):
        model.train()
        for images, _ in loader:
            loss = tutorial_loss(model, images, parameters.kl_weight) / len(images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield float(epoch), model


def evaluations(
    loop: str, parameters: Parameters, spec: Spec, data: Data, extractor: FeatureExtractor, number: int, folder: Path
) -> Iterator[float]:
    """Train a trial, keep each epoch's model in `folder` and yield its Frechet distance."""
    torch.set_num_threads(1)
    fitter = Fitter(data.train, seed=spec.seed, count=5_000, samples=2_500)
    scorer = Scorer(extractor, data.train, data.validation, seed=spec.seed, count=2_500, quasi_random=True)
    for epoch, model in (our_loop if loop == "ours" else tutorial_loop)(parameters, spec, data, number):
        fitted = fitter(model, parameters, epoch)
        distance = scorer(fitted)["frechet_distance"]
        temporary = folder / f".{number}.tmp"
        temporary.write_bytes(Checkpoint(parameters, State.of(model), fitted).to_bytes())
        temporary.rename(folder / f"{number:04d}-{epoch:02.0f}.pt")
        yield distance


# The peers


@dataclass(frozen=True)
class Task:
    """What all peers are given, and the extractor that each trains first."""

    loop: str
    spec: Spec
    data: Data
    extractor: FeatureExtractor
    folder: Path
    seed: int

    def trial(self, params: dict[str, Any], number: int) -> Iterator[float]:
        parameters = self.spec.parameters(params)
        return evaluations(self.loop, parameters, self.spec, self.data, self.extractor, number, self.folder)

    @property
    def ends(self) -> dict[str, Any]:
        return {name: entry.ends() for name, entry in self.spec.space.items()}


def run_tune(task: Task) -> None:
    """As https://docs.ray.io/en/latest/tune/examples/includes/mnist_pytorch.html, with Optuna's search."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    def objective(config: dict[str, Any], task: Task) -> None:
        number = int(tune.get_context().get_trial_id().split("_")[-1], 16)
        for distance in task.trial(config, number):
            tune.report({"frechet_distance": distance})

    kinds = {"latent_dim": tune.lograndint, "learning_rate": tune.loguniform, "kl_weight": tune.loguniform}
    budget = task.spec.budget
    ray.init("local", num_cpus=WORKERS, include_dashboard=False)
    tune.Tuner(
        tune.with_resources(tune.with_parameters(objective, task=task), {"cpu": 1}),
        param_space={name: kinds[name](*ends) for name, ends in task.ends.items()},
        tune_config=tune.TuneConfig(
            metric="frechet_distance",
            mode="min",
            search_alg=OptunaSearch(seed=task.seed),
            scheduler=ASHAScheduler(
                max_t=int(budget.max_epochs), grace_period=int(budget.grace_epochs), reduction_factor=3
            ),
            num_samples=budget.trials,
        ),
        run_config=tune.RunConfig(storage_path=str(task.folder / "ray"), verbose=0),
    ).fit()


def run_optuna(task: Task) -> None:
    """Two processes on one journal."""
    import optuna

    def worker(index: int) -> None:
        journal = optuna.storages.journal.JournalFileBackend(str(task.folder / "journal"))
        sampler = optuna.samplers.TPESampler(seed=2 * task.seed + index)
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(journal), study_name="peer", load_if_exists=True, sampler=sampler
        )

        def objective(trial: optuna.Trial) -> float:
            params = {
                name: (trial.suggest_int if name == "latent_dim" else trial.suggest_float)(name, *ends, log=True)
                for name, ends in task.ends.items()
            }
            distance = float("nan")
            for epoch, distance in enumerate(task.trial(params, trial.number), start=1):
                trial.report(distance, epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
            return distance

        study.optimize(objective, n_trials=task.spec.budget.trials // WORKERS)

    children = []
    for index in range(WORKERS):
        child = os.fork()
        if not child:
            worker(index)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def run_syne_tune(task: Task) -> None:
    """As https://syne-tune.readthedocs.io/en/latest/getting_started.html, whose local back end runs scripts."""
    from syne_tune import StoppingCriterion, Tuner, config_space
    from syne_tune.backend import LocalBackend
    from syne_tune.optimizer.baselines import ASHA

    (task.folder / "task.pickle").write_bytes(pickle.dumps(task))
    kinds = {
        "latent_dim": config_space.lograndint,
        "learning_rate": config_space.loguniform,
        "kl_weight": config_space.loguniform,
    }
    space = {name: kinds[name](*ends) for name, ends in task.ends.items()}
    budget = task.spec.budget
    Tuner(
        trial_backend=LocalBackend(entry_point=str(Path(__file__).with_name("syne_tune_trial.py"))),
        scheduler=ASHA(
            space | {"task": str(task.folder / "task.pickle")},
            metric="frechet_distance",
            time_attr="epoch",
            max_t=int(budget.max_epochs),
            grace_period=int(budget.grace_epochs),
            reduction_factor=3,
            random_seed=task.seed,
        ),
        stop_criterion=StoppingCriterion(max_num_trials_started=budget.trials),
        n_workers=WORKERS,
        sleep_time=0.5,
        results_update_interval=0.5,
        trial_backend_path=str(task.folder / "syne_tune"),
    ).run()


PEERS = {"tune": run_tune, "optuna": run_optuna, "syne_tune": run_syne_tune}


def main() -> None:
    options = parser(__doc__, None)
    options.add_argument("peer", choices=PEERS)
    options.add_argument("loop", choices=LOOPS)
    options.add_argument("folder", type=Path)
    options.add_argument("--images", default="mnist", help="the shipped spec whose space and budget is searched")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    spec = specs.load(spec_file(arguments.data_dir, arguments.images), ABSOLUTE)
    data = load_data(arguments.data_dir, arguments.images)
    extractor = train_classifier(data, arguments.seed)
    task = Task(arguments.loop, spec, data, extractor, arguments.folder.resolve(), arguments.seed)
    PEERS[arguments.peer](task)


if __name__ == "__main__":
    main()
