"""Steps: the written-out one is autograd's, the reference is PyTorch's, and a model of another class is trained too."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from tuner.vae.data import as_floats
from tuner.vae.losses import RECONSTRUCTION, kl_divergence
from tuner.vae.model import VAE, Builder, Model
from tuner.vae.parameters import Parameters
from tuner.vae.shape import ImageShape
from tuner.vae.step import AutogradStep, Factors, State, WrittenOutStep, fastest_step
from tuner.vae.train import StepInputs, train

build = Builder(ImageShape(1, 28, 28))

CPU = torch.device("cpu")
AVERAGES = ("exp_avg", "exp_avg_sq")  # as PyTorch's Adam calls them
IMAGES = 50  # in batches of 16: the last one has 2
KINDS = [(likelihood, model) for likelihood in ("gaussian", "bernoulli") for model in ("vae", "autoencoder")]
SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 20, 36)]
TOLERANCE = 1e-3  # of how far the weights moved: Adam divides by gradients that are near zero


def _parameters(likelihood: str = "gaussian", model: str = "vae") -> Parameters:
    rates = {"learning_rate": 3e-3, "schedule": "cosine", "kl_weight": 0.5, "kl_warmup_epochs": 1.0}
    return Parameters(latent_dim=3, width=4, batch_size=16, likelihood=likelihood, model=model, **rates)


@pytest.fixture(scope="module")
def images(digits) -> torch.Tensor:
    return digits.train.images[:IMAGES]


def _fresh(parameters: Parameters, images: torch.Tensor) -> State:
    return State.fresh(Builder(ImageShape(*images.shape[1:])), parameters, seed=0, trial=1)


def _noise_images(count: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.randint(256, (count, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def _assert_same_gradients(parameters: Parameters, images: torch.Tensor) -> None:
    written, reference = (_fresh(parameters, images) for _ in range(2))
    ours, theirs = WrittenOutStep(written, parameters, CPU), AutogradStep(reference, parameters, CPU)
    batch, noise = as_floats(images), torch.randn(len(images), 3, generator=torch.Generator().manual_seed(1))
    factors = Factors(learning_rate=1e-3, kl=0.7)
    torch.testing.assert_close(ours(batch, noise, factors), theirs(batch, noise, factors), rtol=1e-5, atol=1e-5)
    ours.array.flat[0] = ours.array.gradients  # so that `store` hands the gradients out
    ours.store()
    for gradient, weight in zip(written.model.parameters(), theirs.model.parameters(), strict=True):
        assert (gradient - weight.grad).abs().max() <= 1e-5 * weight.grad.abs().max()


def _assert_same_training(parameters: Parameters, images: torch.Tensor) -> None:
    start = _weights(_fresh(parameters, images).model)
    states, losses = [], []
    for make_step in (WrittenOutStep, AutogradStep):
        state = _fresh(parameters, images)
        options = {"seed": 5, "trial": 1, "total_epochs": 3, "make_step": make_step}
        records = train(state, parameters, images, [1, 2, 3], **options)
        losses.append(torch.tensor([[record.loss, record.reconstruction, record.kl] for record in records]))
        states.append(state)
    ours, theirs = states
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    moved = (_weights(theirs.model) - start).norm()
    assert (_weights(ours.model) - _weights(theirs.model)).norm() < TOLERANCE * moved
    for our_average, their_average in zip(ours.averages, theirs.averages, strict=True):
        assert (our_average - their_average).norm() < TOLERANCE * their_average.norm()
    assert ours.step == theirs.step == 3 * -(-len(images) // 16)
    assert ours.mse == pytest.approx(theirs.mse, rel=1e-4)


def test_in_bfloat16_both_steps_come_to_nearly_the_same_losses(images):
    found = []
    for precision in ("float32", "bfloat16"):
        parameters = _parameters().model_copy(update={"precision": precision})
        for make_step in (WrittenOutStep, AutogradStep):
            state = _fresh(parameters, images)
            *_, record = train(state, parameters, images, [3], seed=5, trial=1, total_epochs=3, make_step=make_step)
            assert {tensor.dtype for tensor in state.state_dict()["model"].values()} == {torch.float32}
            found.append(record.loss)
    exact, _, written, autograd = found
    assert written != exact
    assert [written, autograd] == pytest.approx([exact] * 2, rel=1e-2)


def _weights(model: Model) -> torch.Tensor:
    return parameters_to_vector(model.parameters()).detach()


def _run(step, parameters: Parameters, images: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Steps `first` to `last` on what `train` would feed them -> (steps, 3) losses."""
    inputs = StepInputs(parameters, len(images), 3, seed=5, trial=1, total_epochs=3)
    losses = []
    for number in range(first, last):
        order, noise = inputs.batch(number)
        losses.append(step(as_floats(images[order]), noise, inputs.factors(number)).clone())
    return torch.stack(losses)


