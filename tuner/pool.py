"""Work on a cluster beside its trials: functions that run on whichever node has room, and again where one is lost."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import ray
import torch
from ray import ObjectRef, cloudpickle
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuner.cluster import DEAD_SECONDS, alive, require_ray
from tuner.exits import CutOff
from tuner.fusion import GPU_LEFT, gpus_for_arrays
from tuner.own_model import told
from tuner.scoring import Bench
from tuner.searcher import WORKER_RETRIES, cause_of
from tuner.spec import Resources, Spec
from tuner.vae.data import Data
from tuner.vae.errors import Refused
from tuner.vae.model import OwnModel
from tuner.vae.process import device_of, settle

Result = TypeVar("Result")
LOOK_SECONDS = 1.0  # between looks at whether Ray still lives


class RayPool:
    """A cluster as a run uses it, for trials and for benches; its nodes get the data once, whatever else a bench has.

    Raises Refused where a user's own model can't travel.
    """

    def __init__(self, spec: Spec, data: Data, own: OwnModel | None = None, concurrency: int | None = None):
        send_by_value(spec, own)
        self.data, self.resources = ray.put(data), spec.resources
        self.gpu_left = GPU_LEFT if gpus_for_arrays(spec) else 0.0
        if not spec.resources.gpu:
            self.resources = spec.resources.model_copy(update={"gpu": self.gpu_left})
        self.own, self.concurrency = own, concurrency

    def __call__(self, bench: Bench) -> "RayWorkers":
        other = ray.put((bench.spec, bench.extractors, bench.test))
        return RayWorkers(self.data, other, self.resources, self.gpu_left)


class RayWorkers:
    """Runs each item as a task with the resources of a trial; beside trials, with what their arrays leave of a GPU."""

    def __init__(self, data: ObjectRef, other: ObjectRef, resources: Resources, gpu_left: float = 0):
        self.references, self.gpu_left = [data, other], gpu_left
        wanted = {"num_cpus": resources.cpu, "num_gpus": resources.gpu}
        # without `max_calls` Ray starts a process for each task on a GPU, which would take the features anew
        self.task = ray.remote(**wanted, max_calls=0, max_retries=WORKER_RETRIES)(_work)

    def map(
        self,
        work: Callable[..., Result],
        items: Sequence[tuple[Any, ...]],
        show: Callable[[int], None] = lambda done: None,
    ) -> list[Result]:
        """`work(bench, *item)` of each item, side by side, in their order; `show` hears how many are done.

        Raises CutOff where the cluster itself has died, or an item has lost its worker too often.
        """
        results = [self.task.remote(self.references, work, item) for item in items]
        left, done = list(results), -1
        while left:
            _, left = ray.wait(left, num_returns=len(left), timeout=LOOK_SECONDS)
            require_ray()
            if len(items) - len(left) > done:
                done = len(items) - len(left)
                show(done)
        return [_result(result) for result in results]

    def begin(self, work: Callable[..., Result], item: tuple[Any, ...]) -> "RayPending[Result]":
        """`work(bench, *item)` on a node that holds trials, whether or not they leave it a core."""
        kind = "GPU" if self.gpu_left else "CPU"
        workers = [node for node in alive() if node["Resources"].get(kind)]
        where = max(workers or alive(), key=lambda node: node["Resources"].get(kind, 0))
        there = NodeAffinitySchedulingStrategy(where["NodeID"], soft=True)  # elsewhere, if that node is lost
        beside = self.task.options(num_cpus=0, num_gpus=self.gpu_left, scheduling_strategy=there)
        return RayPending(beside.remote(self.references, work, item))


class RayPending(Generic[Result]):
    """A task that runs."""

    def __init__(self, reference: ObjectRef):
        self.reference = reference

    def ready(self) -> bool:
        return bool(ray.wait([self.reference], timeout=0)[0])

    def result(self) -> Result:
        """Waits for it. Raises CutOff as `map` does."""
        while not ray.wait([self.reference], timeout=LOOK_SECONDS)[0]:
            require_ray()
        found: Result = _result(self.reference)
        return found


def _result(reference: ObjectRef) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError:  # an error of the work itself
        raise
    except RayError as error:
        time.sleep(DEAD_SECONDS)
        require_ray()
        cause = cause_of(f"{type(error).__name__}: {error}")
        raise CutOff(
            f"a worker was lost {1 + WORKER_RETRIES} times at the same work, the last time: {cause}"
        ) from error


def _work(references: list[ObjectRef], work: Callable[..., Any], item: tuple[Any, ...]) -> Any:
    return work(_bench(*references, device_of(ray.get_gpu_ids())), *item)


@lru_cache(maxsize=1)
def _bench(data: ObjectRef, other: ObjectRef, device: torch.device) -> Bench:
    """Kept from task to task: it knows the features of the held-out images."""
    settle()
    spec, extractors, test = ray.get(other)
    return Bench(spec, ray.get(data).to(device), extractors, test and test.to(device))


def send_by_value(spec: Spec, own: OwnModel | None) -> None:
    """Let the package of a user's own model travel with it: workers need not have it. Raises Refused where it can't."""
    if own is None or not spec.own_model:
        return
    package = spec.own_model.function.partition(":")[0].partition(".")[0]
    if package in sys.modules:  # a script's own functions go by value anyway
        cloudpickle.register_pickle_by_value(sys.modules[package])
    try:
        cloudpickle.dumps(own)
    except Exception as error:  # whatever their code makes of it
        raise Refused(f"--model {spec.own_model.function}: can't be sent to workers: {told(error)}") from error
