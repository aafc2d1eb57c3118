"""Salt-and-pepper images: grains of pure white and pure black on an even ground."""

from dataclasses import dataclass

import numpy as np

from synthetic_generators.registry import register, require
from synthetic_generators.streams import Streams

_BLACK, _GRAY, _WHITE = 0, 128, 255


@register("salt_and_pepper")
@dataclass(frozen=True)
class SaltAndPepper:
    """Every cell of a square grid is a grain with probability `density`, independently; half of the grains are white.

    The grid is shifted at random from image to image, so that no pixel is more likely than another to lie on the
    border of a grain. All channels of a pixel are equal.
    """

    channels: int
    image_size: int
    density: float = 0.3
    """The expected fraction of the pixels that grains cover."""
    grain: int = 1
    """The side of a grain in pixels."""
    binary: bool = False
    """White grains alone, on black: the image holds no other value. Otherwise white and black grains, half each, on gray."""

    def __post_init__(self) -> None:
        require(0 <= self.density <= 1, "density", "a number in [0, 1]", self.density)
        require(1 <= self.grain <= self.image_size, "grain", f"an integer from 1 to {self.image_size}", self.grain)

    def generate(self, streams: Streams) -> np.ndarray:
        """uint8 [n, C, H, W]."""
        n, side = len(streams), self.image_size
        cells = (side - 1) // self.grain + 2  # one more than the image holds, for the shift
        uniform = streams.uniform("grains", (cells, cells))
        grid = np.full(uniform.shape, _BLACK if self.binary else _GRAY, dtype=np.uint8)
        if not self.binary:
            grid[uniform < self.density] = _BLACK
        grid[uniform < (self.density if self.binary else self.density / 2)] = _WHITE

        shift = streams.integers("shift", self.grain, (2, 1))
        rows, columns = np.moveaxis((np.arange(side) + shift) // self.grain, 1, 0)
        pixels = grid[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return np.repeat(pixels[:, None], self.channels, axis=1)
