"""Perlin noise: smooth random gradients on a lattice, at several scales.

Gradient noise, its sum over octaves and the turbulence of absolute values are Perlin's, "An Image Synthesizer" (1985); the fade of fifth
degree, whose second derivative is continuous, is from his "Improving Noise" (2002). Gradients are unit vectors of any direction, drawn
for each image rather than hashed from a table.

How it is fast: with w(t) = 1 - fade(|t|) for |t| < 1 and 0 beyond, the noise at (y, x) is

    sum over lattice points (j, i) of w(y - j) w(x - i) (gx_ji (x - i) + gy_ji (y - j)),

so that an image is two products of small matrices.
"""

import math
from dataclasses import dataclass

import numpy as np

from synthetic_generators.random_fields import RandomField, standardised
from synthetic_generators.registry import register, require
from synthetic_generators.streams import Streams

# A thresholded image passes from one level to the other within this many standard deviations of the noise under it.
_EDGE = 0.25


@register("perlin")
@dataclass(frozen=True)
class Perlin(RandomField):
    """Sums of octaves of gradient noise: clouds, with absolute values veins, thresholded blots."""

    frequency_min: float = 1.0
    """The fewest cells of the first lattice along a side of the image; drawn log-uniformly for each image."""
    frequency_max: float = 6.0
    """The most cells of the first lattice; at most one cell for two pixels is used."""
    octaves: int = 4
    """Each octave's lattice is twice as fine as the one before. Those with more than one cell for two pixels are left out."""
    persistence_min: float = 0.3
    """The weight of an octave as a fraction of the one before; drawn evenly for each image up to `persistence_max`."""
    persistence_max: float = 0.8
    """The largest fraction."""
    turbulence: float = 0.25
    """The fraction of images that sum the absolute values of their octaves, which has creases where the noise is 0."""
    threshold: float = 0.25
    """The fraction of images that are cut at a random level into two tones; independent of turbulence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.frequency_min > 0, "frequency_min", "a number > 0", self.frequency_min)
        at_least = f"a number >= frequency_min = {self.frequency_min}"
        require(self.frequency_max >= self.frequency_min, "frequency_max", at_least, self.frequency_max)
        require(self.octaves >= 1, "octaves", "an integer >= 1", self.octaves)
        require(self.persistence_min >= 0, "persistence_min", "a number >= 0", self.persistence_min)
        at_least = f"a number >= persistence_min = {self.persistence_min}"
        require(self.persistence_max >= self.persistence_min, "persistence_max", at_least, self.persistence_max)
        require(0 <= self.turbulence <= 1, "turbulence", "a number in [0, 1]", self.turbulence)
        require(0 <= self.threshold <= 1, "threshold", "a number in [0, 1]", self.threshold)

    def fields(self, streams: Streams) -> np.ndarray:
        """float32 [n, C, H, W]."""
        finest = np.float32(self.image_size / 2)
        ratio = np.float32(self.frequency_max / self.frequency_min)
        frequency = np.minimum(np.float32(self.frequency_min) * ratio ** streams.uniform("frequency"), finest)
        persistence = streams.uniform("persistence", (), self.persistence_min, self.persistence_max)
        is_turbulent = streams.uniform("turbulence") < self.turbulence
        total = np.zeros((len(streams), self.channels, self.image_size, self.image_size), dtype=np.float32)
        for octave in range(self.octaves):
            which = np.flatnonzero(frequency * 2**octave <= finest)
            noise = self._gradient_noise(streams.child(f"octave {octave}").take(which), frequency[which] * 2**octave, octave)
            np.abs(noise, out=noise, where=is_turbulent[which, None, None, None])
            noise *= (persistence[which] ** octave)[:, None, None, None]
            total[which] += noise
        which = np.flatnonzero(streams.uniform("threshold") < self.threshold)
        total[which] = self._thresholded(streams.take(which), total[which])
        return total

    def _gradient_noise(self, streams: Streams, frequency: np.ndarray, octave: int) -> np.ndarray:
        """Noise with `frequency` [n] lattice cells along a side: float32 [n, C, H, W]."""
        points = math.ceil(min(self.frequency_max * 2**octave, self.image_size / 2)) + 2
        angle = streams.uniform("gradient", (self.channels, points, points), 0, 2 * np.pi)
        pixel = (np.arange(self.image_size, dtype=np.float32) + np.float32(0.5)) / np.float32(self.image_size)
        place = frequency[:, None, None] * pixel + streams.uniform("offset", (2, 1))  # [n, (y, x), side], in cells
        (rows, columns), (row_slopes, column_slopes) = np.moveaxis(_weights(place, points), 2, 1)[:, :, :, None]
        return rows @ (np.cos(angle) @ column_slopes.mT) + row_slopes @ (np.sin(angle) @ columns.mT)

    def _thresholded(self, streams: Streams, fields: np.ndarray) -> np.ndarray:
        """Fields [n, C, H, W] as two levels, with edges of about a pixel."""
        level = streams.uniform("level", (1, 1, 1), -1, 1)
        return np.clip((standardised(fields) - level) / np.float32(_EDGE), -1, 1)


def _weights(place: np.ndarray, points: int) -> np.ndarray:
    """w(t) and t w(t), t the distance of places [...] from each of the lattice points 0, 1, ...: float32 [2, ..., points]."""
    cell = place.astype(np.int64)
    t = place - cell.astype(np.float32)
    fade = t * t * t * (t * (t * 6 - 15) + 10)
    weights = np.zeros((2, place.size * points), dtype=np.float32)
    before = np.arange(place.size).reshape(place.shape) * points + cell
    weights[0, before], weights[0, before + 1] = 1 - fade, fade
    weights[1, before], weights[1, before + 1] = (1 - fade) * t, fade * (t - 1)
    return weights.reshape(2, *place.shape, points)
