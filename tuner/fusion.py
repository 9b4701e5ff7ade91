"""Trials trained as one array, behind Ray: one actor a GPU trains what the light actors of the trials send it."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle

from tuner.cluster import alive
from tuner.spec import Resources, Spec
from tuner.vae.array import ArrayShape
from tuner.vae.data import Data
from tuner.vae.fused import Fused, Job
from tuner.vae.parameters import Parameters
from tuner.vae.process import device_of, settle
from tuner.vae.step import State
from tuner.vae.train import Record, stops

SLOTS = 64  # trials in one array, unless --concurrency says otherwise


@dataclass(frozen=True)
class Fusion:
    """How a search trains its trials: in `arrays`, or where there are none each in a process of its own.

    `resources` is what a trial then takes beside its array: a share of a CPU, for its scores.
    """

    arrays: tuple[ActorHandle, ...]
    resources: Resources


def fusion(spec: Spec, data: ObjectRef, concurrency: int | None) -> Fusion:
    """Start an array for each GPU of the cluster, or one on the CPU, where the spec's `execution` wants them."""
    there = int(sum(node["Resources"].get("GPU", 0) for node in alive()))
    gpus = max(there, 1 if spec.resources.gpu else 0)  # one that the autoscaler has still to bring counts
    # arrays take their images as they are, and have one kind of network
    apart = "binary" in spec.values("pixels") or "own" in spec.values("model")
    if apart or spec.execution == "process" or (spec.execution == "auto" and not gpus):
        return Fusion((), spec.resources)
    hosts = max(1, gpus)
    trials = min(concurrency or SLOTS * hosts, spec.budget.trials)
    slots = -(-trials // hosts)
    host = ray.remote(
        num_gpus=1 if gpus else 0, num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=2 * slots + 1
    )(ArrayHost)
    arrays = tuple(host.remote(data, spec.widest, slots) for _ in range(hosts))
    cpus = sum(node["Resources"].get("CPU", 0) for node in alive())
    share = min(spec.resources.cpu, int(100 * cpus / trials) / 100)
    return Fusion(arrays, Resources(cpu=max(share, 0.01), gpu=0))


class ArrayHost:
    """Trains whatever trials send, side by side: an array for each shape, each call waiting for its own trial."""

    def __init__(self, data: Data, widest: int, slots: int):
        settle()
        self.images = data.train.images.to(device_of(ray.get_gpu_ids()))
        if self.images.is_cuda:  # nothing is scored here: TF32
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
        self.widest, self.slots = widest, slots
        self.arrays: dict[ArrayShape, Fused] = {}
        self.arrived: SimpleQueue[tuple[Job, Future[Job]]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def train(self, job: Job) -> Job:
        """Train a job to its epoch; its `record` says how that went."""
        done: Future[Job] = Future()
        self.arrived.put((job, done))
        return done.result()

    def _work(self) -> None:
        """The one thread that touches the device: another's work would spoil the capture of a graph."""
        waiting: dict[Job, Future[Job]] = {}
        while True:
            done: list[Job] = []
            # with nothing to do, it waits in here for the next
            while not (self.arrived.empty() and (done or any(array.busy for array in self.arrays.values()))):
                job, future = self.arrived.get()
                waiting[job] = future
                try:
                    shape = ArrayShape.of(job.state.model, job.parameters, self.widest)
                    if shape not in self.arrays:
                        self.arrays[shape] = Fused(shape, self.slots, self.images)
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
