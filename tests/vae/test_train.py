"""Training: every number follows from seed, trial and step; averages weigh images; faults have a name."""

import io
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from tuner.vae.data import as_floats
from tuner.vae.losses import Diverged, kl_divergence, squared_error
from tuner.vae.model import Builder, Model
from tuner.vae.parameters import CLASSIC, Parameters
from tuner.vae.shape import ImageShape
from tuner.vae.step import State
from tuner.vae.train import Record, StepInputs, learning_rate_factor, steps_per_epoch, stops, train

build = Builder(ImageShape(1, 28, 28))

SMALL = Parameters(latent_dim=3, width=4, batch_size=16, learning_rate=3e-3, schedule="cosine", warmup_steps=2)
PER_EPOCH = 4  # 50 images in batches of 16: the last one has 2


@pytest.fixture(scope="module")
def images(digits):
    return digits.train.images[:50]


def _run(images, epochs, parameters=SMALL, state=None, seed=5, trial=1) -> tuple[State, list[Record]]:
    state = state or State.fresh(build, parameters, seed, trial)
    return state, list(train(state, parameters, images, epochs, seed=seed, trial=trial, total_epochs=4))


def _through_a_file(state: State, parameters=SMALL) -> State:
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    other = State.fresh(build, parameters, seed=999, trial=999)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def _assert_same(a: State, b: State) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def _weights(state: State) -> torch.Tensor:
    return parameters_to_vector(state.model.parameters()).detach()


def test_the_same_seed_and_trial_give_the_same_bits_whatever_ran_before(images):
    first, _ = _run(images, [2])
    torch.manual_seed(77)
    torch.randn(100)
    before = torch.random.get_rng_state()
    again, _ = _run(images, [2])
    _assert_same(first, again)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("other", [{"trial": 2}, {"seed": 6}])
def test_another_trial_or_seed_gives_other_numbers(images, other):
    first, (record,) = _run(images, [2])
    second, (other_record,) = _run(images, [2], **other)
    assert not torch.equal(_weights(first), _weights(second))
    assert record.loss != other_record.loss


BINARY = SMALL.model_copy(update={"likelihood": "bernoulli", "pixels": "binary"})


@pytest.mark.parametrize("parameters", [SMALL, SMALL.model_copy(update={"model": "autoencoder"}), BINARY])
@pytest.mark.parametrize("stop", [2, 0.5, 1.75])
def test_a_stop_through_a_file_and_on_equals_four_epochs_straight_bit_for_bit(images, stop, parameters):
    straight, _ = _run(images, [4], parameters)
    state, _ = _run(images, [stop], parameters)
    state = _through_a_file(state, parameters)
    _run(images, [stop, 4], parameters, state)
    _assert_same(state, straight)


def test_evaluating_every_half_epoch_changes_nothing(images):
    straight, (whole,) = _run(images, [2])
    often, records = _run(images, [0.5, 1, 1.5, 2])
    _assert_same(often, straight)
    assert [(record.epoch, record.step) for record in records] == [(0.5, 2), (1, 4), (1.5, 6), (2, 8)]
    assert [record.images for record in records] == [32, 18, 32, 18]
    for name in ("loss", "reconstruction", "kl"):
        parts = sum(getattr(record, name) * record.images for record in records) / 100
        assert parts == pytest.approx(getattr(whole, name), rel=1e-5)


def test_leaving_the_generator_between_records_changes_nothing(images):
    straight, _ = _run(images, [2])
    state = State.fresh(build, SMALL, 5, 1)
    for epochs in ([0.5, 2], [0.5, 1, 2], [1.5, 2], [2]):
        next(train(state, SMALL, images, epochs, seed=5, trial=1, total_epochs=4))
    _assert_same(state, straight)


def test_epochs_already_behind_are_skipped(images):
    state, _ = _run(images, [2])
    _, records = _run(images, [1, 2, 3], state=state)
    assert [record.epoch for record in records] == [3]
    assert state.step == 3 * PER_EPOCH


def test_averages_weigh_images_when_the_batch_does_not_divide_them(images):
    still = SMALL.model_copy(update={"model": "autoencoder", "learning_rate": 1e-12})
    state, (record,) = _run(images, [1], still)
    whole = as_floats(images)
    with torch.no_grad():
        expected = squared_error(state.model.decode(state.model.encode(whole)[0]), whole).mean().item()
    assert record.reconstruction == pytest.approx(expected, rel=1e-5)
    assert record.images == 50


def test_the_kl_record_is_the_mean_over_images_and_the_loss_its_weighted_sum(images):
    still = SMALL.model_copy(update={"learning_rate": 1e-12, "kl_weight": 0.3})
    state, (record,) = _run(images, [1], still)
    with torch.no_grad():
        expected = kl_divergence(*state.model.encode(as_floats(images))).mean().item()
    assert record.kl == pytest.approx(expected, rel=1e-5)
    assert record.loss == pytest.approx(record.reconstruction + 0.3 * record.kl, rel=1e-6)


