"""The network: shapes, size and a start that depends on nothing but its seed."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from tuner.vae.model import Builder, ToPixels, features
from tuner.vae.parameters import CLASSIC, Parameters
from tuner.vae.shape import ImageShape

build = Builder(ImageShape(1, 28, 28))

IMAGES = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def _weights(parameters: Parameters, seed: int) -> torch.Tensor:
    return parameters_to_vector(build(parameters, seed).parameters()).detach()


@pytest.mark.parametrize(("latent_dim", "width"), [(1, 1), (3, 2), (16, 32)])
def test_images_go_to_latents_and_back(latent_dim, width):
    model = build(Parameters(latent_dim=latent_dim, width=width), seed=0)
    mean, log_variance = model.encode(IMAGES)
    assert mean.shape == log_variance.shape == (5, latent_dim)
    assert model.decode(mean).shape == IMAGES.shape


def test_the_classic_network_has_496545_weights():
    encoder = (32 * 9 + 32) + (64 * 32 * 9 + 64) + (64 * 7 * 7 * 128 + 128)
    heads = 2 * (128 * 16 + 16)
    decoder = (16 * 64 * 7 * 7 + 64 * 7 * 7) + (64 * 32 * 9 + 32) + (32 * 9 + 1)
    assert encoder + heads + decoder == 496_545
    assert len(_weights(CLASSIC, 0)) == 496_545


def test_a_plain_autoencoder_lacks_exactly_the_log_variance_head():
    plain = CLASSIC.model_copy(update={"model": "autoencoder"})
    assert len(_weights(CLASSIC, 0)) - len(_weights(plain, 0)) == 128 * 16 + 16
    mean, log_variance = build(plain, seed=0).encode(IMAGES)
    assert mean.shape == (5, 16)
    assert log_variance is None


def test_features_are_what_both_heads_read():
    model = build(Parameters(latent_dim=3, width=2), seed=0)
    features = model.features(IMAGES)
    assert features.shape == (5, 128)
    mean, log_variance = model.encode(IMAGES)
    assert torch.equal(model.mean(features), mean)
    assert torch.equal(model.log_variance(features), log_variance)


def test_the_network_is_its_layers_in_order():
    model = build(Parameters(latent_dim=3, width=2), seed=0)
    hidden = model.down[1](model.down[0](IMAGES).relu()).relu().flatten(1)
    torch.testing.assert_close(model.features(IMAGES), model.hidden(hidden).relu())
    latents = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    start = model.start(latents).relu().view(5, 4, 7, 7)
    torch.testing.assert_close(model.decode(latents), model.up[1](model.up[0](start).relu()))


def test_a_model_that_knows_no_better_sees_likeness_in_its_means():
    class Mean(torch.nn.Module):
        def encode(self, images):
            return images.mean((1, 2, 3)).unsqueeze(1), None

    assert torch.equal(features(Mean(), IMAGES), IMAGES.mean((1, 2, 3)).unsqueeze(1))
    plain = build(Parameters(latent_dim=3, width=2), seed=0)
    assert torch.equal(features(plain, IMAGES), plain.features(IMAGES))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [*range(16, 129, 4)])
def test_stages_of_half_the_size_end_at_a_map_of_five_to_eight_and_come_back_to_the_image(channels, size):
    model = Builder(ImageShape(channels, size, size))(Parameters(latent_dim=3, width=2), seed=0)
    images = torch.rand(2, channels, size, size)
    assert 5 <= model.map[1] == model.map[2] <= 8
    assert model.map[0] == 2 * min(4, 2 ** (len(model.down) - 1))
    assert model.features(images).shape == (2, {1: 128, 3: 512}[channels])
    assert model.decode(model.encode(images)[0]).shape == images.shape


def test_a_users_own_model_needs_no_more_than_to_encode_and_decode_and_gets_its_options():
    class Own(torch.nn.Module):
        def __init__(self, shape, latent_dim, depth):
            super().__init__()
            self.depth = depth
            self.layer = torch.nn.Linear(shape.numbers, latent_dim)

    parameters = Parameters.model_validate({"model": "own", "latent_dim": 3, "model.depth": 2})
    builder = Builder(ImageShape(3, 16, 16), Own)
    model, again = builder(parameters, seed=1), builder(parameters, seed=1)
    assert (model.depth, model.latent_dim, model.shape) == (2, 3, (3, 16, 16))
    assert torch.equal(model.layer.weight, again.layer.weight)
    with pytest.raises(ValueError, match="--model"):
        build(parameters, seed=1)


@pytest.mark.parametrize(("channels", "size"), [(1, 1), (3, 5), (32, 14)])
def test_the_last_layer_is_pytorchs_transposed_convolution(channels, size):
    layer = ToPixels(channels, 1, 3, stride=2, padding=1, output_padding=1).double()
    plain = torch.nn.ConvTranspose2d(channels, 1, 3, stride=2, padding=1, output_padding=1).double()
    plain.load_state_dict(layer.state_dict())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(images), plain(images))
    probe = torch.randn(2, 1, 2 * size, 2 * size, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((layer(images) * probe).sum(), [images, *layer.parameters()])
    theirs = torch.autograd.grad((plain(images) * probe).sum(), [images, *plain.parameters()])
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


def test_the_same_seed_gives_the_same_weights_whatever_ran_before():
    first = _weights(CLASSIC, 2**62 + 1)
    torch.manual_seed(123)
    torch.randn(1000)
    assert torch.equal(_weights(CLASSIC, 2**62 + 1), first)


def test_another_seed_gives_other_weights():
    assert not torch.equal(_weights(CLASSIC, 0), _weights(CLASSIC, 1))


def test_building_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    build(CLASSIC, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
