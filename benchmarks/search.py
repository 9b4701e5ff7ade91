"""How long until a search holds a checkpoint that closes 0.8, 0.9 and 0.95 of the gap, against two peers.

    python -m benchmarks.search [--data-dir data] [--seconds 240] [--seed 0] [--quick]

The peers: Ray Tune as in its own MNIST example, a function trainable with OptunaSearch and ASHA; and Optuna alone, two
processes on one journal, with its own pruner. Each once with our training step, so that only the search differs, and
once with the tutorial loop. All get the same space, data, budget, prior, temperature and scorer, and two cores. Ours
runs as its spec is shipped, which names points to evaluate first, and again told nothing, as the peers are. It trains
its extractor on the clock, and its baseline; the peers get an extractor for nothing and need no baseline.

Each runs as one command for --seconds; whatever checkpoint it writes is kept with its time since the command, and
scored afterwards with noise and an extractor that nobody searched with. Baseline and floor are those of that extractor.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.setting import (
    Pictures,
    command_of,
    load_spec,
    models_at,
    parser,
    plain,
    reached,
    say,
    search_command,
    tutorial_loss,
    unseen_scorer,
    watch,
)
from tuner.spec import Spec
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.data import Data
from tuner.vae.extractor import FeatureExtractor, from_bytes, to_bytes, train_classifier
from tuner.vae.fitted import Fitter
from tuner.vae.model import Model
from tuner.vae.parameters import Parameters
from tuner.vae.process import settle
from tuner.vae.score import Scorer
from tuner.vae.step import State

OURS = ("ours", "ours, told nothing")
PEERS = ("tune", "optuna")
LOOPS = ("ours", "tutorial")

# The training loops: a model an epoch


def our_loop(parameters: Parameters, spec: Spec, data: Data, seed: int) -> Iterator[tuple[float, Model]]:
    settle()
    epochs = range(1, int(spec.budget.max_epochs) + 1)
    yield from models_at(parameters, data.train.images, epochs, seed=spec.seed, trial=seed)


def tutorial_loop(parameters: Parameters, spec: Spec, data: Data, seed: int) -> Iterator[tuple[float, Model]]:
    torch.set_num_threads(1)
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
    """Train a peer's trial, keep each epoch's model in `folder` and yield its Frechet distance."""
    fitter = Fitter(data.train, seed=spec.seed, count=5_000, samples=2_500)
    scorer = Scorer(extractor, data.train, data.validation, seed=spec.seed, count=2_500, quasi_random=True)
    for epoch, model in (our_loop if loop == "ours" else tutorial_loop)(parameters, spec, data, number):
        fitted = fitter(model, parameters, epoch)
        distance = scorer(fitted)["frechet_distance"]
        temporary = folder / f".{number}.tmp"
        temporary.write_bytes(Checkpoint(parameters, State.of(model), fitted).to_bytes())
        temporary.rename(folder / f"{number:04d}-{epoch:02.0f}.pt")
        yield distance


# The peers, each a command of its own


def run_tune(loop: str, data_dir: Path | None, extractor_file: Path, folder: Path, seed: int) -> None:
    """As https://docs.ray.io/en/latest/tune/examples/includes/mnist_pytorch.html, with Optuna's search."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    spec, data = load_spec(data_dir)
    extractor = from_bytes(extractor_file.read_bytes())

    def objective(config: dict[str, Any], data: Data, extractor: FeatureExtractor) -> None:
        number = int(tune.get_context().get_trial_id().split("_")[-1], 16)
        for distance in evaluations(loop, spec.parameters(config), spec, data, extractor, number, folder):
            tune.report({"frechet_distance": distance})

    kinds = {"latent_dim": tune.lograndint, "learning_rate": tune.loguniform, "kl_weight": tune.loguniform}
    ends = {name: entry.ends() for name, entry in spec.space.items()}
    ray.init("local", num_cpus=2, include_dashboard=False)
    tune.Tuner(
        tune.with_resources(tune.with_parameters(objective, data=data, extractor=extractor), {"cpu": 1}),
        param_space={name: kinds[name](*ends[name]) for name in spec.space},
        tune_config=tune.TuneConfig(
            metric="frechet_distance",
            mode="min",
            search_alg=OptunaSearch(seed=seed),
            scheduler=ASHAScheduler(
                max_t=int(spec.budget.max_epochs), grace_period=int(spec.budget.grace_epochs), reduction_factor=3
            ),
            num_samples=spec.budget.trials,
        ),
        run_config=tune.RunConfig(storage_path=str(folder / "ray"), verbose=0),
    ).fit()


