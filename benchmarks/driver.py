"""What one driver costs as a study grows: the real searcher, rule, journal and callbacks, with trials that answer from
a formula in the place of Ray's.

    python -m benchmarks.driver [--sizes 10 100 1000 3000 10000] [--workers 256] [--seconds 20] [--folder DIR]
    python -m benchmarks.driver --through-tune 40 160

Each size begins with a journal of so many ended trials, opened as a resumed run opens it, and goes on for some seconds
with `workers` trials at once. Times are pairs, of the clock and of the core; the clock also counts what else runs on
the machine and how long a disk takes to sync. Costs are means in milliseconds, so that what is written at intervals is
in them: a trial's are those of its proposal, start and end, a result's those of each evaluation and of the step of
Tune's loop around it.

With --through-tune Ray Tune itself runs so many trials on real workers, once with one evaluation each and once with
nine: what the eight more cost, and what more trials cost, is then with all that Ray and Tune do besides.
"""

import argparse
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ray import cloudpickle, tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import TrialScheduler
from sklearn.datasets import load_digits

from tuner.budget import EvenBudget
from tuner.callbacks import KeepTable, ShowTrials, search_callbacks
from tuner.cluster import cluster
from tuner.loggers import Trackers
from tuner.report import report
from tuner.run import RunFiles
from tuner.searcher import StudySearcher, SuccessiveHalving
from tuner.spec import Resources, Spec
from tuner.study import MANY, SEARCH, Study, open_study
from tuner.summary import ExtractorInfo
from tuner.tensorboard import TensorBoard
from tuner.terminal import Progress, console, status_words
from tuner.trainable import Content
from tuner.trials import run_trials
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.fitted import FittedModel
from tuner.vae.image_grid import HELD_OUT, grid, image_grids, png
from tuner.vae.metrics import METRICS
from tuner.vae.model import Builder
from tuner.vae.parameters import Parameters
from tuner.vae.prior import standard_normal
from tuner.vae.shape import ImageShape
from tuner.vae.step import State

SPACE: dict[str, dict[str, Any]] = {
    "latent_dim": {"type": "int", "low": 4, "high": 32, "log": True},
    "learning_rate": {"type": "float", "low": 0.0003, "high": 0.01, "log": True},
    "kl_weight": {"type": "float", "low": 0.001, "high": 3, "log": True},
    "warmup_steps": {"type": "int", "low": 0, "high": 400},
    "width": {"choices": [16, 24, 32]},
    "prior": {"choices": ["standard_normal", "gaussian_mixture"]},
    "prior_components": {"type": "int", "low": 10, "high": 100, "log": True, "when": {"prior": "gaussian_mixture"}},
}
OPTIMUM = {"latent_dim": 20, "learning_rate": 0.003, "kl_weight": 0.03, "warmup_steps": 200, "prior_components": 50}
BUDGET = {"max_epochs": 9, "grace_epochs": 1, "reduction_factor": 3}
FLOOR = 2.0
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where a journal is filled without waiting for a disk


def distance(parameters: dict[str, Any], rung: int, rungs: int, random: np.random.Generator | None = None) -> float:
    """A bowl in the unit cube of the space, nearer to the floor with each rung, and noise of 2 % by `random`."""
    spread = 0.0
    for name, best in OPTIMUM.items():
        low, high = SPACE[name]["low"], SPACE[name]["high"]
        scale = math.log if SPACE[name].get("log") else float
        spread += ((scale(parameters[name]) - scale(best)) / (scale(high) - scale(low))) ** 2
    noise = math.exp(random.normal(0, 0.02)) if random else 1.0
    worse: int = (parameters["width"] != 24) + 3 * (parameters["prior"] != "gaussian_mixture")
    return FLOOR + 100 * (spread + 0.05 * worse + 0.01) * 2.0 ** (rungs - rung) * noise


