"""Pictures of images, pixel by pixel."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tuner.vae.fitted import FittedModel
from tuner.vae.image_grid import (
    HELD_OUT,
    MANIFOLD,
    SENT,
    STEPS,
    evenly_spaced,
    fixed_noise,
    grid,
    image_grids,
    interleaved,
    interpolation,
    manifold,
    png,
    reconstructions,
    rows_that_fit,
    samples,
    sheet,
    traversal,
)
from tuner.vae.model import Builder, Model
from tuner.vae.parameters import CLASSIC, Parameters
from tuner.vae.prior import Prior, standard_normal
from tuner.vae.shape import ImageShape

DIGITS = ImageShape(1, 28, 28)
NAMES = {
    "samples/fitted_prior",
    "samples/standard_normal",
    "reconstructions/above_and_below",
    "latent/traversal",
    "latent/interpolation",
}


def test_ink_is_dark_and_the_gap_is_paper():
    images = torch.tensor([[[[0.0, 1.0]]], [[[0.4, 0.2]]], [[[1.0, 0.0]]]])  # three images of 1 x 2 pixels
    expected = [
        [255, 0, 255, 255, 153, 204],
        [255] * 6,
        [255] * 6,
        [0, 255, 255, 255, 255, 255],  # the last place stays empty
    ]
    assert grid(images, columns=2, ink=True).tolist() == expected
    inside = np.array(grid(images, columns=2, ink=False))[[0, 0, 0, 0, 3, 3], [0, 1, 4, 5, 0, 1]]
    assert inside.tolist() == [0, 255, 102, 51, 255, 0], "without ink, brightness stays what it is"


@pytest.mark.parametrize("ink", [True, False])
def test_colour_stands_in_the_last_axis(ink):
    images = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    picture = grid(images, columns=2, ink=ink)
    assert picture.shape == (4 + 2 + 4, 5 + 2 + 5, 3)
    values = (images * 255).permute(0, 2, 3, 1).numpy()
    expected = np.round(255 - values if ink else values)
    assert np.array_equal(picture[:4, :5], expected[0])
    assert np.array_equal(picture[:4, 7:], expected[1])
    assert np.array_equal(picture[6:, :5], expected[2])
    assert (picture[4:6] == 255).all()
    assert (picture[6:, 7:] == 255).all()


def test_values_beyond_black_and_white_are_clipped():
    assert grid(torch.tensor([[[[-1.0, 2.0]]]]), columns=1, ink=True).tolist() == [[255, 0]]


def test_scale_repeats_each_pixel_both_ways():
    picture = grid(torch.tensor([[[[0.0, 1.0]]]]), columns=1, ink=True, scale=2)
    assert picture.tolist() == [[255, 255, 0, 0], [255, 255, 0, 0]]
    colour = grid(torch.tensor([[[[0.0]], [[0.2]], [[1.0]]]]), columns=1, ink=False, scale=2)
    assert colour.tolist() == [[[0, 51, 255]] * 2] * 2


@pytest.mark.parametrize(("side", "scale"), [(16, 4), (20, 3), (28, 2), (32, 2), (64, 1), (128, 1)])
def test_a_sheet_enlarges_small_images_by_whole_factors(side, scale):
    image = Image.open(io.BytesIO(sheet(torch.zeros(2, 3, side, side), 2, ink=False)))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", ((2 * side + 2) * scale, side * scale))


def test_a_picture_has_the_rows_that_fit_and_one_in_any_case():
    cifar, photo = ImageShape(3, 32, 32), ImageShape(3, 128, 128)
    assert [rows_that_fit(shape, 8, 8) for shape in (DIGITS, cifar, photo)] == [8, 8, 1]
    assert rows_that_fit(ImageShape(3, 64, 64), 8, 8) == SENT // (8 * 3 * 64 * 64) == 3
    assert rows_that_fit(photo, 8, 5, numbers=1_000_000) == 2


@pytest.mark.parametrize("count", [3, 40, 400, 9_999])
def test_the_images_shown_are_spread_over_the_whole_split(count):
    shown = evenly_spaced(torch.arange(count).view(-1, 1, 1, 1)).flatten()
    assert len(shown) == HELD_OUT
    assert (shown[0], shown[-1]) == (0, count - 1)
    steps = shown.diff()
    assert steps.max() - steps.min() <= 1


def test_ten_digits_in_five_columns_measure_148_by_58():
    assert grid(torch.zeros(10, 1, 28, 28), columns=5, ink=True).shape == (2 * 28 + 2, 5 * 28 + 4 * 2)


def test_a_png_holds_exactly_the_picture():
    picture = np.random.default_rng(0).integers(0, 256, (13, 17), dtype=np.uint8)
    image = Image.open(io.BytesIO(png(picture)))
    assert (image.format, image.mode) == ("PNG", "L")
    assert np.array_equal(np.asarray(image), picture)
    coloured = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    image = Image.open(io.BytesIO(png(coloured)))
    assert (image.format, image.mode) == ("PNG", "RGB")
    assert np.array_equal(np.asarray(image), coloured)


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


def _fitted(latent_dim: int, shape: ImageShape = DIGITS) -> FittedModel:
    parameters = Parameters(latent_dim=latent_dim, width=4)
    return FittedModel(Builder(shape)(parameters, seed=0), parameters, standard_normal(latent_dim))


def test_every_model_gets_its_grids_and_two_latents_a_manifold():
    held_out = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert image_grids(_fitted(3), held_out, ink=True).keys() == NAMES
    pictures = image_grids(_fitted(2), held_out, ink=True)
    assert pictures.keys() == NAMES | {"latent/manifold"}
    assert pictures["latent/manifold"].shape == (MANIFOLD * 30 - 2, MANIFOLD * 30 - 2)
    assert np.array_equal(pictures["samples/fitted_prior"], pictures["samples/standard_normal"])
    assert pictures["latent/interpolation"].shape == (6 * 30 - 2, STEPS * 30 - 2)
    above = (255 - held_out[:8, 0] * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(pictures["reconstructions/above_and_below"][:28, :28], above[0])


@pytest.mark.parametrize("side", [32, 64, 128])
def test_pictures_of_colour_stay_small_however_large_the_images(side):
    held_out = torch.rand(40, 3, side, side, generator=torch.Generator().manual_seed(0))
    pictures = image_grids(_fitted(2, ImageShape(3, side, side)), held_out, ink=False)
    assert pictures.keys() == NAMES | {"latent/manifold"}
    for name, picture in pictures.items():
        assert picture.shape[2:] == (3,)
        images = [(size + 2) // (side + 2) for size in picture.shape[:2]]
        assert (images[0] * (side + 2) - 2, images[1] * (side + 2) - 2) == picture.shape[:2], name
        assert images[0] * images[1] * 3 * side**2 <= SENT or min(images) <= 2 or images == [5, 5], name
    first = (held_out[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(pictures["reconstructions/above_and_below"][:side, :side], first)


def test_samples_are_drawings_at_the_fixed_noise_and_another_prior_or_temperature_gives_others():
    fitted = _fitted(3)
    assert torch.equal(samples(fitted, 5), fitted.draw(standard_normal(3).place(*fixed_noise(5))))
    shifted = replace(fitted.prior, means=fitted.prior.means + 3)
    for changed in (replace(fitted, prior=shifted), replace(fitted, temperature=0.5)):
        held_out = torch.zeros(40, 1, 28, 28)
        before, after = (image_grids(model, held_out, ink=True) for model in (fitted, changed))
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
    latents = manifold(NAKED, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), side=7).logit().view(-1, 2)
    assert len(latents) == 7**2
    assert latents[0, 0] == latents[:, 0].min()
    assert latents[0, 1] == latents[:, 1].max()
    assert latents[-1, 0] == latents[:, 0].max()
    assert latents[1, 1] == latents[0, 1]
    torch.testing.assert_close(latents[-1], torch.tensor([1.0, -1.0]) * 2 * 2**0.5)  # two standard deviations


def test_a_traversal_moves_the_latent_that_varies_most_first():
    means = torch.tensor([[0.5, 0.0], [-0.5, 1.0], [0.0, -1.0]])
    assert torch.equal(traversal(NAKED, means, rows=1), traversal(NAKED, means, rows=10)[:STEPS])
    rows = traversal(NAKED, means, rows=10).logit().view(2, 9, 2)
    steps = torch.linspace(-3, 3, 9)
    torch.testing.assert_close(rows[0], torch.stack([torch.full((9,), 0.5), steps], 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[1], torch.stack([steps / 2, torch.zeros(9)], 1), rtol=1e-4, atol=1e-4)


def test_an_interpolation_goes_straight_from_one_reconstruction_to_another():
    means = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    rows = interpolation(NAKED, means, rows=2).view(2, STEPS, 2)
    torch.testing.assert_close(rows[:, 0], NAKED.draw(means[:2]).view(2, 2))
    torch.testing.assert_close(rows[:, -1], NAKED.draw(means[2:4]).view(2, 2))
    torch.testing.assert_close(rows.logit().diff(n=2, dim=1), torch.zeros(2, STEPS - 2, 2), atol=1e-4, rtol=0)


def test_reconstructions_stand_below_their_originals():
    means = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    images = torch.rand(40, 1, 1, 2)
    shown = reconstructions(NAKED, images, means, rows=2)
    assert torch.equal(shown, interleaved(images[:16], NAKED.draw(means[:16]), 8))
