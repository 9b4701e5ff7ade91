"""The one convolution of this network, 3x3 with stride 2 and padding 1, as matrix products; images have channels last.

Axes: N images, H/W pixels of the larger image, h/w of the smaller (half of it, rounded up), C channels.
"""

from torch import Tensor


def patches(images: Tensor) -> Tensor:
    """(N, H, W, C) -> (N * h * w, 9 C): what the convolution sees at each of its places, row by row."""
    count, height, width, channels = images.shape
    rows, columns = half(height), half(width)
    padded = images.new_zeros(count, 2 * rows + 1, 2 * columns + 1, channels)  # even sizes need it above and left alone
    padded[:, 1 : height + 1, 1 : width + 1] = images
    image, row, column, channel = padded.stride()
    places = padded.as_strided(
        (count, rows, columns, 3, 3, channels), (image, 2 * row, 2 * column, row, column, channel)
    )
    return places.reshape(-1, 9 * channels)


def fold(taps: Tensor, count: int, height: int, width: int) -> Tensor:
    """(N * h * w, 9 C) -> (N, H, W, C): every pixel adds up the taps that see it, the transpose of `patches`.

    A row of even number is seen by the middle taps of one place, one of odd number by the lower taps of that
    place and the upper taps of the next; columns likewise.
    """
    rows, columns = half(height), half(width)
    t = taps.view(count, rows, columns, 3, 3, -1)
    images = t.new_empty(count, rows, 2, columns, 2, t.shape[-1])
    images[:, :, 0, :, 0] = t[:, :, :, 1, 1]
    images[:, :, 0, :, 1] = t[:, :, :, 1, 2]
    images[:, :, 0, :-1, 1] += t[:, :, 1:, 1, 0]
    images[:, :, 1, :, 0] = t[:, :, :, 2, 1]
    images[:, :-1, 1, :, 0] += t[:, 1:, :, 0, 1]
    images[:, :, 1, :, 1] = t[:, :, :, 2, 2]
    images[:, :-1, 1, :, 1] += t[:, 1:, :, 0, 2]
    images[:, :, 1, :-1, 1] += t[:, :, 1:, 2, 0]
    images[:, :-1, 1, :-1, 1] += t[:, 1:, 1:, 0, 0]
    return images.view(count, 2 * rows, 2 * columns, -1)[:, :height, :width].contiguous()


def transpose_convolve(images: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """The transposed convolution: (N, h, w, C), weight (C, 3, 3, K), bias (K,) and size (H, W) -> (N, H, W, K).

    To one channel PyTorch takes five times as long for it on a CPU.
    """
    count, _, _, channels = images.shape
    return fold(images.reshape(-1, channels) @ weight.flatten(1), count, *size) + bias


def half(size: int) -> int:
    return -(-size // 2)
