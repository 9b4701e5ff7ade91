"""Networks trained as one array: each has the gradients and the steps that it has alone and in plain PyTorch."""

import pytest
import torch

from tuner.vae.array import Array, ArrayShape
from tuner.vae.losses import RECONSTRUCTION, kl_divergence
from tuner.vae.model import VAE, Builder
from tuner.vae.parameters import Parameters
from tuner.vae.shape import ImageShape

build = Builder(ImageShape(1, 28, 28))

WIDEST = 5
LATENTS = {1: [5], 3: [5, 2, 3]}
GREY = (1, 28, 28)
KINDS = [("gaussian", "vae", GREY), ("bernoulli", "vae", GREY), ("gaussian", "autoencoder", GREY)]
KINDS += [("gaussian", "vae", (3, 32, 32)), ("bernoulli", "vae", (3, 64, 64)), ("gaussian", "vae", (1, 20, 36))]


def _size(model: VAE) -> int:
    return sum(weight.numel() for weight in model.parameters())


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _filled(parameters: Parameters, slots: int, builder: Builder = build) -> tuple[Array, list[VAE]]:
    latents = LATENTS[slots]
    models = [
        builder(parameters.model_copy(update={"latent_dim": size}), seed=slot) for slot, size in enumerate(latents)
    ]
    array = Array(ArrayShape.of(models[0], parameters, WIDEST), slots)
    for slot in range(slots):
        array.load(slot, models[slot], _draw(2, _size(models[slot])).abs())
    return array, models