class Formula:
    """Trials of which all but the scores is what the workers of a real run send: pictures and a checkpoint."""

    def __init__(self, spec: Spec):
        self.spec, self.random = spec, np.random.default_rng(0)
        build, parameters = Builder(ImageShape(1, 28, 28)), Parameters(latent_dim=32, width=24)
        state = State.fresh(build, parameters, 0, 0)
        fitted = FittedModel(state.model, parameters, standard_normal(parameters.latent_dim), scores={"loss": 1.0})
        grids = image_grids(fitted, torch.rand(HELD_OUT, 1, 28, 28), ink=True)
        digits = torch.from_numpy(load_digits().images[:144, None]).float() / 16
        drawn = grid(F.interpolate(digits, (28, 28), mode="bilinear"), 12, ink=True)  # noise is no picture to encode
        self.pictures = {name: Content(png(drawn[: len(like), : len(like[0])])) for name, like in grids.items()}
        self.checkpoint = Checkpoint(parameters, replace(state, averages=torch.rand_like(state.averages)), fitted)
        self.content = self.checkpoint.to_bytes()

    def result(self, number: int, parameters: dict[str, Any], rung: int) -> dict[str, Any]:
        rungs = self.spec.budget.rungs
        found = distance(parameters, rung, len(rungs), self.random)
        last = rung == len(rungs)
        scores = {name: float(self.random.uniform(1, 100)) for name in METRICS if name != "nll"}
        return scores | {
            "frechet_distance": found,
            "frechet_distance_standard_normal": 2 * found,
            "trial": number,
            "rung": rung,
            "epoch": rungs[rung - 1],
            "images_per_second": 3000.0,
            "seconds_train": 1.0,
            "seconds_score": 0.1,
            "outcome": "complete" if last else "running",
            "done": last,
            "checkpoint": Content(self.content),
            "pictures": self.pictures,
        }


def now() -> np.ndarray:
    """Seconds of the clock and of the core."""
    return np.array([time.perf_counter(), time.thread_time()])


class Answers(tune.Trainable):  # type: ignore[misc]
    """A trial that answers from the formula."""

    def setup(self, config: dict[str, Any], formula: Formula) -> None:
        self.formula = formula
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.number, self.parameters, self.rung = new_config["trial"], new_config["parameters"], 0
        return True

    def step(self) -> dict[str, Any]:
        self.rung += 1
        return self.formula.result(self.number, self.parameters, self.rung)


class AtRandom(StudySearcher):
    """Fills a journal without waiting for a sampler."""

    def _sample(self, number: int, fixed: Any) -> dict[str, Any]:
        random, params = np.random.default_rng(number), dict[str, Any]()
        for name in self.spec.in_order():
            if self.spec.is_searched(name, params):
                held: Any = self.distributions[name]
                if hasattr(held, "choices"):
                    params[name] = held.choices[random.integers(len(held.choices))]
                elif held.log:
                    params[name] = type(held.low)(math.exp(random.uniform(math.log(held.low), math.log(held.high))))
                else:
                    params[name] = type(held.low)(random.uniform(held.low, held.high))
        return params


class Timed(StudySearcher):
    """Says how long the sampler took."""

    spent = np.zeros(2)

    def _sample(self, *arguments: Any) -> dict[str, Any]:
        started = now()
        params = super()._sample(*arguments)
        self.spent = self.spent + now() - started
        return params


