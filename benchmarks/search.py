"""How long until a search holds a checkpoint that closes 0.8, 0.9 and 0.95 of the gap, against two peers.

    python benchmarks/search.py [--data-dir data] [--seconds 240] [--seed 0] [--quick]

The peers: Ray Tune as in its own MNIST example, a function trainable with OptunaSearch and ASHA; and Optuna alone, two
processes on one journal, with its own pruner. Each once with our training step, so that only the search differs, and
once with the tutorial loop. All get the same space, data, budget, prior, contrast and scorer, and two cores. Ours runs
as its spec is shipped, which names points to try first, and again told nothing, as the peers are. It trains its
extractor on the clock, and its baseline; the peers get an extractor for nothing and need no baseline.

Each runs as one command for --seconds; whatever checkpoint it writes is kept with its time since the command, and
scored afterwards with noise and an extractor that nobody searched with. Baseline and floor are those of that extractor.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from step import Pictures, plain
from torch.utils.data import DataLoader

from tuner import spec as specs
from tuner.spec import Spec
from tuner.vae import data as datasets
from tuner.vae.data import Data
from tuner.vae.extractor import FeatureExtractor, train_extractor
from tuner.vae.model import VAE
from tuner.vae.parameters import CLASSIC, Parameters
from tuner.vae.prior import standard_normal
from tuner.vae.process import settle
from tuner.vae.score import Scorer, gap_closed
from tuner.vae.train import State, train
from tuner.workspace import FittedModel, load_tensors

OURS = ("ours", "ours, told nothing")
PEERS = ("tune", "optuna")
LOOPS = ("ours", "tutorial")
GOALS = (0.5, 0.8, 0.9, 0.95)
SPECS = Path(__file__).parents[1] / "search_spaces"


def load_spec(data_dir: Path | None) -> tuple[Spec, Data]:
    overrides: list[tuple[str, Any]] = [("points_to_evaluate", [])]
    spec = specs.load(SPECS / ("mnist.yaml" if data_dir else "digits.yaml"), overrides)
    return spec, datasets.load(spec.data.name, data_dir or Path(), download=False)


# The training loops: a candidate an epoch


def our_loop(parameters: Parameters, spec: Spec, data: Data, seed: int) -> Iterator[tuple[float, VAE]]:
    settle()
    state = State.fresh(parameters, spec.seed, seed)
    epochs, most = range(1, int(spec.budget.max_epochs) + 1), spec.budget.max_epochs
    for record in train(state, parameters, data.train.images, epochs, seed=spec.seed, trial=seed, total_epochs=most):
        yield record.epoch, state.model


def tutorial_loop(parameters: Parameters, spec: Spec, data: Data, seed: int) -> Iterator[tuple[float, VAE]]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = plain(parameters.latent_dim, parameters.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=parameters.learning_rate)
    loader = DataLoader(Pictures(data.train), batch_size=parameters.batch_size, shuffle=True)
    for epoch in range(1, int(spec.budget.max_epochs) + 1):
        model.train()
        for images, _ in loader:
            mean, log_variance = model.encode(images)
            drawn = torch.sigmoid(model.decode(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)))
            kl = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
            loss = (torch.nn.functional.mse_loss(drawn, images, reduction="sum") + parameters.kl_weight * kl) / len(
                images
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield float(epoch), model


def evaluations(
    loop: str, parameters: Parameters, spec: Spec, data: Data, extractor: FeatureExtractor, number: int, folder: Path
) -> Iterator[float]:
    """Train a peer's trial, keep each epoch's candidate in `folder` and yield its Frechet distance."""
    scorer = Scorer(
        extractor, data.train, data.validation, seed=spec.seed, count=2_500, prior_count=5_000, quasi_random=True
    )
    for epoch, model in (our_loop if loop == "ours" else tutorial_loop)(parameters, spec, data, number):
        prior = scorer.fit(model, parameters)
        distance = scorer(model, parameters, prior)["frechet_distance"]
        torch.save({"best": FittedModel(model, parameters, prior, epoch).state_dict()}, folder / f".{number}.tmp")
        (folder / f".{number}.tmp").rename(folder / f"{number:04d}-{epoch:02.0f}.pt")
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
    extractor = FeatureExtractor()
    extractor.load_state_dict(torch.load(extractor_file))

    def objective(config: dict[str, Any], data: Data, extractor: FeatureExtractor) -> None:
        number = int(tune.get_context().get_trial_id().split("_")[-1], 16)
        extractor = extractor.eval().requires_grad_(False)
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
        extractor = FeatureExtractor()
        extractor.load_state_dict(torch.load(extractor_file))
        extractor = extractor.eval().requires_grad_(False)
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


# The clock and the yardstick


def watch(command: list[str], folder: Path, kept: Path, seconds: float) -> list[tuple[float, Path]]:
    """Run a command for `seconds`; copy each checkpoint that appears in `folder` -> (its time, its copy)."""
    kept.mkdir(parents=True)
    found: list[tuple[float, Path]] = []
    seen: set[tuple[str, int]] = set()
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=(kept / "stderr.txt").open("w"), start_new_session=True
    )
    while time.monotonic() - started < seconds and process.poll() is None:
        for file in sorted(folder.glob("*.pt")):
            try:
                stamp = (file.name, file.stat().st_mtime_ns)
                if stamp not in seen:
                    copy = kept / f"{len(found):04d}.pt"
                    shutil.copy(file, copy)
                    seen.add(stamp)
                    found.append((time.monotonic() - started, copy))
            except FileNotFoundError:
                continue  # no longer among the best
        time.sleep(0.1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return found


def reached(found: list[tuple[float, Path]], scorer: Scorer, baseline: float) -> dict[str, Any]:
    """When each goal was reached, in seconds since the command; None where it was not."""
    result: dict[str, Any] = {str(goal): None for goal in GOALS}
    best = -float("inf")
    for seconds, file in found:
        candidate = FittedModel.from_state_dict(load_tensors(file.read_bytes())["best"])
        distance = scorer.distance(scorer.samples(candidate.model, candidate.prior, scorer.count))
        best = max(best, gap_closed(distance, scorer.floor, baseline))
        for goal in GOALS:
            if result[str(goal)] is None and best >= goal:
                result[str(goal)] = round(seconds, 1)
        if best >= GOALS[-1]:
            break
    return result | {
        "checkpoints": len(found),
        "first_checkpoint": round(found[0][0], 1) if found else None,
        "best": round(best, 4),
    }


def yardstick(spec: Spec, data: Data) -> tuple[Scorer, float]:
    """A scorer with noise and an extractor that nobody searched with, and the classic settings' distance under it."""
    scorer = Scorer(train_extractor(data, 22), data.train, data.validation, seed=33, count=5_000, prior_count=5_000)
    classic = CLASSIC.model_copy(update={"batch_size": spec.baseline.batch_size})
    *_, (_, model) = our_loop(classic, spec, data, 0)
    return scorer, scorer.distance(scorer.samples(model, standard_normal(classic.latent_dim), scorer.count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="where MNIST lies; without, the embedded digits")
    parser.add_argument("--seconds", type=float, default=240, help="for each search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="digits and one peer, 20 seconds each")
    parser.add_argument("--peer", nargs=4, metavar=("PEER", "LOOP", "EXTRACTOR", "FOLDER"), help="be a peer")
    arguments = parser.parse_args()
    data_dir = arguments.data_dir and arguments.data_dir.resolve()
    if arguments.peer:
        peer, loop, extractor_file, folder = arguments.peer
        (run_tune if peer == "tune" else run_optuna)(loop, data_dir, Path(extractor_file), Path(folder), arguments.seed)
        return
    seconds = 20.0 if arguments.quick else arguments.seconds
    peers, loops = (("optuna",), ("tutorial",)) if arguments.quick else (PEERS, LOOPS)

    settle()
    spec, data = load_spec(data_dir)
    given = train_extractor(data, 11)
    scorer, baseline = yardstick(spec, data)
    print(json.dumps({"floor": round(scorer.floor, 3), "baseline": round(baseline, 2)}), flush=True)

    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        torch.save(given.state_dict(), place / "extractor.pt")
        where = ["--data-dir", str(data_dir)] if data_dir else []
        name = SPECS / ("mnist.yaml" if data_dir else "digits.yaml")
        for told in OURS if not arguments.quick else OURS[:1]:
            run = place / told
            command = [sys.executable, "-m", "tuner.search", str(name), *where, "--run", str(run), "--no-retrain"]
            command += ["--seed", str(arguments.seed)] + ([] if told == OURS[0] else ["--set", "points_to_evaluate=[]"])
            found = watch(command, run / "checkpoints", place / f"kept-{told}", seconds)
            results[told] = reached(found, scorer, baseline)
            print(json.dumps({"search": told, **results[told]}), flush=True)
        for peer in peers:
            for loop in loops:
                folder = place / f"{peer}-{loop}"
                folder.mkdir()
                me = [sys.executable, __file__, *where, "--seed", str(arguments.seed)]
                command = [*me, "--peer", peer, loop, str(place / "extractor.pt"), str(folder)]
                found = watch(command, folder, place / f"kept-{peer}-{loop}", seconds)
                results[f"{peer}, {loop}"] = reached(found, scorer, baseline)
                print(json.dumps({"search": f"{peer}, training of {loop}", **results[f"{peer}, {loop}"]}), flush=True)
    goal = next((str(goal) for goal in (0.9, 0.8, 0.5) if results[OURS[0]][str(goal)]), None)
    if goal is None:
        print("ours came nowhere\nratio 0.00")
        return
    for told in results.keys() & set(OURS):
        mine = results[told][goal]
        for loop in loops:
            times = {peer: results[f"{peer}, {loop}"][goal] for peer in peers}
            said = ", ".join(f"{peer} {time or f'not within {seconds:g}'} s" for peer, time in times.items())
            print(f"to {goal} with the training of {loop}: {told} {mine or f'not within {seconds:g}'} s, {said}")
    best = min(results[f"{peer}, tutorial"][goal] or seconds for peer in peers)
    if results.get(OURS[-1], {}).get(goal):
        print(f"told nothing {best / results[OURS[-1]][goal]:.2f}")
    print(f"ratio {best / results[OURS[0]][goal]:.2f}")


if __name__ == "__main__":
    main()
