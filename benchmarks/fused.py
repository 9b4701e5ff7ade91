"""Many trials as one array against one after the other and side by side in processes, on a GPU where there is one.

    python -m benchmarks.fused [--data-dir data] [--quick]

Trials of different latent sizes, learning rates and KL weights, in trial-epochs a second: serial is the trial's own
training generator; processes run it side by side; fused is `tuner/vae/fused.py`. No scores are taken here. On a GPU
then 64 trials of 20 epochs, and a whole search by `python -m tuner.search` to 0.9 of the gap, fused and in processes.
"""

import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from benchmarks.setting import load_data, load_spec, parser, reached, say, search_command, trained, unseen_scorer, watch
from tuner.vae.array import ArrayShape
from tuner.vae.fused import Fused, Job
from tuner.vae.model import Builder
from tuner.vae.parameters import Parameters
from tuner.vae.process import settle
from tuner.vae.shape import ImageShape
from tuner.vae.step import State

build = Builder(ImageShape(1, 28, 28))

WIDEST = 32


def parameters_of(trial: int) -> Parameters:
    random = torch.rand(3, generator=torch.Generator().manual_seed(trial)).tolist()
    return Parameters(
        latent_dim=round(4 * (WIDEST / 4) ** random[0]),
        learning_rate=3e-4 * 10 ** random[1],
        kl_weight=0.01 * 100 ** random[2],
        batch_size=64,
    )


def serial(images: Tensor, epochs: int, first: int = 0, trials: int = 2) -> float:
    """Trial-epochs a second, one trial after the other."""
    started = time.perf_counter()
    for trial in range(first, first + trials):
        trained(parameters_of(trial), images, epochs, seed=0, trial=trial)
    return trials * epochs / (time.perf_counter() - started)


def _worker(images: Tensor, device: str, epochs: int, trial: int, ready: object, seconds: object) -> None:
    settle()
    on_device = images.to(device)
    serial(on_device[:640], 1, trial, 1)  # warms up
    ready.wait()  # type: ignore[attr-defined]
    started = time.perf_counter()
    serial(on_device, epochs, trial, 1)
    seconds.put(time.perf_counter() - started)  # type: ignore[attr-defined]


def side_by_side(images: Tensor, device: str, epochs: int, processes: int) -> float:
    """Trial-epochs a second of one trial in each of several processes, by the slowest."""
    context = multiprocessing.get_context("spawn")
    ready, seconds = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_worker, args=(images, device, epochs, trial, ready, seconds))
        for trial in range(processes)
    ]
    for worker in workers:
        worker.start()
    slowest = max(seconds.get() for _ in workers)
    for worker in workers:
        worker.join()
    return processes * epochs / slowest


def fused(images: Tensor, epochs: int, slots: int) -> float:
    """Trial-epochs a second of one array of `slots` trials, the capture of its graph and its loading included."""
    array = Fused(ArrayShape.of(build(parameters_of(0), 0), parameters_of(0), WIDEST), slots, images)
    for trial in range(slots):
        array.enter(
            Job(trial, parameters_of(trial), State.fresh(build, parameters_of(trial), 0, trial), epochs, 0, epochs)
        )
    started = time.perf_counter()
    done = 0
    while array.busy:
        done += len(array.advance())
    assert done == slots
    return slots * epochs / (time.perf_counter() - started)


def searches(data_dir: Path | None, seconds: float) -> None:
    """Time from the command to 0.9 of the gap, trials fused and in processes."""
    spec, data = load_spec(data_dir)
    scorer, baseline = unseen_scorer(spec, data)
    with tempfile.TemporaryDirectory() as folder:
        for execution in ("fused", "process"):
            run = Path(folder) / execution
            options = ("--set", "points_to_evaluate=[]", "--set", f"execution={execution}")
            command = search_command(data_dir, run, *options)
            found = watch(command, run / "checkpoints", Path(folder) / f"kept-{execution}", seconds)
            say({"search": execution, **reached(found, scorer, baseline)})


def main() -> None:
    options = parser(__doc__, None)
    options.add_argument("--quick", action="store_true", help="small sizes, no searches")
    arguments = options.parse_args()
    settle()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # as the array's host sets it
    images = load_data(arguments.data_dir).train.images
    epochs = 2
    processes, sizes = ((2,), (2, 4)) if arguments.quick or device == "cpu" else ((8, 16), (8, 16, 32, 64, 128))

    serial(images[:640].to(device), 1, trials=1)  # warms up
    one = serial(images.to(device), epochs)
    say({"device": device, "serial": one}, 3)
    for count in processes:
        rate = side_by_side(images, device, epochs, count)
        say({"processes": count, "trial_epochs_a_second": rate}, 3)
    best = 0.0
    for slots in sizes:
        rate = fused(images.to(device), epochs, slots)
        best = max(best, rate)
        say({"fused": slots, "trial_epochs_a_second": rate}, 3)
    if device == "cuda" and not arguments.quick:
        say({"64 trials of 20 epochs, seconds": 64 * 20 / fused(images.to(device), 20, 64)}, 1)
        searches(arguments.data_dir, 300)
    print(f"ratio {best / one:.2f}")


if __name__ == "__main__":
    main()
