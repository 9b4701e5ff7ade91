"""A tiny export written by hand: it encodes, decodes and samples; a damaged one is refused by file name."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tuner.vae.codec import load
from tuner.vae.data import as_floats
from tuner.vae.fitted import FittedModel
from tuner.vae.model import VAE, Builder
from tuner.vae.parameters import Parameters
from tuner.vae.prior import standard_normal
from tuner.vae.shape import ImageShape

build = Builder(ImageShape(1, 28, 28))

PARAMETERS, TEMPERATURE = Parameters(latent_dim=3, width=4), 0.5
FILES = ("model.json", "weights.safetensors", "prior.npz")
IMAGES = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _write(path: Path, parameters: Parameters = PARAMETERS) -> VAE:
    model = build(parameters, seed=4)
    save_file(model.state_dict(), path / "weights.safetensors")
    np.savez(path / "prior.npz", **{name: part.numpy() for name, part in standard_normal(3).state_dict().items()})
    (path / "model.json").write_text(
        json.dumps(
            {
                "shape": [1, 28, 28],
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
    forms = [IMAGES[:, 0], as_floats(IMAGES), as_floats(IMAGES).double(), IMAGES.numpy(), IMAGES[:, 0].numpy() / 255]
    for images in forms:
        torch.testing.assert_close(codec.encode(images), expected)


@pytest.mark.parametrize("shape", [(28, 28), (5, 3, 28, 28), (5, 1, 28, 27), (5, 784), (1, 5, 1, 28, 28)])
def test_images_of_another_shape_are_refused_with_both_shapes(tmp_path, shape):
    _write(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"images are {shape}; expected (B, 28, 28) or (B, 1, 28, 28)")):
        load(tmp_path).encode(torch.zeros(shape))


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
        '{"shape": [1, 28, 28], "parameters": {"latent_dim": 0, "beta": 1}, "temperature": 1}',
        '{"shape": [1, 28, 28], "parameters": null, "temperature": 1}',
        '{"shape": [1, 28, 28], "parameters": {}}',
        *(
            '{"shape": [1, 28, 28], "parameters": {}, "temperature": ' + wrong + "}"
            for wrong in ("0", "-1", "NaN", "null", '"warm"')
        ),
    ],
)
def test_a_model_json_without_good_parameters_or_temperature_is_named_in_one_line(tmp_path, info):
    _write(tmp_path)
    (tmp_path / "model.json").write_text(info)
    with pytest.raises(ValueError, match=r"model\.json: not readable") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_of_another_width_are_refused_by_name(tmp_path):
    _write(tmp_path)
    save_file(build(PARAMETERS.model_copy(update={"width": 3}), seed=0).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors: not readable"):
        load(tmp_path)


def test_a_prior_with_pickled_objects_is_refused(tmp_path):
    _write(tmp_path)
    np.savez(tmp_path / "prior.npz", weights=np.array([{}]), means=np.zeros((1, 3)), covariances=np.eye(3)[None])
    with pytest.raises(ValueError, match=r"prior\.npz: not readable"):
        load(tmp_path)


def test_a_prior_of_another_latent_size_is_refused(tmp_path):
    _write(tmp_path)
    np.savez(tmp_path / "prior.npz", **{name: part.numpy() for name, part in standard_normal(4).state_dict().items()})
    with pytest.raises(ValueError, match=r"prior\.npz"):
        load(tmp_path)