@pytest.mark.parametrize(("likelihood", "kind", "shape"), KINDS)
@pytest.mark.parametrize("slots", LATENTS)
def test_losses_and_gradients_are_those_of_autograd_on_the_plain_network(slots, likelihood, kind, shape):
    parameters = Parameters(latent_dim=WIDEST, width=4, likelihood=likelihood, model=kind)
    array, models = _filled(parameters, slots, Builder(ImageShape(*shape)))
    images = torch.sigmoid(_draw(slots, 6, *shape[1:], shape[0]))
    noise, factors = torch.zeros(slots, 6, WIDEST), torch.tensor([0.3, 0.0, 2.0])[:slots]
    share = torch.tensor([1, 1, 1, 2, 0, 1]).expand(slots, 6) / 6
    for slot, latent_dim in enumerate(LATENTS[slots]):
        noise[slot, :, :latent_dim] = _draw(6, latent_dim)
    means = array.backward(images, share, noise, factors)
    array.flat[0] = array.gradients  # so that `store` hands the gradients out
    for slot, model in enumerate(models):
        batch = images[slot].permute(0, 3, 1, 2)
        latents, log_variance = model.encode(batch)
        kl = torch.zeros(6)
        if log_variance is not None:
            kl = kl_divergence(latents, log_variance)
            latents = latents + torch.exp(0.5 * log_variance) * noise[slot, :, : model.latent_dim]
        reconstruction = RECONSTRUCTION[likelihood](model.decode(latents), batch)
        loss = (share[slot] * (reconstruction + factors[slot] * kl)).sum()
        expected = torch.stack([loss, (share[slot] * reconstruction).sum(), (share[slot] * kl).sum()])
        torch.testing.assert_close(means[slot], expected.detach(), rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        array.store(slot, model, torch.zeros(2, _size(model)))
        for ours, theirs in zip(model.parameters(), gradients, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("slots", LATENTS)
@pytest.mark.parametrize("shape", [GREY, (3, 32, 32)])
def test_bfloat16_rounds_the_products_and_nothing_else(slots, shape):
    """What is kept is float32, and each gradient is off by some roundings to 8 bits, not by more."""
    arrays = []
    for precision in ("float32", "bfloat16"):
        parameters = Parameters(latent_dim=WIDEST, width=4, precision=precision)
        array, _models = _filled(parameters, slots, Builder(ImageShape(*shape)))
        images = torch.sigmoid(_draw(slots, 6, *shape[1:], shape[0]))
        share, noise = torch.full((slots, 6), 1 / 6), torch.zeros(slots, 6, WIDEST)
        means = array.backward(images, share, noise, torch.full((slots,), 0.3))
        arrays.append((array, means))
    (exact, expected), (rounded, found) = arrays
    assert torch.equal(rounded.flat, exact.flat)
    assert rounded.flat.dtype == found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    off = (rounded.gradients.float() - exact.gradients).norm(dim=1) / exact.gradients.norm(dim=1)
    assert off.min() > 2**-12
    assert off.max() < 2**-5


@pytest.mark.parametrize("kind", ["vae", "autoencoder"])
def test_what_is_loaded_is_what_is_stored_to_the_bit(kind):
    array, models = _filled(Parameters(latent_dim=WIDEST, width=2, model=kind), 3)
    for slot, model in enumerate(models):
        other = build(Parameters(latent_dim=model.latent_dim, width=2, model=kind), seed=99)
        averages = torch.zeros(2, _size(model))
        array.store(slot, other, averages)
        for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(averages, _draw(2, _size(model)).abs())


def test_a_layer_is_named_as_in_the_plain_network_and_padded_with_zeros():
    array, models = _filled(Parameters(latent_dim=WIDEST, width=2), 3)
    for slot, model in enumerate(models):
        for layers, theirs in ((array.down, model.down), (array.up, model.up)):
            for ours, plain in zip(layers, theirs, strict=True):
                assert torch.equal(ours.weight[slot], plain.weight.permute(0, 2, 3, 1))
                assert torch.equal(ours.bias[slot], plain.bias)
        assert torch.equal(array.hidden.bias[slot], model.hidden.bias)
        for first, head in ((0, model.mean), (WIDEST, model.log_variance)):
            for ours, plain in ((array.heads.weight, head.weight), (array.heads.bias, head.bias)):
                assert torch.equal(ours[slot, first : first + model.latent_dim], plain)
                assert not ours[slot, first + model.latent_dim : first + WIDEST].any()
        assert not array.start.weight[slot, :, model.latent_dim :].any()


def test_an_update_is_pytorchs_adam_and_leaves_the_other_networks_alone():
    array, _ = _filled(Parameters(latent_dim=WIDEST, width=2), 3)
    before = array.flat.clone()
    array.gradients.copy_(_draw(*array.gradients.shape))
    weights = before[0, 1].clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.02)
    optimizer.state[weights] = {"step": torch.tensor(7.0), "exp_avg": before[1, 1], "exp_avg_sq": before[2, 1]}
    weights.grad = array.gradients[1].clone()
    untouched = array.flat[:, [0, 2]].clone()
    optimizer.step()
    array.update(1, 0.02, 7)
    torch.testing.assert_close(array.flat[0, 1], weights.detach())
    torch.testing.assert_close(array.flat[1, 1], optimizer.state[weights]["exp_avg"])
    torch.testing.assert_close(array.flat[2, 1], optimizer.state[weights]["exp_avg_sq"])
    assert torch.equal(array.flat[:, [0, 2]], untouched)


def test_an_update_of_all_is_each_ones_own_and_leaves_idle_weights_alone():
    array, alone = (_filled(Parameters(latent_dim=WIDEST, width=2), 3)[0] for _ in range(2))
    for each in (array, alone):
        each.gradients.copy_(_draw(*each.gradients.shape))
    rates, steps = torch.tensor([0.02, 0.5, 3e-4]), torch.tensor([0, 7, 4_000])
    array.update_all(rates, steps, torch.tensor([True, False, True]))
    for slot in (0, 2):
        alone.update(slot, rates[slot].item(), steps[slot].item())
    torch.testing.assert_close(array.flat[:, [0, 2]], alone.flat[:, [0, 2]])
    assert torch.equal(array.flat[0, 1], alone.flat[0, 1])
