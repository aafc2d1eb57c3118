"""Salt-and-pepper images: grains of pure white and pure black on an even ground."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from synthetic_generators.registry import register, require
from synthetic_generators.streams import Streams

_BLACK, _GRAY, _WHITE = 0, 128, 255


@register("salt_and_pepper")
@dataclass(frozen=True)
class SaltAndPepper:
    """Salt-and-pepper noise, as in DP-SynGen (Choi et al., arXiv 2412.09842): every cell of a square grid is a grain with probability
    `density`, independently; half of the grains are white, half black.

    The grid is shifted at random from image to image, so that no pixel is more likely than another to lie on the border of a grain.
    Levels, colours and a density of each image's own are this project's additions.
    """

    channels: int
    image_size: int
    density: float = 0.3
    """The expected fraction of the pixels that grains cover."""
    density_max: float = 0.0
    """If more than `density`, every image draws a density of its own, evenly between the two."""
    grain: int = 1
    """The side of a grain in pixels."""
    binary: bool = False
    """White grains alone, on black: the image holds no other value. Otherwise the ground is gray."""
    levels: int = 2
    """How many levels, evenly spaced from black to white, the grains on gray have; 2 are salt and pepper."""
    colour: Literal["gray", "grains", "channels"] = "gray"
    """gray: all channels are equal; grains: a grain has a level of its own in each channel, so it is coloured (binary grains stay white);
    channels: each channel has grains of its own, in places of its own."""

    def __post_init__(self) -> None:
        require(0 <= self.density <= 1, "density", "a number in [0, 1]", self.density)
        require(0 <= self.density_max <= 1, "density_max", "a number in [0, 1]", self.density_max)
        require(1 <= self.grain <= self.image_size, "grain", f"an integer from 1 to {self.image_size}", self.grain)
        require(2 <= self.levels <= 256, "levels", "an integer from 2 to 256", self.levels)
        require(not self.binary or self.levels == 2, "levels", "2, since binary is true", self.levels)

    def generate(self, streams: Streams) -> np.ndarray:
        """uint8 [n, C, H, W]."""
        n, side = len(streams), self.image_size
        cells = (side - 1) // self.grain + 2  # one more than the image holds, for the shift
        density = streams.uniform("density", (1, 1, 1), self.density, max(self.density, self.density_max))
        uniform = streams.uniform("grains", (self.channels if self.colour == "channels" else 1, cells, cells))
        is_grain = uniform < density
        if self.binary:
            grid = np.where(is_grain, np.uint8(_WHITE), np.uint8(_BLACK))
        else:
            grid = np.where(is_grain, self._levels(streams, uniform, density), np.uint8(_GRAY))

        shift = streams.integers("shift", self.grain, (2, 1))
        rows, columns = np.moveaxis((np.arange(side) + shift) // self.grain, 1, 0)
        planes = np.arange(grid.shape[1])[:, None, None]
        pixels = grid[np.arange(n)[:, None, None, None], planes, rows[:, None, :, None], columns[:, None, None, :]]
        return pixels if pixels.shape[1] == self.channels else np.repeat(pixels, self.channels, axis=1)

    def _levels(self, streams: Streams, uniform: np.ndarray, density: np.ndarray) -> np.ndarray:
        """The level that each cell has if it is a grain, uint8 like uniform, or [n, C, cells, cells] for coloured grains."""
        if self.colour == "grains":
            rank = streams.integers("colour", self.levels, (self.channels, *uniform.shape[2:]))
        else:  # what is uniform below density tells the level as well
            rank = np.minimum(uniform / np.maximum(density, np.float32(1e-9)) * self.levels, self.levels - 1).astype(np.int64)
        return (_WHITE * rank // (self.levels - 1)).astype(np.uint8)  # rounded down, so that the middle one of few isn't the ground
