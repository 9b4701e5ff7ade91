"""Many trials as one array against one after the other and side by side in processes, on a GPU where there is one.

    python -m benchmarks.fused [--data-dir data] [--quick]

Trials of different latent sizes, learning rates and KL weights, in trial-epochs a second: serial is the trial's own
training generator; processes run it side by side; fused is `tuner/vae/fused.py`; vmap is what PyTorch offers for it,
`torch.func.vmap` over the reference step, on a GPU as one CUDA graph. No scores are taken here. On a GPU then 64 trials
of 20 epochs, and whole searches by `python -m tuner.search` to 0.9 of the gap: fused, in processes on the GPU, and in
processes on the CPUs.
"""

import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from benchmarks.setting import load_data, load_spec, parser, reached, say, search_command, trained, unseen_scorer, watch
from tuner.vae.array import BETAS, EPSILON, ArrayShape
from tuner.vae.data import as_floats
from tuner.vae.fused import Fused, Job
from tuner.vae.losses import kl_divergence, squared_error
from tuner.vae.model import Builder, Model
from tuner.vae.parameters import Parameters
from tuner.vae.process import settle, tensor_float_32
from tuner.vae.shape import ImageShape
from tuner.vae.step import State
from tuner.vae.train import steps_per_epoch

build = Builder(ImageShape(1, 28, 28))

WIDEST = 32
STEPS = 5  # timed, of vmap


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
    slowest: float = max(seconds.get() for _ in workers)
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


class Reference(nn.Module):
    """The plain network from images to logits, as `functional_call` wants it."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.model.encode(images)
        assert log_variance is not None
        return mean, log_variance, self.model.decode(mean + torch.exp(0.5 * log_variance) * noise)


def vmapped(images: Tensor, slots: int) -> float:
    """Trial-epochs a second of `slots` networks, all as wide as the widest, by a step of all of them."""
    parameters = [parameters_of(trial).model_copy(update={"latent_dim": WIDEST}) for trial in range(slots)]
    networks = [Reference(build(each, trial)).to(images.device) for trial, each in enumerate(parameters)]
    stacked, _ = torch.func.stack_module_state(networks)
    weights = [weight.detach() for weight in stacked.values()]
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    rates = torch.tensor([each.learning_rate for each in parameters], device=images.device)
    factors = torch.tensor([each.kl_weight for each in parameters], device=images.device)
    size = parameters[0].batch_size
    order = torch.stack([torch.randperm(len(images))[:size] for _ in range(slots)]).to(images.device)
    noise = torch.randn(slots, size, WIDEST).to(images.device)

    def loss(weights: list[Tensor], batch: Tensor, noise: Tensor, factor: Tensor) -> Tensor:
        named = dict(zip(stacked, weights, strict=True))
        mean, log_variance, logits = torch.func.functional_call(networks[0], named, (batch, noise))
        return squared_error(logits, batch).mean() + factor * kl_divergence(mean, log_variance).mean()

    def step() -> None:
        gradients = torch.func.vmap(torch.func.grad(loss))(weights, as_floats(images[order]), noise, factors)
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_lerp_(second, torch._foreach_mul(gradients, gradients), 1 - BETAS[1])
        root = torch._foreach_add(torch._foreach_sqrt(second), EPSILON)
        for weight, moved in zip(weights, torch._foreach_div(first, root), strict=True):
            weight.addcmul_(moved, rates.view(-1, *[1] * (moved.dim() - 1)), value=-1)

    advance, steps, wait = step, STEPS, lambda: None
    with torch.no_grad(), tensor_float_32():
        if images.is_cuda:
            wait, stream, graph = torch.cuda.synchronize, torch.cuda.Stream(), torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            with torch.cuda.graph(graph):
                step()
            advance, steps = graph.replay, 10 * STEPS
        advance()
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            advance()
        wait()
    return slots / ((time.perf_counter() - started) / steps * steps_per_epoch(len(images), size))


SEARCHES = {
    "fused": ("execution=fused",),
    "processes on the GPU": ("execution=process", "resources.gpu=0.0625"),
    "processes on the CPUs": ("execution=process",),
}


def searches(data_dir: Path | None, seconds: float) -> None:
    """Time from the command to goals as 0.9 of the gap, by each way to train trials."""
    spec, data = load_spec(data_dir)
    scorer, baseline = unseen_scorer(spec, data)
    with tempfile.TemporaryDirectory() as folder:
        for number, (way, options) in enumerate(SEARCHES.items()):
            run = Path(folder) / str(number)
            settings = [word for option in ("points_to_evaluate=[]", *options) for word in ("--set", option)]
            command = search_command(data_dir, run, *settings)
            found = watch(command, run / "checkpoints", Path(folder) / f"kept-{number}", seconds)
            say({"search": way, **reached(found, scorer, baseline)})


def main() -> None:
    options = parser(__doc__, None)
    options.add_argument("--quick", action="store_true", help="small sizes, no searches")
    arguments = options.parse_args()
    settle()
    device = "cuda" if torch.cuda.is_available() else "cpu"
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
        say({"fused": slots, "trial_epochs_a_second": rate, "vmap": vmapped(images.to(device), slots)}, 3)
    if device == "cuda" and not arguments.quick:
        say({"64 trials of 20 epochs, seconds": 64 * 20 / fused(images.to(device), 20, 64)}, 1)
        searches(arguments.data_dir, 300)
    print(f"ratio {best / one:.2f}")


if __name__ == "__main__":
    main()
