"""A tiny export written by hand: it encodes, decodes and samples; a damaged one is refused by file name."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from tuner.vae.codec import load, negative_elbo
from tuner.vae.data import as_floats
from tuner.vae.fitted import FittedModel
from tuner.vae.model import VAE, Builder
from tuner.vae.parameters import Parameters
from tuner.vae.prior import standard_normal
from tuner.vae.shape import ImageShape

DIGITS = ImageShape(1, 28, 28)
build = Builder(DIGITS)

PARAMETERS, TEMPERATURE = Parameters(latent_dim=3, width=4), 0.5
FILES = ("config.json", "model.safetensors", "prior.safetensors")
IMAGES = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _write(path: Path, parameters: Parameters = PARAMETERS, shape: ImageShape = DIGITS) -> VAE:
    model = Builder(shape)(parameters, seed=4)
    save_file(model.state_dict(), path / "model.safetensors")
    save_file(standard_normal(3).state_dict(), path / "prior.safetensors")
    (path / "config.json").write_text(
        json.dumps(
            {
                "images": {"shape": list(shape), "values": [0, 1], "ink": True, "resize": None},
                "parameters": parameters.model_dump(),
                "temperature": TEMPERATURE,
                "test": {"mse": 0.5},
            }
        )
    )
    return model


@pytest.mark.parametrize("kind", ["vae", "autoencoder"])
def test_encoding_gives_the_models_means(tmp_path, kind):
    model = _write(tmp_path, PARAMETERS.model_copy(update={"model": kind}))
    expected, _ = model.encode(as_floats(IMAGES))
    assert torch.equal(load(tmp_path).encode(IMAGES), expected.detach())


def test_bytes_floats_arrays_and_a_missing_channel_axis_mean_the_same_images(tmp_path):
    _write(tmp_path)
    codec = load(str(tmp_path))
    expected = codec.encode(IMAGES)
    last = IMAGES.permute(0, 2, 3, 1)
    forms = [IMAGES[:, 0], as_floats(IMAGES), as_floats(IMAGES).double(), IMAGES.numpy(), IMAGES[:, 0].numpy() / 255]
    for images in [*forms, last, last.numpy()]:
        torch.testing.assert_close(codec.encode(images), expected)


def test_colour_images_may_have_their_channels_first_or_last(tmp_path):
    model = _write(tmp_path, shape=ImageShape(3, 32, 32))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codec, last = load(tmp_path), images.permute(0, 2, 3, 1)
    expected = model.encode(as_floats(images))[0].detach()
    for given in (images, last, last.numpy(), as_floats(images), as_floats(last.contiguous()).numpy()):
        torch.testing.assert_close(codec.encode(given), expected)
    assert codec.sample(2).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("shape", [(28, 28), (5, 3, 28, 28), (5, 1, 28, 27), (5, 784), (1, 5, 1, 28, 28)])
def test_images_of_another_shape_are_refused_with_both_shapes(tmp_path, shape):
    _write(tmp_path)
    expected = "(B, 1, 28, 28) or (B, 28, 28, 1) or (B, 28, 28)"
    with pytest.raises(ValueError, match=re.escape(f"images are {shape}; expected {expected}")):
        load(tmp_path).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(32, 32, 3), (5, 32, 32), (5, 1, 32, 32), (5, 3, 28, 28)])
def test_other_than_colour_images_of_the_right_size_are_refused_by_a_colour_model(tmp_path, shape):
    _write(tmp_path, shape=ImageShape(3, 32, 32))
    expected = f"images are {shape}; expected (B, 3, 32, 32) or (B, 32, 32, 3)"
    with pytest.raises(ValueError, match=re.escape(expected)):
        load(tmp_path).encode(torch.zeros(shape))


@pytest.mark.parametrize(
    "images",
    [
        torch.full((2, 28, 28), 255.0),
        torch.full((2, 28, 28), -0.1),
        torch.full((2, 28, 28), float("nan")),
        torch.zeros(2, 28, 28, dtype=torch.int64),
        np.zeros((2, 28, 28), bool),
    ],
)
def test_values_beyond_0_and_1_are_refused(tmp_path, images):
    _write(tmp_path)
    with pytest.raises(ValueError, match=re.escape("images are neither uint8 nor floats in [0, 1]")):
        load(tmp_path).encode(images)


class Own(nn.Module):
    """A user's own model, all of one layer."""

    def __init__(self, shape: ImageShape, latent_dim: int, **_: Any):
        super().__init__()
        self.shape, self.both = shape, nn.Linear(shape.numbers, latent_dim)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.both(images.flatten(1)), None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents @ self.both.weight).unflatten(1, self.shape)


def test_a_users_own_model_is_made_by_the_users_code(tmp_path):
    model = Own(DIGITS, 3)
    _write(tmp_path)
    info = json.loads((tmp_path / "config.json").read_text())
    info["parameters"]["model"] = "own"
    (tmp_path / "config.json").write_text(json.dumps(info))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json: not readable .* its code is wanted"):
        load(tmp_path)
    torch.testing.assert_close(load(tmp_path, Own).encode(IMAGES), model.encode(as_floats(IMAGES))[0].detach())


