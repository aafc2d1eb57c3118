"""Wavelet textures: images whose wavelet coefficients are independent and heavy-tailed, with a scale that grows from fine to coarse.

The wavelet coefficients of natural images follow generalised Laplacians p(c) ~ exp(-|c / s|^shape) with shapes of 0.5 to 1 (Mallat 1989;
Simoncelli, "Modeling the joint statistics of images in the wavelet domain", 1999), which gives sparse edges and blobs on quiet ground where
Gaussian noise has clouds. As training data they are the wavelet marginal model of Baradad et al., "Learning to See by Looking at Noise"
(arXiv 2106.05963, section 3.1), after the texture synthesis of Portilla and Simoncelli (2000). They impose marginals on a steerable
pyramid by iterated histogram matching; an orthonormal wavelet basis needs no iteration, since its coefficients can be drawn as such.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import gammainccinv, gammaln

from synthetic_generators.random_fields import RandomField
from synthetic_generators.registry import register, require
from synthetic_generators.streams import Streams

# Daubechies' lowpass filter with four vanishing moments ("Ten Lectures on Wavelets", table 6.1), of sum sqrt(2).
_LOWPASS = np.array(
    [0.23037781330885523, 0.7148465705525415, 0.6308807679295904, -0.02798376941698385,
     -0.18703481171888114, 0.030841381835986965, 0.032883011666982945, -0.010597401784997278]
)  # fmt: skip
# The quantile function is tabulated at equal steps of t = -log(1 - u), up to that of the largest |2 u - 1| < 1 in 24 bits.
_LARGEST_T = 24 * math.log(2)
_STEPS = 512
_SHAPES = 33


@register("wavelet_marginal")
@dataclass(frozen=True)
class WaveletMarginal(RandomField):
    """Random wavelet textures, at random shifts and reflections of the wavelets' grid."""

    shape_min: float = 0.4
    """The smallest shape of the coefficients' generalised Laplacian: 2 is a Gaussian, 1 a Laplacian, less is sparser; drawn evenly for each
    image up to `shape_max`."""
    shape_max: float = 0.8
    """The largest shape."""
    exponent_min: float = 0.5
    """Coefficients grow by 2^a from a scale to the next coarser one, so that the amplitude spectrum falls about as 1 / f^a; a is drawn
    evenly for each image up to `exponent_max`."""
    exponent_max: float = 3.0
    """The largest a."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.shape_min >= 0.2, "shape_min", "a number >= 0.2", self.shape_min)
        expected = f"a number from shape_min = {self.shape_min} to 10"
        require(self.shape_min <= self.shape_max <= 10, "shape_max", expected, self.shape_max)
        require(self.exponent_min >= 0, "exponent_min", "a number >= 0", self.exponent_min)
        expected = f"a number from exponent_min = {self.exponent_min} to 10"
        require(self.exponent_min <= self.exponent_max <= 10, "exponent_max", expected, self.exponent_max)

    def coefficients(self, streams: Streams) -> np.ndarray:
        """Coefficients of variance 1, the coarser ones nearer to the corner [0, 0] as usual: float32 [n, C, P, P], P the side of the torus."""
        side = _torus(self.image_size)[0]
        tables, place = _quantile_tables(self.shape_min, self.shape_max), streams.uniform("shape", (1,), 0, _SHAPES - 1)
        below = place.astype(np.int64)
        above = place - below.astype(np.float32)
        table = tables[below[:, 0]] * (1 - above) + tables[below[:, 0] + 1] * above

        signed = streams.uniform("coefficients", (self.channels, side, side), -1, 1)
        t = np.abs(signed)
        t *= np.float32(-(1 - 2**-24))
        np.log1p(t, out=t)
        t *= np.float32(-_STEPS / _LARGEST_T)
        step = t.astype(np.int64)
        np.minimum(step, _STEPS - 1, out=step)
        t -= step
        step += (np.arange(len(streams)) * (_STEPS + 1))[:, None, None, None]
        quantile = np.take(table, step)
        step += 1
        t *= np.take(table, step) - quantile
        quantile += t
        return np.copysign(quantile, signed, out=quantile)

    def fields(self, streams: Streams) -> np.ndarray:
        """float32 [n, C, H, W]."""
        side, coarsest = _torus(self.image_size)
        exponent = streams.uniform("exponent", (1, 1, 1), self.exponent_min, self.exponent_max)
        field = self.coefficients(streams)
        field *= np.exp2(exponent * _levels(side, coarsest))
        size = coarsest
        while size < side:
            size *= 2
            basis = _basis(size)
            field[..., :size, :size] = basis.T @ field[..., :size, :size] @ basis
        rows, columns = np.moveaxis(self._places(streams, side), 1, 0)
        image, channel = np.ogrid[: len(streams), : self.channels]
        return field[image[..., None, None], channel[..., None, None], rows[:, None, :, None], columns[:, None, None, :]]

    def _places(self, streams: Streams, side: int) -> np.ndarray:
        """Which rows and columns of the torus are the image's, up or down from any one: int64 [n, 2, H]."""
        direction = 2 * streams.integers("direction", 2, (2, 1)) - 1
        return (streams.integers("shift", side, (2, 1)) + direction * np.arange(self.image_size)) % side


def _torus(image_size: int) -> tuple[int, int]:
    """The side, at least image_size, to which coefficients synthesise, and that of the coarsest scale: side = coarsest * 2^levels."""
    levels = max(0, int(math.log2(image_size)) - 1)
    coarsest = math.ceil(image_size / 2**levels)
    return coarsest * 2**levels, coarsest


def _levels(side: int, coarsest: int) -> np.ndarray:
    """The scale of each coefficient, 0 the finest; what is left at the coarsest scale counts as one more: float32 [side, side]."""
    level = np.zeros(side, dtype=np.float32)
    size = side // 2
    while size >= coarsest:
        level[:size] += 1
        size //= 2
    return np.minimum(level[:, None], level)


@lru_cache
def _basis(size: int) -> np.ndarray:
    """One level of the wavelet transform on a circle: orthogonal, float32 [size, size], lowpass rows first."""
    highpass = _LOWPASS[::-1] * (-1) ** np.arange(len(_LOWPASS))
    basis = np.zeros((size, size))
    for k in range(size // 2):
        for tap in range(len(_LOWPASS)):
            basis[k, (2 * k + tap) % size] += _LOWPASS[tap]
            basis[k + size // 2, (2 * k + tap) % size] += highpass[tap]
    return basis.astype(np.float32)


@lru_cache
def _quantile_tables(shape_min: float, shape_max: float) -> np.ndarray:
    """The u-quantile of |c| for a generalised Laplacian c of variance 1, at u = 1 - exp(-t): float32 [_SHAPES, _STEPS + 1].

    |c / s|^shape follows the gamma distribution of parameter 1 / shape.
    """
    shape = np.linspace(shape_min, shape_max, _SHAPES)[:, None]
    deviation = np.exp((gammaln(3 / shape) - gammaln(1 / shape)) / 2)  # where s = 1
    t = np.linspace(0, _LARGEST_T, _STEPS + 1)
    return (gammainccinv(1 / shape, np.exp(-t)) ** (1 / shape) / deviation).astype(np.float32)
