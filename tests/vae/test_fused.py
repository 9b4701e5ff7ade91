"""A fused array gives each trial what it gets alone, whoever its neighbours are and whenever it came."""

import io
import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tuner.vae.array import Array, ArrayShape
from tuner.vae.fused import Fused, Job
from tuner.vae.losses import Diverged
from tuner.vae.model import Builder
from tuner.vae.parameters import Parameters
from tuner.vae.shape import ImageShape
from tuner.vae.step import State
from tuner.vae.train import Record, train

build = Builder(ImageShape(1, 28, 28))

WIDEST, EPOCHS, SEED = 6, 3, 5
COMMON = {"width": 4, "batch_size": 16}
TRIALS = {
    1: Parameters(latent_dim=3, learning_rate=3e-3, kl_weight=0.1, schedule="cosine", warmup_steps=3, **COMMON),
    2: Parameters(latent_dim=6, learning_rate=1e-3, kl_weight=1.0, **COMMON),
    3: Parameters(latent_dim=1, learning_rate=8e-3, kl_weight=0.5, kl_warmup_epochs=1.0, **COMMON),
    4: Parameters(latent_dim=4, learning_rate=2e-3, kl_weight=0.0, **COMMON),
}
SHAPE = ArrayShape.of(build(TRIALS[1], 0), TRIALS[1], WIDEST)
TOLERANCE = 2e-3  # of how far the weights moved: Adam divides by gradients that are near zero


@pytest.fixture(scope="module")
def images(digits):
    return digits.train.images[:50].clone()  # four batches an epoch, the last of 2 images


def _alone(trial: int, images, epoch: float = EPOCHS, **changes) -> tuple[State, Record]:
    parameters = TRIALS[trial].model_copy(update=changes)
    state = State.fresh(Builder(ImageShape(*images.shape[1:])), parameters, SEED, trial)
    (record,) = train(state, parameters, images, [epoch], seed=SEED, trial=trial, total_epochs=EPOCHS)
    return state, record


def _job(trial: int, epoch: float = EPOCHS, state: State | None = None, **changes) -> Job:
    parameters = TRIALS[trial].model_copy(update=changes)
    return Job(trial, parameters, state or State.fresh(build, parameters, SEED, trial), epoch, SEED, EPOCHS)


def _finish(fused: Fused) -> dict[int, Job]:
    done = {}
    while fused.busy:
        done |= {job.trial: job for job in fused.advance()}
    return done


def _assert_as_alone(job: Job, images) -> None:
    state, record = _alone(job.trial, images, job.epoch, batch_size=job.parameters.batch_size)
    assert isinstance(job.record, Record)
    assert (job.record.epoch, job.record.step, job.state.step) == (record.epoch, record.step, record.step)
    start = parameters_to_vector(State.fresh(build, job.parameters, SEED, job.trial).model.parameters())
    ours, theirs = (parameters_to_vector(s.model.parameters()) for s in (job.state, state))
    assert (ours - theirs).norm() <= TOLERANCE * (theirs - start).norm()
    assert (job.state.averages - state.averages).norm() <= TOLERANCE * state.averages.norm()


