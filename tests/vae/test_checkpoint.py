"""Checkpoints: what is written comes back, nothing in them is run, and damage is told in one line."""

import io
import pickle
import zipfile
from collections.abc import Mapping

import pytest
import torch

from tuner.vae.checkpoint import Checkpoint
from tuner.vae.fitted import FittedModel
from tuner.vae.model import Builder
from tuner.vae.parameters import Parameters
from tuner.vae.prior import fit_mixture, standard_normal
from tuner.vae.shape import ImageShape
from tuner.vae.step import State
from tuner.vae.train import train

build = Builder(ImageShape(1, 28, 28))

PARAMETERS = Parameters(latent_dim=3, width=2, batch_size=16, prior="gaussian_mixture")
EVALUATION = {"epoch": 1.5, "mse": 0.1, "parts": {"train": 2.0}}


@pytest.fixture(scope="module")
def images(digits) -> torch.Tensor:
    return digits.train.images[:50]


def _train(state: State, images: torch.Tensor, epoch: float) -> State:
    list(train(state, PARAMETERS, images, [epoch], seed=5, trial=1, total_epochs=3))
    return state


@pytest.fixture
def checkpoint(images) -> Checkpoint:
    state = _train(State.fresh(build, PARAMETERS, 5, 1), images, 1.5)
    latents = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    best = FittedModel(state.model, PARAMETERS, fit_mixture(latents, 2, seed=0), 0.5, 1.5, {"mse": 0.1})
    return Checkpoint(PARAMETERS, state, best.snapshot(), EVALUATION)


def test_a_checkpoint_comes_back_whole(checkpoint):
    again = Checkpoint.from_bytes(checkpoint.to_bytes())
    assert again.parameters == PARAMETERS
    torch.testing.assert_close(again.state.state_dict(), checkpoint.state.state_dict(), rtol=0, atol=0)
    best, kept = again.best, checkpoint.best
    for ours, theirs in ((best.model, kept.model), (best.prior, kept.prior)):
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    assert (best.parameters, best.temperature, best.epoch, best.scores) == (PARAMETERS, 0.5, 1.5, {"mse": 0.1})
    assert again.evaluation == EVALUATION


def test_a_checkpoint_before_the_first_evaluation_has_no_best(images):
    state = State.fresh(build, PARAMETERS, 5, 1)
    again = Checkpoint.from_bytes(Checkpoint(PARAMETERS, state).to_bytes())
    assert (again.best, again.evaluation, again.state.step) == (None, {}, 0)


def _mse(scores: Mapping[str, float]) -> float:
    return scores["mse"]


def _scored(state: State, *values: float) -> list[FittedModel]:
    """Evaluations of one training, epoch after epoch, with these errors."""
    return [
        FittedModel(state.model, PARAMETERS, standard_normal(3), epoch=epoch, scores={"mse": value})
        for epoch, value in enumerate(values, 1)
    ]


@pytest.mark.parametrize(
    ("values", "cost", "epoch"),
    [((3, 3, 1, 5, 1, 2), _mse, 3), ((1, 3, 2), lambda scores: -scores["mse"], 2), ((4,), _mse, 1)],
)
def test_the_best_evaluation_is_kept_and_of_equal_ones_the_earlier(values, cost, epoch):
    state = State.fresh(build, PARAMETERS, 5, 1)
    checkpoint = Checkpoint(PARAMETERS, state)
    for fitted in _scored(state, *values):
        checkpoint.keep(fitted, cost)
    for held in (checkpoint, Checkpoint.from_bytes(checkpoint.to_bytes())):
        assert (held.best.epoch, held.best.scores) == (epoch, {"mse": values[epoch - 1]})


def test_what_is_kept_stays_as_it_was_scored_while_training_goes_on(images):
    state = State.fresh(build, PARAMETERS, 5, 1)
    checkpoint, weights = Checkpoint(PARAMETERS, state), []
    for fitted in _scored(state, 2, 1):
        _train(state, images, fitted.epoch)
        weights.append({name: value.clone() for name, value in state.model.state_dict().items()})
        checkpoint.keep(fitted, _mse)
    _train(state, images, 3)
    for held in (checkpoint, Checkpoint.from_bytes(checkpoint.to_bytes())):
        torch.testing.assert_close(dict(held.best.model.state_dict()), weights[1], rtol=0, atol=0)
        torch.testing.assert_close(dict(held.state.model.state_dict()), dict(state.model.state_dict()), rtol=0, atol=0)
    assert not torch.equal(weights[0]["mean.weight"], weights[1]["mean.weight"])
    assert not torch.equal(weights[1]["mean.weight"], state.model.mean.weight)


def test_training_goes_on_from_bytes_as_if_it_had_never_stopped(checkpoint, images):
    state = Checkpoint.from_bytes(checkpoint.to_bytes()).state
    straight = State.fresh(build, PARAMETERS, 5, 1)
    for going_on in (state, straight):
        _train(going_on, images, 3)
    torch.testing.assert_close(state.state_dict(), straight.state_dict(), rtol=0, atol=0)


def _refused(content: bytes) -> str:
    with pytest.raises(ValueError, match=r"\S") as error:
        Checkpoint.from_bytes(content)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
def test_a_truncated_one_is_refused_in_one_line(checkpoint, keep):
    content = checkpoint.to_bytes()
    assert "not PyTorch's format" in _refused(content[: int(keep if keep >= 1 else keep * len(content))])


def test_one_bit_of_a_weight_is_enough_to_be_refused(checkpoint):
    """In the middle of the largest record: PyTorch reads it without a word."""
    content = bytearray(checkpoint.to_bytes())
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        largest = max(file.infolist(), key=lambda record: record.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    torch.load(io.BytesIO(content), weights_only=True)
    assert "checksum" in _refused(bytes(content))


def test_nothing_in_it_is_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("run").touch, ())

    for write in (torch.save, pickle.dump):
        file = io.BytesIO()
        write({"parameters": Bomb()}, file)
        _refused(file.getvalue())
    assert not any(tmp_path.iterdir())


def _saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("content", [None, [], {}, "text", torch.zeros(3), {"parameters": {}}])
def test_other_content_is_refused_in_one_line(content):
    assert "it holds something else" in _refused(_saved(content))


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("parameters", {"latent_dim": 0, "beta": 1}),
        ("parameters", PARAMETERS.model_copy(update={"width": 3}).model_dump()),
        ("state", None),
        ("state", {}),
        ("best", 7),
        ("best", [7]),
        ("best", {}),
        ("best", torch.zeros(3)),
        ("evaluation", None),
        ("evaluation", 7),
    ],
)
def test_one_wrong_part_is_refused_in_one_line(checkpoint, part, value):
    content = torch.load(io.BytesIO(checkpoint.to_bytes()), weights_only=True)
    assert "it holds something else" in _refused(_saved(content | {part: value}))


@pytest.mark.parametrize("value", [torch.zeros(2, 7), torch.zeros(3), None])
def test_averages_of_other_weights_are_refused_in_one_line(checkpoint, value):
    content = torch.load(io.BytesIO(checkpoint.to_bytes()), weights_only=True)
    content["state"]["averages"] = value
    assert "it holds something else" in _refused(_saved(content))
