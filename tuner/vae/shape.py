"""The shape of a data set's images, which travels with them. Imports nothing."""

from typing import NamedTuple

LEAST_MAP = 8  # halving ends at a map this small


class ImageShape(NamedTuple):
    """Channels (1 grey, 3 colour), height and width in pixels: the (C, H, W) of every tensor of images."""

    channels: int
    height: int
    width: int

    @property
    def numbers(self) -> int:
        """In one image: C * H * W."""
        return self.channels * self.height * self.width

    def maps(self) -> list[tuple[int, int]]:
        """Heights and widths from the image's own to the first map whose shorter side is 8 at most, each half of the
        one before and rounded up."""
        sizes = [(self.height, self.width)]
        while min(sizes[-1]) > LEAST_MAP:
            height, width = sizes[-1]
            sizes.append((-(-height // 2), -(-width // 2)))
        return sizes