def test_colour_and_the_calibrated_unit_make_no_difference():
    images = torch.randint(256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    builder, calibrated = Builder(ImageShape(3, 32, 32)), {"kl_unit": "calibrated"}
    first = TRIALS[1].model_copy(update=calibrated)
    fused = Fused(ArrayShape.of(builder(first, 0), first, WIDEST), 3, images)
    for trial in TRIALS:
        parameters = TRIALS[trial].model_copy(update=calibrated)
        fused.enter(_job(trial, state=State.fresh(builder, parameters, SEED, trial), **calibrated))
    for trial, job in _finish(fused).items():
        state, record = _alone(trial, images, **calibrated)
        assert job.record.loss == pytest.approx(record.loss, rel=1e-4)
        assert job.state.mse == pytest.approx(state.mse, rel=1e-4)


def test_trials_of_different_size_and_rate_get_the_scores_they_get_alone(images):
    fused = Fused(SHAPE, 4, images)
    for trial in TRIALS:
        fused.enter(_job(trial))
    done = _finish(fused)
    assert sorted(done) == sorted(TRIALS)
    for trial, job in done.items():
        _assert_as_alone(job, images)
        alone = _alone(trial, images)[1]
        for name in ("loss", "reconstruction", "kl"):
            assert getattr(job.record, name) == pytest.approx(getattr(alone, name), rel=1e-4, abs=1e-4)
        assert job.record.images == alone.images


def test_a_slot_refilled_midway_disturbs_nobody(images):
    fused = Fused(SHAPE, 2, images)
    for trial, epoch in ((1, 1.5), (2, 3), (3, 2), (4, 0.5)):
        fused.enter(_job(trial, epoch))
    assert len(fused.waiting) == 4
    done = _finish(fused)
    assert sorted(done) == sorted(TRIALS)
    assert fused.steps == 14  # 6 + 8 in one slot, 12 + 2 in the other
    for job in done.values():
        _assert_as_alone(job, images)


def test_a_trial_goes_on_from_a_file_in_another_array(images):
    first = Fused(SHAPE, 2, images)
    for trial in (1, 2):
        first.enter(_job(trial, 1.5))
    halfway = _finish(first)
    second = Fused(SHAPE, 3, images)
    second.enter(_job(4))
    for trial, job in halfway.items():
        file = io.BytesIO()
        torch.save(job.state.state_dict(), file)
        file.seek(0)
        state = State.fresh(build, TRIALS[trial], 99, 99)
        state.load_state_dict(torch.load(file, weights_only=True))
        second.enter(_job(trial, state=state))
    for job in _finish(second).values():
        _assert_as_alone(job, images)


def test_a_trial_that_diverges_leaves_its_neighbours_alone(images):
    wild = TRIALS[2].model_copy(update={"learning_rate": 1e10})
    fused = Fused(SHAPE, 2, images)
    fused.enter(Job(2, wild, State.fresh(build, wild, SEED, 2), EPOCHS, SEED, EPOCHS))
    fused.enter(_job(1))
    fused.enter(_job(3))
    done = _finish(fused)
    assert isinstance(done[2].record, Diverged)
    assert "not finite at epoch" in str(done[2].record)
    _assert_as_alone(done[1], images)
    _assert_as_alone(done[3], images)  # in the slot that the wild one left


class _Device(TorchDispatchMode):
    """Memory that can run out: within it tensors are counted, and one too many is refused as a GPU refuses it."""

    def __init__(self):
        super().__init__()
        self.room, self.most = math.inf, 0  # bytes: what there is, and the most that was taken at once
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.living[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.living = {key: kept for key, kept in self.living.items() if not kept[0].expired()}
        taken = sum(size for _, size in self.living.values())
        if taken > self.room:
            raise torch.OutOfMemoryError("no room")
        self.most = max(self.most, taken)
        return made


LARGE = 150  # a batch: what a step makes of it takes more room than an array


@pytest.fixture(scope="module")
def many(digits):
    return digits.train.images[:LARGE].clone()


def _large(*trials: int) -> tuple[ArrayShape, list[Job]]:
    return SHAPE._replace(batch_size=LARGE), [_job(trial, batch_size=LARGE) for trial in trials]


@pytest.fixture(scope="module")
def room(many) -> tuple[int, int]:
    """Bytes that an array of one slot takes, before its first step and while it trains."""
    shape, jobs = _large(1, 2)
    with _Device() as device:
        fused = Fused(shape, 1, many)
        allocated = device.most
        for job in jobs:
            fused.enter(job)
        _finish(fused)
    return allocated, device.most


def test_where_memory_runs_out_the_array_shrinks_and_the_trials_go_on(many, room):
    shape, jobs = _large(*TRIALS)
    with _Device() as device:
        fused = Fused(shape, 4, many)
        for job in jobs:
            fused.enter(job)
        assert fused.advance() == []  # an epoch
        device.room = 1.2 * room[1]  # someone else takes the rest
        done = _finish(fused)
    assert sorted(done) == sorted(TRIALS)
    assert len(fused.slots) == 1
    for job in done.values():
        _assert_as_alone(job, many)


def test_an_array_that_does_not_fit_begins_with_fewer_slots(images):
    with _Device() as device:
        device.room = 4 * len(Array(SHAPE).flat.flatten()) * 1.5
        fused = Fused(SHAPE, 4, images)
    assert len(fused.slots) == 1
    for trial in (1, 2):
        fused.enter(_job(trial))
    for job in _finish(fused).values():
        _assert_as_alone(job, images)
    assert fused.steps == 2 * 12


def test_an_array_that_nearly_fitted_makes_room_for_its_half():
    """Where images are many, their order and noise take as much room as the networks, and room runs out there."""
    images = torch.zeros(36_000, 1, 28, 28, dtype=torch.uint8)
    with _Device() as device:
        Fused(SHAPE, 2, images)
        device.room = 1.1 * device.most
        assert len(Fused(SHAPE, 4, images).slots) == 2


def test_a_trial_that_is_done_is_told_though_memory_runs_out_over_the_next(images):
    peak = math.inf
    for _ in range(2):
        jobs = [_job(1), _job(2)]
        with _Device() as device:
            device.room = peak - 1  # which is reached when the second is stored
            fused = Fused(SHAPE, 2, images)
            for job in jobs:
                fused.enter(job)
            done = _finish(fused)
        peak = device.most
        assert sorted(done) == [1, 2]
        for job in done.values():
            _assert_as_alone(job, images)
    assert len(fused.slots) == 1


def test_a_trial_that_does_not_fit_alone_hears_of_it(many, room):
    shape, jobs = _large(1, 2)
    with _Device() as device:
        device.room = sum(room) / 2
        fused = Fused(shape, 2, many)
        for job in jobs:
            fused.enter(job)
        done = _finish(fused)
    assert sorted(done) == [1, 2]
    assert all(isinstance(job.record, torch.OutOfMemoryError) and "no room" in str(job.record) for job in done.values())


def test_an_array_that_does_not_fit_at_all_is_an_error(images):
    with _Device() as device:
        device.room = 1_000
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            Fused(SHAPE, 4, images)


def test_jobs_that_are_given_up_hear_why(images):
    fused = Fused(SHAPE, 1, images)
    for trial in (1, 2):
        fused.enter(_job(trial))
    assert fused.advance() == []  # an epoch of the first
    error = RuntimeError("the device is gone")
    assert [job.trial for job in fused.abandon(error)] == [1, 2]
    assert not fused.waiting