def test_every_image_is_fed_once_an_epoch_in_another_order_each_time():
    inputs = StepInputs(SMALL, 50, 3, seed=5, trial=1, total_epochs=4)
    batches = [inputs.batch(step) for step in range(2 * PER_EPOCH)]
    assert [len(order) for order, _ in batches] == [16, 16, 16, 2] * 2
    assert all(noise.shape == (len(order), 3) for order, noise in batches)
    orders = [torch.cat([order for order, _ in batches[part : part + 4]]).tolist() for part in (0, 4)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])
    torch.testing.assert_close(inputs.batch(1)[1], batches[1][1], rtol=0, atol=0)  # also after going back


def test_the_short_last_batch_counts_as_a_step():
    assert [steps_per_epoch(images, 16) for images in (1, 15, 16, 17, 48, 50)] == [1, 1, 1, 2, 3, 4]


def test_epochs_end_at_whole_steps_one_at_least_and_the_last_of_those_that_share_one_counts():
    assert stops(SMALL, 50, [0.01, 0.1, 0.5, 1, 2.13]) == {1: 0.1, 2: 0.5, 4: 1, 9: 2.13}
    assert stops(SMALL, 50, [0.5, 1, 2], behind=4) == {8: 2}


def test_an_autoencoder_has_no_kl_and_no_use_for_its_weight(images):
    plain = SMALL.model_copy(update={"model": "autoencoder", "kl_weight": 0.0})
    light, records = _run(images, [1, 2], plain)
    heavy, _ = _run(images, [1, 2], plain.model_copy(update={"kl_weight": 50.0}))
    _assert_same(light, heavy)
    assert all(record.kl == 0 and record.loss == record.reconstruction for record in records)


def test_binary_pixels_are_drawn_anew_at_every_step():
    fed = []

    class Watching(Model):
        """Keeps what it is fed."""

        latent_dim = 3

        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(1, 28, 28))

        def encode(self, images):
            fed.append(images)
            return images.new_zeros(len(images), 3), None

        def decode(self, latents):
            return self.logits.expand(len(latents), 1, 28, 28)

    grey = torch.full((16, 1, 28, 28), 64, dtype=torch.uint8)
    _run(grey, [20], BINARY, State.of(Watching()))
    assert len(fed) == 20
    drawn = torch.stack(fed)
    assert set(drawn.unique().tolist()) == {0, 1}
    assert not torch.equal(drawn[0], drawn[1])
    assert drawn.mean().item() == pytest.approx(64 / 255, abs=5 * 0.5 / drawn.numel() ** 0.5)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_training_lowers_the_loss(images, likelihood):
    eager = SMALL.model_copy(update={"likelihood": likelihood, "learning_rate": 0.01, "schedule": "constant"})
    _, records = _run(images, [1, 10, 20], eager)
    assert records[2].loss < 0.9 * records[0].loss


def test_learning_rate_warms_up_linearly_to_its_full_value():
    parameters = CLASSIC.model_copy(update={"warmup_steps": 4})
    factors = [learning_rate_factor(parameters, step, 100) for step in range(7)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert [learning_rate_factor(CLASSIC, step, 100) for step in (0, 50, 200)] == [1, 1, 1]


def test_cosine_falls_from_one_through_a_half_to_zero_and_stays_there():
    parameters = CLASSIC.model_copy(update={"schedule": "cosine"})
    factors = [learning_rate_factor(parameters, step, 100) for step in (0, 25, 50, 100, 150)]
    assert factors == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0, 0])


def test_warm_up_and_cosine_multiply():
    parameters = CLASSIC.model_copy(update={"schedule": "cosine", "warmup_steps": 99})
    assert learning_rate_factor(parameters, 49, 98) == pytest.approx(0.5 * 0.5)


def test_the_kl_factor_rises_linearly_from_zero_over_its_warm_up(images):
    parameters = SMALL.model_copy(update={"kl_weight": 2.0, "kl_warmup_epochs": 1.5})
    _, records = _run(images, [step / PER_EPOCH for step in range(1, 9)], parameters)
    factors = [(record.loss - record.reconstruction) / record.kl for record in records]
    assert factors == pytest.approx([2 * min(1, step / 6) for step in range(8)], abs=0.02)


@pytest.mark.parametrize("wild", [{"learning_rate": 1e10}, {"kl_weight": 1e39}])
def test_a_loss_that_is_not_finite_is_named(images, wild):
    with pytest.raises(Diverged, match="not finite at epoch"):
        _run(images, [1, 2], SMALL.model_copy(update=wild | {"schedule": "constant", "warmup_steps": 0}))
