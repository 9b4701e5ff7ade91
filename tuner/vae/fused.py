"""Trials of one shape trained as one array on one device, each at its own pace with its own parameters.

A trial enters with its state and leaves with it at its next rung; what it computes is what `train` computes for it
alone, but for rounding. On a GPU one step of all slots is one CUDA graph: everything that differs between steps is on
the device, and the host only counts steps, and steps in when a trial ends an epoch or reaches its rung.
"""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.vae.array import Array, ArrayShape
from tuner.vae.data import as_floats
from tuner.vae.losses import Diverged
from tuner.vae.model import VAE
from tuner.vae.parameters import Parameters
from tuner.vae.process import tensor_float_32
from tuner.vae.step import State
from tuner.vae.train import Record, StepInputs, steps_per_epoch, stops

DRAWING_THREADS = 4
WARM_UP_STEPS = 3  # before a CUDA graph is captured, libraries must have chosen their kernels


@dataclass(eq=False)
class Job:
    """Train `state` in place up to `epoch`; `record` says how that went."""

    trial: int
    parameters: Parameters
    state: State
    epoch: float
    seed: int
    total_epochs: float
    record: Record | Exception | None = None


@dataclass
class _Slot:
    job: Job
    inputs: StepInputs
    first_step: int
    last_step: int
    started: float
    epoch: int = -1  # whose order and noise are on the device
    upcoming: "Future[tuple[Tensor, Tensor]] | None" = None  # those of the epoch after it