def test_decoding_gives_the_fitted_models_drawings(tmp_path):
    model = _write(tmp_path)
    latents = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    expected = FittedModel(model, PARAMETERS, standard_normal(3), TEMPERATURE).draw(latents)
    assert torch.equal(load(tmp_path).decode(latents), expected)
    assert torch.equal(load(tmp_path).decode(latents.double().numpy()), expected)


def test_samples_are_drawings_of_the_prior_and_follow_the_seed(tmp_path):
    _write(tmp_path)
    codec = load(tmp_path)
    latents = standard_normal(3).sample(7, torch.Generator().manual_seed(2))
    assert codec.sample(7, seed=2).shape == (7, 1, 28, 28)
    assert torch.equal(codec.sample(7, seed=2), codec.decode(latents))
    assert not torch.equal(codec.sample(7, seed=2), codec.sample(7, seed=3))


def test_it_is_frozen_and_tells_where_it_comes_from(tmp_path):
    _write(tmp_path)
    codec = load(tmp_path)
    assert not codec.fitted.model.training
    assert not any(weight.requires_grad for weight in codec.fitted.model.parameters())
    assert codec.info["test"] == {"mse": 0.5}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("variance", [0.02, None])
def test_the_negative_elbo_is_that_of_the_decoder_without_the_temperature(variance, temperature):
    """A linear model; both terms by torch.distributions."""
    random = torch.Generator().manual_seed(0)
    up, spread = torch.randn(3, 784, generator=random) / 3, torch.tensor([0.5, 1, 2])
    images, means = as_floats(IMAGES), as_floats(IMAGES).flatten(1)[:, 300:303]

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid((latents @ up).unflatten(1, (1, 28, 28)) / temperature)

    found = negative_elbo(
        lambda given: (given.flatten(1)[:, 300:303], 2 * spread.log().expand(5, 3)),
        decode,
        images,
        temperature,
        variance,
    )
    noise = torch.randn(3, generator=torch.Generator().manual_seed(0))
    logits = ((means + spread * noise) @ up).unflatten(1, (1, 28, 28)).double()
    likelihood = (
        Bernoulli(logits=logits, validate_args=False) if variance is None else Normal(logits.sigmoid(), variance**0.5)
    )
    rate = kl_divergence(Normal(means.double(), spread.double()), Normal(torch.zeros(5, 3).double(), 1)).sum(1)
    torch.testing.assert_close(found, rate - likelihood.log_prob(images.double()).sum((1, 2, 3)), rtol=1e-4, atol=0.01)


def test_of_a_plain_autoencoder_the_negative_elbo_is_the_reconstructions_part():
    images = as_floats(IMAGES)
    found = negative_elbo(
        lambda given: (given.flatten(1),), lambda latents: latents.unflatten(1, (1, 28, 28)), images, 1, 0.02
    )
    torch.testing.assert_close(found, torch.full((5,), -784 * math.log(1 / math.sqrt(2 * math.pi * 0.02))).double())


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    _write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: not readable"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_in_one_line(tmp_path, name, keep):
    _write(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=f"{name}: not readable") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "info",
    [
        "[]",
        "{}",
        '{"images": {"shape": [1, 28, 28]}, "parameters": {"latent_dim": 0, "beta": 1}, "temperature": 1}',
        '{"images": {"shape": [1, 28, 28]}, "parameters": null, "temperature": 1}',
        '{"images": {"shape": [1, 28, 28]}, "parameters": {}}',
        '{"images": {"shape": [28, 28]}, "parameters": {}, "temperature": 1}',
        '{"shape": [1, 28, 28], "parameters": {}, "temperature": 1}',
        *(
            '{"images": {"shape": [1, 28, 28]}, "parameters": {}, "temperature": ' + wrong + "}"
            for wrong in ("0", "-1", "NaN", "null", '"warm"')
        ),
    ],
)
def test_a_config_without_good_parameters_or_temperature_is_named_in_one_line(tmp_path, info):
    _write(tmp_path)
    (tmp_path / "config.json").write_text(info)
    with pytest.raises(ValueError, match=r"config\.json: not readable") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_of_another_width_are_refused_by_name(tmp_path):
    _write(tmp_path)
    save_file(build(PARAMETERS.model_copy(update={"width": 3}), seed=0).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: not readable"):
        load(tmp_path)


def test_a_prior_of_pickled_objects_is_refused(tmp_path):
    _write(tmp_path)
    torch.save(standard_normal(3).state_dict(), tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match=r"prior\.safetensors: not readable"):
        load(tmp_path)


def test_a_prior_of_another_latent_size_is_refused(tmp_path):
    _write(tmp_path)
    save_file(standard_normal(4).state_dict(), tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match=r"prior\.safetensors"):
        load(tmp_path)