@dataclass
class Loop:
    """Tune's loop over trials that have their results at once; `spent` is by what it was spent on."""

    searcher: StudySearcher
    rule: SuccessiveHalving
    callbacks: list[Any]
    formula: Formula
    workers: int

    def __post_init__(self) -> None:
        self.live: deque[Any] = deque()
        self.begun = self.ended = self.results = 0
        self.spent: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(2))

    @contextmanager
    def timed(self, event: str, part: str) -> Iterator[None]:
        started = now()
        yield
        self.spent[event, part] += now() - started

    def tell(self, event: str, method: str, **info: Any) -> None:
        for callback in self.callbacks:
            with self.timed(event, type(callback).__name__):
                getattr(callback, method)(iteration=0, trials=[], **info)

    def step(self, events: int = 1) -> bool:
        """Fill the places that are free and take one result; False where nothing is left to do."""
        while len(self.live) < self.workers:
            before = getattr(self.searcher, "spent", 0.0)
            with self.timed("trial", "proposal"):
                config = self.searcher.suggest(f"ray-{self.begun}")
            sampled = getattr(self.searcher, "spent", 0.0) - before
            self.spent["trial", "sampler"] += sampled
            self.spent["trial", "proposal"] -= sampled
            if not isinstance(config, dict):
                break
            trial = RayTrial("fake", config=config, trial_id=f"ray-{self.begun}", stub=True)
            self.begun += 1
            self.live.append((trial, 1))
            self.tell("trial", "on_trial_start", trial=trial)
        if not self.live:
            return False
        trial, rung = self.live.popleft()
        number = trial.config["trial"]
        result = self.formula.result(number, trial.config["parameters"], rung)
        result |= {"hostname": "here", "pid": number % 256, "timestamp": int(time.time())}  # as Tune adds them
        with self.timed("result", "rule"):
            stop = self.rule.on_trial_result(None, trial, result) == TrialScheduler.STOP
        if not stop:
            with self.timed("result", "journal"):
                self.searcher.on_trial_result(trial.trial_id, result)
        result["done"] = stop
        self.tell("result", "on_trial_result", trial=trial, result=result)
        self.results += 1
        if stop:
            with self.timed("trial", "journal"):
                self.searcher.on_trial_complete(trial.trial_id, result)
            self.tell("trial", "on_trial_complete", trial=trial)
            self.ended += 1
        else:
            self.live.append((trial, rung + 1))
        self.tell("result", "on_step_end")
        return True


def spec_of(trials: int) -> Spec:
    return Spec.model_validate({"space": SPACE, "budget": BUDGET | {"trials": trials}})


class Attach:
    """The journal's lines of a picture, in a journal that is filled."""

    def __init__(self, run: RunFiles, study: Study):
        self.run, self.study = run, study

    def on_trial_result(self, result: dict[str, Any], **info: Any) -> None:
        self.study.attach(result["trial"], self.run.artifacts, f"samples-epoch-{result['epoch']:g}.png", b"")

    def __getattr__(self, name: str) -> Any:
        return lambda **info: None


def fill(run: RunFiles, trials: int, attached: bool) -> None:
    """A journal of so many ended trials, the later from where the earlier left off."""
    run.path.mkdir(exist_ok=True)
    spec = spec_of(trials)
    study = open_study(run.journal, spec)
    study.set_user_attr("floor", FLOOR)
    callbacks = [Attach(run, study)] if attached else []
    loop = Loop(AtRandom(study, spec), SuccessiveHalving(study, spec), callbacks, Formula(spec), 1)
    while loop.step():
        pass


@contextmanager
def opened(run: RunFiles, spec: Spec, study: Study) -> Iterator[list[Any]]:
    """The callbacks of a search whose extractor is made."""
    with Progress("search") as progress, closing(TensorBoard(run.tensorboard, spec)) as board:
        board.start_search()
        extractors: Any = SimpleNamespace(run=run, begin_all=lambda: None, keep_done=lambda: [])
        table = KeepTable(run, spec, study)
        shown = ShowTrials(spec, table, board, Trackers(run, spec, SEARCH), progress)
        yield search_callbacks(table, extractors, board, shown)


def begin(run: RunFiles, spec: Spec) -> None:
    run.path.mkdir(exist_ok=True)
    run.spec.write_text(spec.to_yaml())
    run.update_summary(extractors={"search": ExtractorInfo(kind="untrained", sha256="00", floor=FLOOR)})


