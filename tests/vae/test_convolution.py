"""The convolution as matrix products is PyTorch's, and its two halves are each other's transpose."""

import pytest
import torch
import torch.nn.functional as F

from tuner.vae.convolution import fold, patches

SHAPES = [(1, 2, 2, 1), (2, 6, 4, 3), (3, 14, 14, 5)]


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_patches_times_kernels_is_the_convolution(shape):
    images, kernels = _draw(*shape), _draw(4, 3, 3, shape[3])
    expected = F.conv2d(images.permute(0, 3, 1, 2), kernels.permute(0, 3, 1, 2), stride=2, padding=1)
    ours = patches(images) @ kernels.flatten(1).T
    torch.testing.assert_close(ours.view(expected.permute(0, 2, 3, 1).shape), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_folding_is_the_transpose_of_taking_patches(shape):
    images = _draw(*shape)
    taps = _draw(*patches(images).shape)
    folded = fold(taps, *shape[:3])
    assert folded.shape == images.shape
    torch.testing.assert_close((patches(images) * taps).sum(), (images * folded).sum())