def run_optuna(loop: str, data_dir: Path | None, extractor_file: Path, folder: Path, seed: int) -> None:
    """Two processes on one journal."""
    import optuna

    def worker(index: int) -> None:
        spec, data = load_spec(data_dir)
        extractor = from_bytes(extractor_file.read_bytes())
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "journal")))
        sampler = optuna.samplers.TPESampler(seed=2 * seed + index)
        study = optuna.create_study(storage=storage, study_name="peer", load_if_exists=True, sampler=sampler)

        def objective(trial: optuna.Trial) -> float:
            params = {
                name: (trial.suggest_int if name == "latent_dim" else trial.suggest_float)(
                    name, *entry.ends(), log=True
                )  # type: ignore[operator]
                for name, entry in spec.space.items()
            }
            distance = float("nan")
            trials = evaluations(loop, spec.parameters(params), spec, data, extractor, trial.number, folder)
            for epoch, distance in enumerate(trials, start=1):
                trial.report(distance, epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
            return distance

        study.optimize(objective, n_trials=spec.budget.trials // 2)

    children = []
    for index in range(2):
        child = os.fork()
        if not child:
            worker(index)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def main() -> None:
    options = parser(__doc__, None)
    options.add_argument("--seconds", type=float, default=240, help="for each search")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--quick", action="store_true", help="digits and one peer, 20 seconds each")
    options.add_argument("--peer", nargs=4, metavar=("PEER", "LOOP", "EXTRACTOR", "FOLDER"), help="be a peer")
    arguments = options.parse_args()
    data_dir = arguments.data_dir and arguments.data_dir.resolve()
    if arguments.peer:
        peer, loop, extractor_file, folder = arguments.peer
        (run_tune if peer == "tune" else run_optuna)(loop, data_dir, Path(extractor_file), Path(folder), arguments.seed)
        return
    seconds = 20.0 if arguments.quick else arguments.seconds
    peers, loops = (("optuna",), ("tutorial",)) if arguments.quick else (PEERS, LOOPS)

    settle()
    spec, data = load_spec(data_dir)
    given = train_classifier(data, 11)
    scorer, baseline = unseen_scorer(spec, data)
    say({"floor": scorer.floor, "baseline": baseline}, 3)

    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "extractor.safetensors").write_bytes(to_bytes(given))
        where = ["--data-dir", str(data_dir)] if data_dir else []
        for told in OURS if not arguments.quick else OURS[:1]:
            run = place / told
            blind = [] if told == OURS[0] else ["--set", "points_to_evaluate=[]"]
            command = search_command(data_dir, run, "--seed", arguments.seed, *blind)
            found = watch(command, run / "checkpoints", place / f"kept-{told}", seconds)
            results[told] = reached(found, scorer, baseline)
            say({"search": told, **results[told]})
        for peer in peers:
            for loop in loops:
                folder = place / f"{peer}-{loop}"
                folder.mkdir()
                who = ("--peer", peer, loop, place / "extractor.safetensors", folder)
                command = command_of("benchmarks.search", *where, "--seed", arguments.seed, *who)
                found = watch(command, folder, place / f"kept-{peer}-{loop}", seconds)
                results[f"{peer}, {loop}"] = reached(found, scorer, baseline)
                say({"search": f"{peer}, training of {loop}", **results[f"{peer}, {loop}"]})
    print("\n".join(verdict(results, peers, loops, seconds)))


def verdict(
    results: Mapping[str, Mapping[str, Any]], peers: Sequence[str], loops: Sequence[str], seconds: float
) -> Iterator[str]:
    """Lines that compare ours with the peers, the last with the ratio: how many times as long the best peer with the
    tutorial's loop takes, to the highest goal that ours reached. Where nothing can be compared it says so."""
    goal = next((str(goal) for goal in (0.9, 0.8, 0.5) if results[OURS[0]][str(goal)]), None)
    if goal is None:
        yield f"no ratio: ours did not close half of the gap within {seconds:g} s, so there is nothing to compare"
        return
    for told in (name for name in OURS if name in results):
        for loop in loops:
            times = {name: results[name][goal] for name in (told, *(f"{peer}, {loop}" for peer in peers))}
            said = ", ".join(f"{name} {time or f'not within {seconds:g}'} s" for name, time in times.items())
            yield f"to {goal}: {said}"
    best = min((time for peer in peers if (time := results[f"{peer}, tutorial"][goal])), default=None)
    bound = "" if best else f", at the least: no peer got there within {seconds:g} s"
    for told, name in ((OURS[1], "told nothing"), (OURS[0], "ratio")):
        if results.get(told, {}).get(goal):
            yield f"{name} {(best or seconds) / results[told][goal]:.2f}{bound}"


if __name__ == "__main__":
    main()