def measure(run: RunFiles, size: int, workers: int, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """What it costs to go on with a study of `size` ended trials."""
    spec = spec_of(max(MANY, 2 * size))
    begin(run, spec)
    started = now()
    study = open_study(run.journal, spec)
    read = now() - started
    searcher, rule = Timed(study, spec, lambda: workers), SuccessiveHalving(study, spec)
    with opened(run, spec, study) as callbacks:
        loop = Loop(searcher, rule, callbacks, Formula(spec), workers)
        ready = now() - started
        yield "resume", {"journal_mb": run.journal.stat().st_size / 2**20, "opened_s": read, "ready_s": ready}
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            loop.step()
        counts = {"trials": loop.begun, "ended": loop.ended, "results": loop.results}
        shares = {
            f"{event}.{part}": 1000 * spent / (loop.begun if event == "trial" else loop.results)
            for (event, part), spent in loop.spent.items()
        }
        sums = {
            f"ms_a_{event}": sum(spent for name, spent in shares.items() if name.startswith(event))
            for event in ("trial", "result")
        }
        yield "driver", counts | sums | shares
    started = now()
    with redirect_stderr(StringIO()):
        for part in status_words(run):
            console(StringIO()).print(part)
    status = now() - started
    started = now()
    size_of = report(run).stat().st_size
    views: dict[str, Any] = {"status_s": status, "report_s": now() - started, "report_mb": size_of / 2**20}
    views |= {"memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    yield "views", views | {"tensorboard_runs": len(list(run.tensorboard.iterdir()))}


def through_tune(run: RunFiles, trials: int, evaluations: int, workers: int) -> dict[str, float]:
    """Seconds of the core that Ray Tune's driver takes for so many trials: of the thread of its loop, and of all."""
    budget = {"trials": trials, "max_epochs": evaluations, "grace_epochs": evaluations}
    spec = spec_of(trials).model_copy(update={"budget": EvenBudget.model_validate(budget)})
    begin(run, spec)
    study = open_study(run.journal, spec)
    trainable = tune.with_parameters(Answers, formula=Formula(spec))
    with cluster(None, workers, Resources()), opened(run, spec, study) as callbacks:
        started = np.array([time.thread_time(), time.process_time(), time.perf_counter()])
        run_trials(study, spec, trainable, run.ray, workers, callbacks)
        spent = np.array([time.thread_time(), time.process_time(), time.perf_counter()]) - started
    return {"trials": trials, "results": trials * len(spec.budget.rungs)} | dict(
        zip(("loop_s", "all_threads_s", "clock_s"), spent.tolist(), strict=True)
    )


def rounded(value: Any) -> Any:
    """To three digits."""
    return [rounded(part) for part in value] if isinstance(value, np.ndarray) else float(f"{value:.3g}")


def fsync(folder: Path) -> float:
    """Median milliseconds of an appended line that is synced: what every durable event costs at least."""
    times = []
    with (folder / "line").open("ab") as file:
        for _ in range(50):
            started = time.perf_counter()
            file.write(b"x" * 400)
            file.flush()
            os.fsync(file.fileno())
            times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1_000, 3_000, 10_000])
    parser.add_argument("--workers", type=int, default=256, help="trials at once")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each size is measured")
    parser.add_argument("--through-tune", type=int, nargs="+", metavar="TRIALS", help="trials that Ray Tune runs")
    parser.add_argument("--folder", type=Path, help="where the runs are written (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place, tempfile.TemporaryDirectory(dir=MEMORY) as fast:
        folder, filled = Path(place), RunFiles(Path(fast) / "filled")
        if arguments.through_tune:
            cloudpickle.register_pickle_by_value(sys.modules[__name__])
            for trials, evaluations in product(arguments.through_tune, (1, 9)):
                run = RunFiles(folder / f"{trials}-{evaluations}")
                found = through_tune(run, trials, evaluations, min(arguments.workers, os.cpu_count() or 1))
                print(json.dumps({key: rounded(value) for key, value in found.items()}), flush=True)
            return
        print(json.dumps({"fsync_ms": round(fsync(folder), 2)}), flush=True)
        for size in sorted(arguments.sizes):
            fill(filled, size, attached=True)
            run = RunFiles(folder / str(size))
            run.path.mkdir()
            shutil.copy(filled.journal, run.journal)
            for part, found in measure(run, size, arguments.workers, arguments.seconds):
                said = {"size": size, "part": part} | {key: rounded(value) for key, value in found.items()}
                print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