@pytest.mark.parametrize(("likelihood", "kind"), KINDS)
def test_the_written_out_step_has_the_losses_and_gradients_of_autograd(images, likelihood, kind):
    _assert_same_gradients(_parameters(likelihood, kind), images[:7])


@pytest.mark.parametrize("shape", SHAPES)
def test_it_has_them_for_images_of_any_shape(shape):
    _assert_same_gradients(_parameters(), _noise_images(7, shape))


@pytest.mark.parametrize(("likelihood", "kind"), KINDS)
def test_three_epochs_leave_the_weights_and_averages_that_autograd_leaves(images, likelihood, kind):
    _assert_same_training(_parameters(likelihood, kind), images)


@pytest.mark.parametrize("shape", SHAPES)
def test_they_do_for_images_of_any_shape_with_the_kl_weight_in_calibrated_units(shape):
    _assert_same_training(_parameters().model_copy(update={"kl_unit": "calibrated"}), _noise_images(20, shape))


def test_the_calibrated_unit_is_twice_the_running_mean_of_the_squared_error(images):
    parameters = _parameters().model_copy(update={"kl_unit": "calibrated"})
    state = _fresh(parameters, images)
    step = WrittenOutStep(state, parameters, CPU)
    mean = None
    for loss, reconstruction, kl in _run(step, parameters, images, 0, 6).tolist():
        found = reconstruction / 784
        mean = found if mean is None else mean + 0.02 * (found - mean)
        factor = (loss - reconstruction) / kl if kl > 1e-3 else None
        step.store()
    assert state.mse == pytest.approx(mean, rel=1e-5)
    inputs = StepInputs(parameters, len(images), 3, seed=5, trial=1, total_epochs=3)
    assert factor is None or factor == pytest.approx(inputs.factors(5).kl * 2 * mean, rel=1e-2)


@pytest.mark.parametrize(("likelihood", "kind"), KINDS)
def test_the_reference_is_the_losses_autograd_and_pytorchs_adam(images, likelihood, kind):
    parameters = _parameters(likelihood, kind)
    state = State.fresh(build, parameters, seed=0, trial=1)
    plain = copy.deepcopy(state.model)
    step = AutogradStep(state, parameters, CPU)
    losses = _run(step, parameters, images, 0, 6)
    step.store()

    inputs = StepInputs(parameters, IMAGES, 3, seed=5, trial=1, total_epochs=3)
    optimizer = torch.optim.Adam(plain.parameters())
    for number, (loss, reconstruction, kl) in enumerate(losses):
        order, noise = inputs.batch(number)
        batch, factors = as_floats(images[order]), inputs.factors(number)
        latents, log_variance = plain.encode(batch)
        expected = torch.zeros(())
        if log_variance is not None:
            expected = kl_divergence(latents, log_variance).mean()
            latents = latents + torch.exp(0.5 * log_variance) * noise
        torch.testing.assert_close(kl, expected.detach(), rtol=1e-4, atol=1e-4)
        error = RECONSTRUCTION[likelihood](plain.decode(latents), batch).mean()
        torch.testing.assert_close(reconstruction, error.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loss, (error + factors.kl * expected).detach(), rtol=1e-4, atol=1e-4)
        optimizer.param_groups[0]["lr"] = factors.learning_rate
        optimizer.zero_grad()
        (error + factors.kl * expected).backward()
        optimizer.step()
    moved = _weights(State.fresh(build, parameters, seed=0, trial=1).model) - _weights(plain)
    assert (_weights(state.model) - _weights(plain)).norm() < TOLERANCE * moved.norm()
    averages = [[optimizer.state[weight][name].flatten() for weight in plain.parameters()] for name in AVERAGES]
    for ours, theirs in zip(state.averages, averages, strict=True):
        assert (ours - torch.cat(theirs)).norm() < TOLERANCE * torch.cat(theirs).norm()


