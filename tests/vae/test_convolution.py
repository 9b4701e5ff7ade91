"""The convolution as matrix products is PyTorch's, and its two halves are each other's transpose."""

import pytest
import torch
import torch.nn.functional as F

from tuner.vae.convolution import fold, patches, transpose_convolve

SHAPES = [(1, 2, 2, 1), (2, 6, 4, 3), (3, 14, 14, 5), (2, 5, 9, 3)]


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


@pytest.mark.parametrize("size", [(28, 28), (9, 14)])
@pytest.mark.parametrize("kernels", [1, 3])
def test_the_transposed_convolution_is_pytorchs(size, kernels):
    rows, columns = (-(-side // 2) for side in size)
    images, weight, bias = _draw(2, rows, columns, 5), _draw(5, 3, 3, kernels), _draw(kernels)
    padding = [1 - side % 2 for side in size]
    expected = F.conv_transpose2d(images.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, 2, 1, padding)
    torch.testing.assert_close(transpose_convolve(images, weight, bias, size).permute(0, 3, 1, 2), expected)
