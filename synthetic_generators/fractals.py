"""Fractals: the attractors of random iterated function systems, drawn as the density of their points.

A system is a few affine contractions; its attractor is what they map onto itself. As training data these figures are due to Kataoka et
al., "Pre-training without Natural Images" (ACCV 2020, FractalDB); the systems are those of Anderson and Farrell, "Improving Fractal
Pre-training" (WACV 2022), see `affine_systems`. Scaling a figure along both axes to fill its image gives the attractor of another affine
system.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from synthetic_generators.affine_systems import attractor_points, draw_maps, draw_words, fixed_point
from synthetic_generators.registry import register, require
from synthetic_generators.streams import Streams

_BLACK, _WHITE, _RANDOM = range(3)
_GROUNDS = {"black": _BLACK, "white": _WHITE, "random": _RANDOM}
# Systems drawn together, and points painted together: enough to amortise NumPy's calls, few enough for the arrays to stay in cache.
_BLOCK_IMAGES = 128
_BLOCK_POINTS = 25_000


@register("fractals")
@dataclass(frozen=True)
class Fractals:
    """Attractors of affine systems, each scaled to fill its image; the images of the whole under each map are its parts."""

    channels: int
    image_size: int
    maps_min: int = 2
    """The fewest maps in a system; drawn evenly for each image up to `maps_max`."""
    maps_max: int = 6
    """The most maps."""
    density: float = 1.25
    """Points drawn for each pixel of the image, rounded up to a square number in all."""
    fill_min: float = 0.8
    """The smallest width and height of the figure, as fractions of the image side; drawn evenly up to 1, the place at random."""
    gamma: float = 0.3
    """A pixel shows the figure in proportion to the density of points, relative to the greatest, to a power drawn evenly from [0, gamma]
    for each image, and else the ground; 0 makes silhouettes."""
    shades: float = 0.5
    """How far the parts of a figure may differ in shade, where 1 is the difference of white and black."""
    ground: Literal["mixed", "black", "white", "random"] = "mixed"
    """What the figure is drawn on; mixed draws one of the other three for each image."""
    contrast_min: float = 0.4
    """The least difference of the figure's mean shade from its ground in one channel at least."""

    def __post_init__(self) -> None:
        require(self.maps_min >= 2, "maps_min", "an integer >= 2", self.maps_min)
        require(self.maps_max >= self.maps_min, "maps_max", f"an integer >= maps_min = {self.maps_min}", self.maps_max)
        require(self.density > 0, "density", "a number > 0", self.density)
        require(0 < self.fill_min <= 1, "fill_min", "a number in (0, 1]", self.fill_min)
        require(self.gamma >= 0, "gamma", "a number >= 0", self.gamma)
        require(0 <= self.shades <= 1, "shades", "a number in [0, 1]", self.shades)
        require(0 <= self.contrast_min <= 0.5, "contrast_min", "a number in [0, 0.5]", self.contrast_min)

    def generate(self, streams: Streams) -> np.ndarray:
        """The images of the streams, uint8 [n, C, H, W]."""
        images = np.empty((len(streams), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        for start in range(0, len(streams), _BLOCK_IMAGES):
            block = slice(start, start + _BLOCK_IMAGES)
            self._draw(streams.take(block), images[block])
        return images

    def _draw(self, streams: Streams, images: np.ndarray) -> None:
        """Draw systems, and paint images [n, C, H, W] in parts."""
        count = self.maps_min + streams.integers("maps", self.maps_max - self.maps_min + 1)
        maps = draw_maps(streams, count, self.maps_max)
        words = math.ceil(self.image_size * math.sqrt(self.density))
        word, part = draw_words(streams, maps, count, words)
        origin = fixed_point(maps[..., 0])
        ground, shades = self._colours(streams)
        shades = np.take_along_axis(shades, part[:, None], axis=2)
        block_size = max(1, _BLOCK_POINTS // words**2)
        for start in range(0, len(streams), block_size):
            block = slice(start, start + block_size)
            pixel = self._pixels(streams.take(block), attractor_points(word[:, :, block], origin[:, block]))
            cover, number = self._cover(streams.take(block), pixel)
            for channel in range(self.channels):
                shade = np.broadcast_to(shades[block, channel, :, None], pixel.shape).astype(np.float64)
                total = np.bincount(pixel.ravel(), shade.ravel(), minlength=number.size).reshape(number.shape).astype(np.float32)
                level = ground[block, channel, None, None]
                mixed = level + cover * (total / np.maximum(number, 1) - level)
                images[block, channel] = np.rint(mixed * np.float32(255)).astype(np.uint8)

    def _pixels(self, streams: Streams, points: np.ndarray) -> np.ndarray:
        """In which pixel each of the points [2, n, P, P] lies: int64 [n, P, P], row by row, image by image. The points are overwritten."""
        side = self.image_size
        low = points.min(axis=(2, 3), keepdims=True)
        extent = points.max(axis=(2, 3), keepdims=True) - low
        size = np.moveaxis(streams.uniform("size", (2, 1, 1), self.fill_min, 1), 1, 0)
        place = np.moveaxis(streams.uniform("place", (2, 1, 1)), 1, 0) * (1 - size)
        points -= low
        points *= size * side / np.maximum(extent, np.finfo(np.float32).tiny)
        points += place * side
        x, y = pixel = points.astype(np.int32)
        np.minimum(pixel, side - 1, out=pixel)
        y *= side
        y += x
        return y + (np.arange(len(streams)) * side**2)[:, None, None]

    def _cover(self, streams: Streams, pixel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far each pixel shows the figure, in [0, 1], and the number of points in it: float32 [n, H, W] both."""
        shape = len(streams), self.image_size, self.image_size
        number = np.bincount(pixel.ravel(), minlength=math.prod(shape)).reshape(shape).astype(np.float32)
        relative = np.maximum(number, 1) / number.max(axis=(1, 2), keepdims=True)
        gamma = streams.uniform("gamma", (1, 1), 0, self.gamma)
        return np.where(number > 0, np.exp(gamma * np.log(relative)), 0), number

    def _colours(self, streams: Streams) -> tuple[np.ndarray, np.ndarray]:
        """In [0, 1]: the ground, float32 [n, C], and the shade of each map's part of the figure, float32 [n, C, maps_max]."""
        n, contrast = len(streams), np.float32(self.contrast_min)
        kind = streams.integers("ground kind", len(_GROUNDS)) if self.ground == "mixed" else np.full(n, _GROUNDS[self.ground])
        ground = np.where((kind == _RANDOM)[:, None], streams.uniform("ground", (self.channels,)), (kind == _WHITE)[:, None].astype(np.float32))
        figure = streams.uniform("figure", (self.channels,))
        # In one channel the figure is drawn from what is far enough from the ground, on the side where there is more of it.
        channel = streams.integers("contrast channel", self.channels)[:, None]
        level, uniform = np.take_along_axis(ground, channel, axis=1), np.take_along_axis(figure, channel, axis=1)
        apart = np.where(level < 0.5, level + contrast + uniform * (1 - level - contrast), uniform * (level - contrast))
        np.put_along_axis(figure, channel, apart, axis=1)
        shades = figure[:, :, None] + streams.uniform("shades", (self.channels, self.maps_max), -self.shades / 2, self.shades / 2)
        return ground, np.clip(shades, 0, 1)
