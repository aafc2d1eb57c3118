"""Images made of random fields: what coloured noise, Perlin noise and wavelet textures share, from field to pixel.

A family draws a field for each channel, independent and of any scale; here every field is standardised, and the channels are mixed in a
random colour basis, as in the statistical image models of Baradad et al., "Learning to See by Looking at Noise" (arXiv 2106.05963,
section 3.1), which draw each image's principal colour axes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from synthetic_generators.registry import require
from synthetic_generators.streams import Streams

# Numbers drawn together: enough to amortise NumPy's calls, few enough for the arrays to stay in cache.
_BLOCK_NUMBERS = 60_000


@dataclass(frozen=True)
class RandomField(ABC):
    """A family whose images are clip(mean + contrast * field), rounded to 256 levels."""

    channels: int
    image_size: int
    mean_min: float = 0.2
    """The smallest mean of a channel, where 0 is black and 1 white; each is drawn evenly up to `mean_max`."""
    mean_max: float = 0.8
    """The largest mean of a channel."""
    contrast_min: float = 0.08
    """The smallest standard deviation, on the same scale, before values beyond black and white are clipped; drawn evenly for each image.
    In RGB it is the root mean square over the channels."""
    contrast_max: float = 0.35
    """The largest standard deviation."""
    colour: float = 1.0
    """RGB: the fields along the three axes of a random colour basis have standard deviations 1 : v : v^2, v even in [0, colour] for each
    image. At 0 an image's colours lie on one line; 1 admits independent channels."""

    def __post_init__(self) -> None:
        require(0 <= self.mean_min <= 1, "mean_min", "a number in [0, 1]", self.mean_min)
        require(self.mean_min <= self.mean_max <= 1, "mean_max", f"a number from mean_min = {self.mean_min} to 1", self.mean_max)
        require(self.contrast_min > 0, "contrast_min", "a number > 0", self.contrast_min)
        require(self.contrast_max >= self.contrast_min, "contrast_max", f"a number >= contrast_min = {self.contrast_min}", self.contrast_max)
        require(0 <= self.colour <= 1, "colour", "a number in [0, 1]", self.colour)

    @abstractmethod
    def fields(self, streams: Streams) -> np.ndarray:
        """One field for each channel, independent, of any mean and scale: float32 [n, C, H, W]."""

    def generate(self, streams: Streams) -> np.ndarray:
        """The images of the streams, uint8 [n, C, H, W]."""
        images = np.empty((len(streams), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        block_size = max(1, _BLOCK_NUMBERS // (self.channels * self.image_size**2))
        for start in range(0, len(streams), block_size):
            block = slice(start, start + block_size)
            images[block] = self._paint(streams.take(block))
        return images

    def _paint(self, streams: Streams) -> np.ndarray:
        fields = standardised(self.fields(streams)).reshape(len(streams), self.channels, self.image_size**2)
        if self.channels == 3:
            fields = self._in_colour(streams, fields)
        mean = streams.uniform("mean", (self.channels, 1), self.mean_min, self.mean_max)
        contrast = streams.uniform("contrast", (1, 1), self.contrast_min, self.contrast_max)
        fields *= contrast * np.float32(255)
        fields += mean * np.float32(255)
        levels = np.clip(np.rint(fields, out=fields), 0, 255, out=fields).astype(np.uint8)
        return levels.reshape(len(streams), self.channels, self.image_size, self.image_size)

    def _in_colour(self, streams: Streams, fields: np.ndarray) -> np.ndarray:
        """Rotate fields [n, 3, P] from the axes of each image's colour basis to red, green and blue."""
        ratio = streams.uniform("colour", (1,), 0, self.colour)
        deviation = ratio ** np.arange(3, dtype=np.float32)
        deviation *= np.sqrt(3 / (deviation**2).sum(axis=1, keepdims=True))
        basis = _rotations(streams.normal("colour basis", (4,))) * deviation[:, None, :]
        mixed = basis[:, :, 0, None] * fields[:, None, 0]  # sums written out: they round as the image alone would
        for axis in (1, 2):
            mixed += basis[:, :, axis, None] * fields[:, None, axis]
        return mixed


def standardised(fields: np.ndarray) -> np.ndarray:
    """Fields [n, C, H, W] with mean 0 and standard deviation 1 in each channel of each image; a constant field becomes 0."""
    n, channels, height, width = fields.shape
    flat = fields.reshape(n, channels, height * width)
    flat = flat - flat.mean(axis=2, keepdims=True)
    deviation = np.sqrt(np.square(flat).mean(axis=2, keepdims=True))
    flat /= np.maximum(deviation, np.finfo(np.float32).tiny)
    return flat.reshape(fields.shape)


def _rotations(quaternions: np.ndarray) -> np.ndarray:
    """Rotation matrices [n, 3, 3] of quaternions [n, 4] of any length; evenly distributed if their entries are standard normal."""
    w, x, y, z = (quaternions / np.sqrt((quaternions**2).sum(axis=1, keepdims=True))).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=1) for row in rows], axis=1)