@pytest.mark.parametrize("make_step", [WrittenOutStep, AutogradStep])
@pytest.mark.parametrize("unit", ["absolute", "calibrated"])
def test_a_state_learns_of_its_steps_when_they_are_stored_and_goes_on_to_the_bit(images, make_step, unit):
    parameters = _parameters().model_copy(update={"kl_unit": unit})
    straight, halfway = (State.fresh(build, parameters, seed=0, trial=1) for _ in range(2))
    step = make_step(straight, parameters, CPU)
    _run(step, parameters, images, 0, 9)
    torch.testing.assert_close(straight.state_dict(), halfway.state_dict(), rtol=0, atol=0)
    step.store()
    for first, last in ((0, 5), (5, 9)):
        step = make_step(halfway, parameters, CPU)
        _run(step, parameters, images, first, last)
        step.store()
    torch.testing.assert_close(straight.state_dict(), halfway.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["vae", "autoencoder"])
def test_the_built_in_family_gets_the_written_out_step_and_any_other_model_the_reference(kind):
    built_in = State.fresh(build, _parameters(model=kind), seed=0, trial=1)
    assert isinstance(fastest_step(built_in, _parameters(), CPU), WrittenOutStep)
    for other in (_Foreign(), _Inverted(ImageShape(1, 28, 28), 4)):
        assert isinstance(fastest_step(State.of(other), _parameters(), CPU), AutogradStep)


class _Inverted(VAE):
    """A user's own that computes something else than what it inherits from."""

    def decode(self, latents: Tensor) -> Tensor:
        return -super().decode(latents)


class _Foreign(Model):
    """Nothing like the built-in family: dense layers, batch normalization with its running means, and tied weights."""

    latent_dim = 3

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.shrink, self.heads = nn.Linear(784, 20), nn.Linear(20, 6)
            self.normalize, self.grow = nn.BatchNorm1d(20), nn.Linear(3, 20)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = self.heads(self.normalize(self.shrink(images.flatten(1))).tanh()).chunk(2, 1)
        return mean, log_variance

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (self.grow(latents).tanh() @ self.shrink.weight).unflatten(1, (1, 28, 28))


def _through_a_file(state: State) -> State:
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    other = State.of(_Foreign(seed=99))
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def _train(state: State, parameters: Parameters, images: torch.Tensor, epochs: list[float]) -> list[float]:
    return [
        record.loss for record in train(state, parameters, images, epochs, seed=5, trial=1, total_epochs=epochs[-1])
    ]


def test_a_model_of_another_class_learns(images):
    state = State.of(_Foreign())
    losses = _train(state, _parameters().model_copy(update={"schedule": "constant"}), images, [1, 10, 20])
    assert losses[2] < 0.9 * losses[0]
    assert state.step == 80
    assert state.model.normalize.num_batches_tracked == 80


def test_a_model_of_another_class_goes_on_from_a_file_to_the_bit_running_means_included(images):
    parameters = _parameters().model_copy(update={"schedule": "constant"})
    straight, state = State.of(_Foreign()), State.of(_Foreign())
    _train(straight, parameters, images, [3])
    _train(state, parameters, images, [1.5])
    state.model.eval()  # as an evaluation leaves it
    state = _through_a_file(state)
    _train(state, parameters, images, [3])
    torch.testing.assert_close(state.state_dict(), straight.state_dict(), rtol=0, atol=0)
    assert state.model.normalize.running_mean.any()
    assert state.averages.shape == (2, _weights(state.model).numel())


def test_a_fresh_state_follows_seed_and_trial_and_has_no_averages_yet():
    first, again = (State.fresh(build, _parameters(), seed=0, trial=1) for _ in range(2))
    assert torch.equal(_weights(first.model), _weights(again.model))
    for other in (
        State.fresh(build, _parameters(), seed=1, trial=1),
        State.fresh(build, _parameters(), seed=0, trial=2),
    ):
        assert not torch.equal(_weights(first.model), _weights(other.model))
    assert (first.step, first.averages.any().item()) == (0, False)
