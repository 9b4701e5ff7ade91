"""Trials trained as one array, behind Ray: an actor a GPU trains, and scores, what the light actors of trials send."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import ray
from ray import ObjectRef, cloudpickle
from ray.actor import ActorHandle

from tuner.cluster import alive, dead_processes
from tuner.scoring import Evaluator
from tuner.spec import Resources, Spec
from tuner.vae.array import ArrayShape
from tuner.vae.data import Data
from tuner.vae.extractor import from_bytes
from tuner.vae.fitted import FittedModel
from tuner.vae.fused import Fused, Job
from tuner.vae.model import Model
from tuner.vae.parameters import Parameters
from tuner.vae.process import device_of, settle
from tuner.vae.step import State
from tuner.vae.train import Record, stops

SLOTS = 64  # trials in one array, unless --concurrency says otherwise
GPU_LEFT = 0.25  # of each GPU with an array, for what is made beside its trials and scored after them


@dataclass(frozen=True)
class Fusion:
    """How a search trains its trials: in `arrays`, or where there are none each in a process of its own.

    `resources` is what a trial then takes beside its array: a share of a CPU, for its scores where the array stands on
    one; arrays on GPUs score.
    """

    arrays: tuple[ActorHandle, ...]
    resources: Resources
    scores: bool = False


def gpus_for_arrays(spec: Spec) -> int:
    """How many GPUs of the cluster have an array; one that the autoscaler has still to bring counts."""
    if apart(spec) or spec.execution == "process":
        return 0
    there = int(sum(node["Resources"].get("GPU", 0) for node in alive()))
    return max(there, 1 if spec.resources.gpu else 0)


def apart(spec: Spec) -> bool:
    """Arrays take their images as they are, and have one kind of network."""
    return "binary" in spec.values("pixels") or "own" in spec.values("model")


@contextmanager
def fusion(spec: Spec, data: ObjectRef, concurrency: int | None) -> Iterator[Fusion]:
    """An array for each GPU of the cluster, or one on the CPU, where the spec's `execution` wants them, as long as this
    is open."""
    gpus = gpus_for_arrays(spec)
    if not gpus and (apart(spec) or spec.execution != "fused"):
        yield Fusion((), spec.resources)
        return
    hosts = max(1, gpus)
    trials = min(concurrency or SLOTS * hosts, spec.budget.trials)
    slots = -(-trials // hosts)
    lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 2 * slots + 1}
    host = ray.remote(num_gpus=1 - GPU_LEFT if gpus else 0, **lasting)(ArrayHost)
    kept = cloudpickle.dumps(data)  # of a plain reference Ray complains that it might be gone at a restart
    arrays = tuple(host.remote(spec, kept, slots) for _ in range(hosts))
    cpus = sum(node["Resources"].get("CPU", 0) for node in alive())
    share = min(spec.resources.cpu, int(100 * cpus / trials) / 100)
    try:
        yield Fusion(arrays, Resources(cpu=max(share, 0.01), gpu=0), scores=gpus > 0)
    finally:
        if not dead_processes():
            for array in arrays:  # Ray would keep them, and their GPUs, for the handles that Tune holds
                ray.kill(array)


class ArrayHost:
    """Trains whatever trials send, side by side: an array for each shape, each call waiting for its own trial."""

    def __init__(self, spec: Spec, data: bytes, slots: int):
        settle()
        there: Data = ray.get(cloudpickle.loads(data))
        self.spec, self.slots, self.data = spec, slots, there.to(device_of(ray.get_gpu_ids()))
        self.evaluator: Evaluator | None = None
        self.arrays: dict[ArrayShape, Fused] = {}
        self.arrived: SimpleQueue[tuple[Job | Callable[[], FittedModel], Future[Any]]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def train(self, job: Job) -> Job:
        """Train a job to its epoch; its `record` says how that went."""
        done: Future[Job] = Future()
        self.arrived.put((job, done))
        return done.result()

    def evaluate(self, extractor: bytes, model: Model, parameters: Parameters, epoch: float) -> FittedModel | Exception:
        """Fit and score what a trial has trained."""

        def work() -> FittedModel:
            self.evaluator = self.evaluator or Evaluator(self.spec, self.data, lambda: from_bytes(extractor))
            return self.evaluator(model, parameters, epoch)

        done: Future[FittedModel | Exception] = Future()
        self.arrived.put((work, done))
        return done.result()

    def _work(self) -> None:
        """The one thread that touches the device: another's work would spoil the capture of a graph."""
        waiting: dict[Job, Future[Job]] = {}
        while True:
            done: list[Job] = []
            # with nothing to do, it waits in here for the next
            while not (self.arrived.empty() and (done or any(array.busy for array in self.arrays.values()))):
                job, future = self.arrived.get()
                if not isinstance(job, Job):
                    try:
                        future.set_result(job())
                    except Exception as error:
                        future.set_result(error)
                    continue
                waiting[job] = future
                try:
                    shape = ArrayShape.of(job.state.model, job.parameters, self.spec.widest)
                    if shape not in self.arrays:
                        self.arrays[shape] = Fused(shape, self.slots, self.data.train.images)
                    self.arrays[shape].enter(job)
                except Exception as error:  # whatever it is, the trial that waits must hear of it
                    job.record = error
                    done.append(job)
            for shape, array in list(self.arrays.items()):
                try:
                    done += array.advance() if array.busy else []
                except Exception as error:
                    done += array.abandon(error)
                    del self.arrays[shape]  # the next of its trials gets a new one
            for job in done:
                waiting.pop(job).set_result(job)


def train_fused(
    host: ActorHandle, images: int, state: State, parameters: Parameters, spec: Spec, trial: int
) -> Iterator[Record]:
    """What `train` yields, trained by an array to which the state travels and from which it comes back."""
    for epoch in stops(parameters, images, spec.budget.rungs, state.step).values():
        job = Job(trial, parameters, state, epoch, spec.seed, spec.budget.max_epochs)
        done: Any = ray.get(host.train.remote(job))
        if isinstance(done.record, Exception):
            raise done.record
        state.load_state_dict(done.state.state_dict())
        yield done.record


def evaluate_fused(
    host: ActorHandle, extractor: ObjectRef, model: Model, parameters: Parameters, epoch: float
) -> FittedModel:
    """What an `Evaluator` gives, from one on the array's GPU. Raises Diverged."""
    found: FittedModel | Exception = ray.get(host.evaluate.remote(extractor, model, parameters, epoch))
    if isinstance(found, Exception):
        raise found
    return found
