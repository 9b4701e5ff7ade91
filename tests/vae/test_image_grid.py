"""Pictures of images, pixel by pixel."""

import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from tuner.vae.fitted import FittedModel
from tuner.vae.image_grid import (
    MANIFOLD,
    fixed_noise,
    grid,
    image_grids,
    interleaved,
    manifold,
    png,
    samples,
    traversal,
)
from tuner.vae.model import Builder, Model
from tuner.vae.parameters import CLASSIC, Parameters
from tuner.vae.prior import Prior, standard_normal
from tuner.vae.shape import ImageShape

build = Builder(ImageShape(1, 28, 28))


def test_ink_is_dark_and_the_gap_is_paper():
    images = torch.tensor([[[[0.0, 1.0]]], [[[0.4, 0.2]]], [[[1.0, 0.0]]]])  # three images of 1 x 2 pixels
    expected = [
        [255, 0, 255, 255, 153, 204],
        [255] * 6,
        [255] * 6,
        [0, 255, 255, 255, 255, 255],  # the last place stays empty
    ]
    assert grid(images, columns=2).tolist() == expected


def test_values_beyond_black_and_white_are_clipped():
    assert grid(torch.tensor([[[[-1.0, 2.0]]]]), columns=1).tolist() == [[255, 0]]


def test_scale_repeats_each_pixel_both_ways():
    picture = grid(torch.tensor([[[[0.0, 1.0]]]]), columns=1, scale=2)
    assert picture.tolist() == [[255, 255, 0, 0], [255, 255, 0, 0]]


def test_ten_digits_in_five_columns_measure_148_by_58():
    assert grid(torch.zeros(10, 1, 28, 28), columns=5).shape == (2 * 28 + 2, 5 * 28 + 4 * 2)


def test_a_png_holds_exactly_the_picture():
    picture = np.random.default_rng(0).integers(0, 256, (13, 17), dtype=np.uint8)
    image = Image.open(io.BytesIO(png(picture)))
    assert (image.format, image.mode) == ("PNG", "L")
    assert np.array_equal(np.asarray(image), picture)


def test_fewer_images_and_smaller_latents_get_a_prefix_of_the_one_draw():
    few, many = fixed_noise(8), fixed_noise(64)
    assert torch.equal(few[0], many[0][:8])
    assert torch.equal(few[1], many[1][:8])
    small, large = (standard_normal(latent_dim).place(*many) for latent_dim in (4, 16))
    assert torch.equal(small, large[:, :4])


def test_the_uniform_number_picks_the_component_and_the_noise_the_place_in_it():
    prior = Prior(torch.tensor([0.25, 0.75]), torch.tensor([[-10.0], [10.0]]), torch.tensor([[[4.0]], [[0.25]]]))
    placed = prior.place(torch.tensor([[1.0], [1.0], [-2.0], [0.0]]), torch.tensor([0.0, 0.24, 0.26, 0.999]))
    assert placed.flatten().tolist() == [-8.0, -8.0, 9.0, 10.0]


def _fitted(latent_dim: int) -> FittedModel:
    parameters = Parameters(latent_dim=latent_dim, width=4)
    return FittedModel(build(parameters, seed=0), parameters, standard_normal(latent_dim))


def test_every_model_gets_its_grids_and_two_latents_a_manifold():
    held_out = torch.rand(32, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    names = {"samples/fitted_prior", "samples/standard_normal", "reconstructions/above_and_below", "latent/traversal"}
    assert image_grids(_fitted(3), held_out).keys() == names
    pictures = image_grids(_fitted(2), held_out)
    assert pictures.keys() == names | {"latent/manifold"}
    assert pictures["latent/manifold"].shape == (MANIFOLD * 30 - 2, MANIFOLD * 30 - 2)
    assert np.array_equal(pictures["samples/fitted_prior"], pictures["samples/standard_normal"])
    above = (255 - held_out[:8, 0] * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(pictures["reconstructions/above_and_below"][:28, :28], above[0])


def test_samples_are_drawings_at_the_fixed_noise_and_another_prior_or_temperature_gives_others():
    fitted = _fitted(3)
    assert torch.equal(samples(fitted, 5), fitted.draw(standard_normal(3).place(*fixed_noise(5))))
    shifted = replace(fitted.prior, means=fitted.prior.means + 3)
    for changed in (replace(fitted, prior=shifted), replace(fitted, temperature=0.5)):
        held_out = torch.zeros(8, 1, 28, 28)
        before, after = image_grids(fitted, held_out), image_grids(changed, held_out)
        assert not np.array_equal(before["samples/fitted_prior"], after["samples/fitted_prior"])


def test_rows_of_two_sets_take_turns():
    above, below = torch.arange(6).view(6, 1, 1, 1), torch.arange(10, 16).view(6, 1, 1, 1)
    assert interleaved(above, below, 4).flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 4, 5, 14, 15]


class _Naked(Model):
    """The logits are the latents: what was drawn says from where."""

    latent_dim = 2

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.view(-1, 1, 1, 2)


NAKED = FittedModel(_Naked(), CLASSIC, standard_normal(2))


def test_the_manifold_runs_left_to_right_and_bottom_to_top():
    latents = manifold(NAKED, torch.tensor([[-1.0, -1.0], [1.0, 1.0]])).logit().view(-1, 2)
    assert len(latents) == MANIFOLD**2
    assert latents[0, 0] == latents[:, 0].min()
    assert latents[0, 1] == latents[:, 1].max()
    assert latents[-1, 0] == latents[:, 0].max()
    assert latents[1, 1] == latents[0, 1]
    torch.testing.assert_close(latents[-1], torch.tensor([1.0, -1.0]) * 2 * 2**0.5)  # two standard deviations


def test_a_traversal_moves_the_latent_that_varies_most_first():
    means = torch.tensor([[0.5, 0.0], [-0.5, 1.0], [0.0, -1.0]])
    rows = traversal(NAKED, means).logit().view(2, 9, 2)
    steps = torch.linspace(-3, 3, 9)
    torch.testing.assert_close(rows[0], torch.stack([torch.full((9,), 0.5), steps], 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[1], torch.stack([steps / 2, torch.zeros(9)], 1), rtol=1e-4, atol=1e-4)
