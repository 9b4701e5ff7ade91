"""Training: every number follows from seed, trial and step; averages weigh images; faults have a name."""

import io
import math

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from tuner.vae import score
from tuner.vae import train as training
from tuner.vae.array import Array
from tuner.vae.data import pixels
from tuner.vae.extractor import FeatureExtractor
from tuner.vae.losses import RECONSTRUCTION, kl_divergence, squared_error
from tuner.vae.parameters import CLASSIC, Parameters
from tuner.vae.train import (
    Diverged,
    Record,
    State,
    StepInputs,
    Stream,
    derive_seed,
    learning_rate_factor,
    steps_per_epoch,
    train,
)

SMALL = Parameters(latent_dim=3, width=4, batch_size=16, learning_rate=3e-3, schedule="cosine", warmup_steps=2)
PER_EPOCH = 4  # 50 images in batches of 16: the last one has 2


@pytest.fixture(scope="module")
def images(digits):
    return digits.train.images[:50]


def _run(images, epochs, parameters=SMALL, state=None, seed=5, trial=1) -> tuple[State, list[Record]]:
    state = state or State.fresh(parameters, seed, trial)
    return state, list(train(state, parameters, images, epochs, seed=seed, trial=trial, total_epochs=4))


def _through_a_file(state: State, parameters=SMALL) -> State:
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    other = State.fresh(parameters, seed=999, trial=999)
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
    state = State.fresh(SMALL, 5, 1)
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
    whole = pixels(images)
    with torch.no_grad():
        expected = squared_error(state.model.decode(state.model.encode(whole)[0]), whole).mean().item()
    assert record.reconstruction == pytest.approx(expected, rel=1e-5)
    assert record.images == 50


def test_the_kl_record_is_the_mean_over_images_and_the_loss_its_weighted_sum(images):
    still = SMALL.model_copy(update={"learning_rate": 1e-12, "kl_weight": 0.3})
    state, (record,) = _run(images, [1], still)
    with torch.no_grad():
        expected = kl_divergence(*state.model.encode(pixels(images))).mean().item()
    assert record.kl == pytest.approx(expected, rel=1e-5)
    assert record.loss == pytest.approx(record.reconstruction + 0.3 * record.kl, rel=1e-6)


def test_every_image_is_fed_once_an_epoch_in_another_order_each_time():
    feed = StepInputs(SMALL, 50, seed=5, trial=1, total_epochs=4)
    batches = [feed.batch(step) for step in range(2 * PER_EPOCH)]
    assert [len(order) for order, _ in batches] == [16, 16, 16, 2] * 2
    assert all(noise.shape == (len(order), 3) for order, noise in batches)
    orders = [torch.cat([order for order, _ in batches[part : part + 4]]).tolist() for part in (0, 4)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])
    torch.testing.assert_close(feed.batch(1)[1], batches[1][1], rtol=0, atol=0)  # also after going back


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("model", ["vae", "autoencoder"])
def test_training_is_that_of_the_plain_network_with_pytorchs_adam(images, likelihood, model):
    changes = {"likelihood": likelihood, "model": model, "kl_warmup_epochs": 1.0, "kl_weight": 0.5}
    parameters = SMALL.model_copy(update=changes)
    state, records = _run(images, [1, 2], parameters)

    plain = State.fresh(parameters, 5, 1).model
    feed = StepInputs(parameters, len(images), seed=5, trial=1, total_epochs=4)
    optimizer = torch.optim.Adam(plain.parameters())
    losses = []
    for step in range(2 * PER_EPOCH):
        order, noise = feed.batch(step)
        batch = pixels(images[order])
        latents, log_variance = plain.encode(batch)
        kl = torch.zeros(())
        if log_variance is not None:
            kl = kl_divergence(latents, log_variance).mean()
            latents = latents + torch.exp(0.5 * log_variance) * noise
        kl = kl * 0.5 * min(1, step / PER_EPOCH)
        loss = RECONSTRUCTION[likelihood](plain.decode(latents), batch).mean() + kl
        optimizer.param_groups[0]["lr"] = 3e-3 * learning_rate_factor(parameters, step, 4 * PER_EPOCH)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() * len(order))
    assert [record.loss for record in records] == pytest.approx([sum(losses[:4]) / 50, sum(losses[4:]) / 50], rel=1e-5)
    moved = _weights(State.fresh(parameters, 5, 1)) - _weights(state)
    error = parameters_to_vector(plain.parameters()).detach() - _weights(state)
    assert error.norm() < 1e-3 * moved.norm()  # Adam divides by gradients that are near zero


def test_the_short_last_batch_counts_as_a_step():
    assert [steps_per_epoch(images, 16) for images in (1, 15, 16, 17, 48, 50)] == [1, 1, 1, 2, 3, 4]


def test_an_autoencoder_has_no_kl_and_no_use_for_its_weight(images):
    plain = SMALL.model_copy(update={"model": "autoencoder", "kl_weight": 0.0})
    light, records = _run(images, [1, 2], plain)
    heavy, _ = _run(images, [1, 2], plain.model_copy(update={"kl_weight": 50.0}))
    _assert_same(light, heavy)
    assert all(record.kl == 0 and record.loss == record.reconstruction for record in records)


def test_binary_pixels_are_drawn_anew_at_every_step(monkeypatch):
    grey = torch.full((16, 1, 28, 28), 64, dtype=torch.uint8)
    fed = []

    def watched(self, images, *rest):
        fed.append(images.clone())
        return backward(self, images, *rest)

    backward = Array.backward
    monkeypatch.setattr(Array, "backward", watched)
    _run(grey, [20], BINARY)
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


def test_a_derived_seed_is_pinned():
    assert derive_seed(7, 1, 2, 3) == 5168399538067399530  # old runs can't go on where this changes


def test_derived_seeds_have_63_bits_and_differ_for_every_path():
    paths = [
        (seed, trial, stream, step) for seed in (0, 1) for trial in range(9) for stream in Stream for step in (0, 1)
    ]
    seeds = [derive_seed(*path) for path in paths]
    assert len(set(seeds)) == len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


@pytest.mark.parametrize(("a", "b"), [((0, 1), (0, 1, 0)), ((3 + 5 * 2**32, 1), (3, 5, 1))])
def test_a_longer_path_or_a_larger_seed_is_no_other_path_in_disguise(a, b):
    assert derive_seed(*a) != derive_seed(*b)


def test_trials_and_scores_of_one_seed_share_no_numbers(images, digits, monkeypatch):
    used: dict[str, list[int]] = {}
    for module in (training, score):
        seeds = used[module.__name__] = []

        def spy(*path, seeds=seeds):
            seeds.append(derive_seed(*path))
            return seeds[-1]

        monkeypatch.setattr(module, "derive_seed", spy)
    parameters = SMALL.model_copy(update={"prior": "gaussian_mixture", "prior_components": 1})
    for trial in range(6):
        state, _ = _run(images, [1], parameters, trial=trial)
    scorer = score.Scorer(FeatureExtractor(1), digits.train, digits.validation, seed=5, count=50, prior_count=50)
    scorer(state.model, parameters, scorer.fit(state.model, parameters))
    trained, scored = used.values()
    assert len(set(trained)) == len(trained) == 6 * 3  # first weights, order, noise
    assert len(set(scored)) >= 4
    assert not set(trained) & set(scored)
