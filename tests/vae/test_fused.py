"""A fused array gives each trial what it gets alone, whoever its neighbours are and whenever it came."""

import io

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from tuner.vae.array import Array
from tuner.vae.fused import Fused, Job, shape_of
from tuner.vae.parameters import Parameters
from tuner.vae.train import Diverged, Record, State, train

WIDEST, EPOCHS, SEED = 6, 3, 5
COMMON = {"width": 4, "batch_size": 16}
TRIALS = {
    1: Parameters(latent_dim=3, learning_rate=3e-3, kl_weight=0.1, schedule="cosine", warmup_steps=3, **COMMON),
    2: Parameters(latent_dim=6, learning_rate=1e-3, kl_weight=1.0, **COMMON),
    3: Parameters(latent_dim=1, learning_rate=8e-3, kl_weight=0.5, kl_warmup_epochs=1.0, **COMMON),
    4: Parameters(latent_dim=4, learning_rate=2e-3, kl_weight=0.0, **COMMON),
}
TOLERANCE = 2e-3  # of how far the weights moved: Adam divides by gradients that are near zero


@pytest.fixture(scope="module")
def images(digits):
    return digits.train.images[:50]  # four batches an epoch, the last of 2 images


def _alone(trial: int, images, epoch: float = EPOCHS) -> tuple[State, Record]:
    state = State.fresh(TRIALS[trial], SEED, trial)
    (record,) = train(state, TRIALS[trial], images, [epoch], seed=SEED, trial=trial, total_epochs=EPOCHS)
    return state, record


def _job(trial: int, epoch: float = EPOCHS, state: State | None = None) -> Job:
    state = state or State.fresh(TRIALS[trial], SEED, trial)
    return Job(trial, TRIALS[trial], state, epoch, SEED, EPOCHS)


def _finish(fused: Fused) -> dict[int, Job]:
    done = {}
    while fused.busy:
        done |= {job.trial: job for job in fused.advance()}
    return done


def _assert_as_alone(job: Job, images) -> None:
    state, record = _alone(job.trial, images, job.epoch)
    assert isinstance(job.record, Record)
    assert (job.record.epoch, job.record.step, job.state.step) == (record.epoch, record.step, record.step)
    start = parameters_to_vector(State.fresh(job.parameters, SEED, job.trial).model.parameters())
    ours, theirs = (parameters_to_vector(s.model.parameters()) for s in (job.state, state))
    assert (ours - theirs).norm() <= TOLERANCE * (theirs - start).norm()
    assert (job.state.moments - state.moments).norm() <= TOLERANCE * state.moments.norm()


def test_trials_of_different_size_and_rate_get_the_scores_they_get_alone(images):
    fused = Fused(shape_of(TRIALS[1], WIDEST), 4, images)
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
    fused = Fused(shape_of(TRIALS[1], WIDEST), 2, images)
    for trial, epoch in ((1, 1.5), (2, 3), (3, 2), (4, 0.5)):
        fused.enter(_job(trial, epoch))
    assert len(fused.waiting) == 4
    done = _finish(fused)
    assert sorted(done) == sorted(TRIALS)
    assert fused.steps == 14  # 6 + 8 in one slot, 12 + 2 in the other
    for job in done.values():
        _assert_as_alone(job, images)


def test_a_trial_goes_on_from_a_file_in_another_array(images):
    first = Fused(shape_of(TRIALS[1], WIDEST), 2, images)
    for trial in (1, 2):
        first.enter(_job(trial, 1.5))
    halfway = _finish(first)
    second = Fused(shape_of(TRIALS[1], WIDEST), 3, images)
    second.enter(_job(4))
    for trial, job in halfway.items():
        file = io.BytesIO()
        torch.save(job.state.state_dict(), file)
        file.seek(0)
        state = State.fresh(TRIALS[trial], 99, 99)
        state.load_state_dict(torch.load(file, weights_only=True))
        second.enter(_job(trial, state=state))
    for job in _finish(second).values():
        _assert_as_alone(job, images)


def test_a_trial_that_diverges_leaves_its_neighbours_alone(images):
    wild = TRIALS[2].model_copy(update={"learning_rate": 1e10})
    fused = Fused(shape_of(wild, WIDEST), 2, images)
    fused.enter(Job(2, wild, State.fresh(wild, SEED, 2), EPOCHS, SEED, EPOCHS))
    fused.enter(_job(1))
    fused.enter(_job(3))
    done = _finish(fused)
    assert isinstance(done[2].record, Diverged)
    assert "not finite at epoch" in str(done[2].record)
    _assert_as_alone(done[1], images)
    _assert_as_alone(done[3], images)  # in the slot that the wild one left


def test_where_memory_runs_out_the_array_shrinks_and_the_trials_go_on(images, monkeypatch):
    backward = Array.backward

    def limited(self, *arguments):
        if self.slots > 1 and fused.steps > 5:
            raise torch.OutOfMemoryError
        return backward(self, *arguments)

    fused = Fused(shape_of(TRIALS[1], WIDEST), 4, images)
    monkeypatch.setattr(Array, "backward", limited)
    for trial in TRIALS:
        fused.enter(_job(trial))
    done = _finish(fused)
    assert sorted(done) == sorted(TRIALS)
    assert len(fused.slots) == 1
    for job in done.values():
        _assert_as_alone(job, images)


def test_an_array_that_does_not_fit_begins_with_fewer_slots(images, monkeypatch):
    begin = Array.__init__

    def limited(self, parameters, slots=1, device="cpu"):
        if slots > 1:
            raise torch.OutOfMemoryError
        begin(self, parameters, slots, device)

    monkeypatch.setattr(Array, "__init__", limited)
    fused = Fused(shape_of(TRIALS[1], WIDEST), 4, images)
    assert len(fused.slots) == 1
    fused.enter(_job(1))
    fused.enter(_job(2))
    for job in _finish(fused).values():
        assert isinstance(job.record, Record)
    assert fused.steps == 2 * 12


def test_a_trial_that_does_not_fit_alone_hears_of_it(images, monkeypatch):
    def full(self, *arguments):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Array, "backward", full)
    fused = Fused(shape_of(TRIALS[1], WIDEST), 2, images)
    fused.enter(_job(1))
    fused.enter(_job(2))
    done = _finish(fused)
    assert sorted(done) == [1, 2]
    assert all(isinstance(job.record, torch.OutOfMemoryError) and "no room" in str(job.record) for job in done.values())