class Fused:
    """Up to `slots` trials of one shape at once, on the device of `images` (N, C, H, W) uint8; others wait.

    Where memory runs out, half as many slots are tried: those that no longer fit wait. A trial that does not even
    fit alone gets the error as its record.
    """

    def __init__(self, shape: ArrayShape, slots: int, images: Tensor):
        self.shape, self.images = shape, images.permute(0, 2, 3, 1).contiguous()  # as arrays take them
        self.per_epoch = steps_per_epoch(len(images), shape.batch_size)
        self.waiting: deque[Job] = deque()
        self.pool = ThreadPoolExecutor(DRAWING_THREADS)  # draws the next epochs while the device is busy
        self.steps = 0  # of the whole array, since it was made
        self._allocate(slots)

    def _allocate(self, slots: int) -> None:
        """Room for `slots` trials, or half as many where that is too much. Raises torch.OutOfMemoryError below one."""
        try:
            self._try_to_allocate(slots)
        except torch.OutOfMemoryError:
            if slots == 1:
                raise
        else:
            return
        self._allocate(slots // 2)

    def _try_to_allocate(self, slots: int) -> None:
        device, count = self.images.device, len(self.images)
        array = Array(self.shape, slots, device)
        order = torch.zeros(slots, count, dtype=torch.long, device=device)
        noise = torch.zeros(slots, count, self.shape.latent_dim, device=device)
        self.array, self.order, self.noise = array, order, noise  # not before all fit: half as many need their room
        self.slots: list[_Slot | None] = [None] * slots
        self.schedule = torch.zeros(2, slots, 1, device=device)  # learning rate and KL factor at each step
        self.step = torch.zeros(slots, dtype=torch.long, device=device)
        self.active = torch.zeros(slots, dtype=torch.bool, device=device)
        self.sums = torch.zeros(slots, 3, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def enter(self, job: Job) -> None:
        """Queue a job; `advance` gives it a slot. May be called from another thread."""
        self.waiting.append(job)

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(self.slots)

    def advance(self) -> list[Job]:
        """Train until a trial has reached its epoch or an epoch has ended -> the jobs that are done."""
        try:
            self._fill()
            running = [(slot.job.state.step, slot.last_step) for slot in self.slots if slot]
            count = min((min(last - step, self.per_epoch - step % self.per_epoch) for step, last in running), default=0)
            for _ in range(count):
                self._advance_one()
            return self._collect(count)
        except torch.OutOfMemoryError as error:
            if len(self.slots) == 1 and self.slots[0]:
                self.slots[0].job.record = torch.OutOfMemoryError(str(error))
            done = [slot.job for slot in self.slots if slot and slot.job.record]
        self._shrink()  # out here the error no longer holds the tensors of the step that failed
        return done

    def abandon(self, error: Exception) -> list[Job]:
        """Give up all jobs for an error, after which the array is of no more use -> the jobs."""
        jobs = [slot.job for slot in self.slots if slot] + list(self.waiting)
        self.waiting.clear()
        for job in jobs:
            job.record = error
        return jobs

    def _fill(self) -> None:
        """Put waiting jobs into free slots, and next epochs' orders and noise into those that begin one."""
        for number, slot in enumerate(self.slots):
            if slot is None and self.waiting:
                self._load(number, self.waiting.popleft())
                slot = self.slots[number]
            if slot and slot.job.state.step // self.per_epoch != slot.epoch:
                slot.epoch = slot.job.state.step // self.per_epoch
                order, noise = slot.upcoming.result() if slot.upcoming else slot.inputs.draw(slot.epoch)
                self.order[number] = order.to(self.order.device)
                self.noise[number, :, : slot.job.parameters.latent_dim] = noise.to(self.noise.device)
                more = (slot.epoch + 1) * self.per_epoch < slot.last_step
                slot.upcoming = self.pool.submit(slot.inputs.draw, slot.epoch + 1) if more else None

    def _load(self, number: int, job: Job) -> None:
        count, total, latent_dim = len(self.images), job.total_epochs, job.state.model.latent_dim
        inputs = StepInputs(job.parameters, count, latent_dim, seed=job.seed, trial=job.trial, total_epochs=total)
        (last_step,) = stops(job.parameters, count, [job.epoch])
        slot = self.slots[number] = _Slot(job, inputs, job.state.step, last_step, time.perf_counter())
        self.array.load(number, cast(VAE, job.state.model), job.state.averages, job.state.mse)
        schedule = torch.tensor([inputs.factors(step) for step in range(last_step)]).T
        if last_step > self.schedule.shape[2]:
            more = max(last_step, inputs.total_steps) - self.schedule.shape[2]
            self.schedule, self.graph = F.pad(self.schedule, (0, more)), None
        self.schedule[:, number, :last_step] = schedule.to(self.schedule.device)
        self.noise[number] = 0
        self.sums[number] = 0
        self.step[number] = slot.first_step
        self.active[number] = True

    def _advance_one(self) -> None:
        self.steps += 1
        if self.images.device.type != "cuda":
            self._step()
        elif self.graph:
            self.graph.replay()
        else:
            with tensor_float_32():  # a graph keeps the kernels that it was captured with
                if self.steps <= WARM_UP_STEPS:
                    self._step()
                    return
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._step()
            self.graph = graph
            self.graph.replay()

    @torch.no_grad()
    def _step(self) -> None:
        """One step of every active slot. Nothing in here waits for the device, nor depends on what it computed."""
        size, count = self.shape.batch_size, len(self.images)
        place = (self.step % self.per_epoch * size).unsqueeze(1) + torch.arange(size, device=self.step.device)
        there = (place < count) & self.active.unsqueeze(1)
        place = place.clamp(max=count - 1)
        batch = as_floats(self.images[self.order.gather(1, place)])
        noise = self.noise.gather(1, place.unsqueeze(2).expand(-1, -1, self.shape.latent_dim))
        images = there.sum(1, keepdim=True)
        at = self.step.clamp(max=self.schedule.shape[2] - 1).expand(2, 1, -1).mT
        learning_rate, kl_factor = self.schedule.gather(2, at).squeeze(2)
        means = self.array.backward(batch, there / images.clamp(min=1), noise, kl_factor)
        self.array.update_all(learning_rate, self.step, self.active)
        self.sums += torch.where(self.active.unsqueeze(1), means * images, 0)
        self.step += self.active

    def _collect(self, count: int) -> list[Job]:
        """Count steps; empty the slots of trials that have come to their epoch, or whose loss is not finite."""
        done = []
        finite = torch.isfinite(self.sums).all(1).tolist()
        for number, slot in enumerate(self.slots):
            if slot is None:
                continue
            job = slot.job
            job.state.step += count
            if not finite[number]:
                job.record = Diverged(f"training loss not finite at epoch {job.state.step / self.per_epoch:.3g}")
            elif job.state.step == slot.last_step:
                job.state.mse = self.array.store(number, cast(VAE, job.state.model), job.state.averages)
                seen = self._images_at(slot.last_step) - self._images_at(slot.first_step)
                loss, reconstruction, kl = (self.sums[number] / seen).tolist()
                seconds = time.perf_counter() - slot.started
                job.record = Record(job.epoch, slot.last_step, loss, reconstruction, kl, seen, seconds)
            if job.record:
                self.active[number] = False
                done.append(job)
        self.slots = [None if slot and slot.job.record else slot for slot in self.slots]  # once all are stored
        return done

    def _images_at(self, step: int) -> int:
        """Images a trial has seen before `step`."""
        epochs, steps = divmod(step, self.per_epoch)
        return epochs * len(self.images) + steps * self.shape.batch_size

    def _shrink(self) -> None:
        """Half the slots. Trials go on from the rung they came from: their states on the CPU are whole."""
        for slot in reversed(self.slots):
            if slot and not slot.job.record:
                slot.job.state.step = slot.first_step
                self.waiting.appendleft(slot.job)
        slots = max(1, len(self.slots) // 2)
        self.slots = []  # or what fails now would find each of them twice
        del self.array, self.order, self.noise
        self.graph = None
        torch.cuda.empty_cache()
        self._allocate(slots)
