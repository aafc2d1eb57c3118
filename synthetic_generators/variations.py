"""Variations: figures that come in many versions of themselves, as the members of a class do.

Another family draws a figure, and each of its `copies` is bent, turned, sheared, scaled, moved and drawn thinner or thicker; each may have a tone
and a pattern of its own as well. The deformations are those that augment handwriting (Simard, Steinkraus and Platt, "Best practices for
convolutional neural networks applied to visual document analysis", ICDAR 2003): an affine map and a smooth random field of displacements. Tones,
patterns, and to make classes of programmatic images of all this are ours. The mean of a figure's other copies is to a copy what its class mean is
to a private image, so a denoiser can learn from it how the members of a class differ from their mean (`hints.synthetic_from: class`).
"""

from dataclasses import astuple, dataclass, field
from functools import cached_property

import numpy as np

from synthetic_generators.registry import Generator, Nested, make_wrapped, register, require
from synthetic_generators.streams import Streams

_CONTROL = 4  # nodes of the displacement field in each direction
_BLOCK = 128  # images computed together, so that what they need stays in cache


@dataclass(frozen=True)
class Deformation:
    """How far the versions of a figure differ from it: standard deviations, and `thickness`, as the options of `Variations` explain them."""

    affine: float = 0.12
    slant: float = 0.15
    shift: float = 0.05
    bend: float = 0.1
    thickness: float = 0.5

    def scaled(self, factor: float) -> "Deformation":
        """`factor` times as far; `thickness` may become 1 at most."""
        return Deformation(*(factor * amount for amount in astuple(self)))

    def __call__(self, streams: Streams, figures: np.ndarray) -> np.ndarray:
        """Each figure, uint8 [n, C, H, W] with H = W, as the version that its stream draws, like the figures."""
        amount = streams.uniform("thickness", (), -self.thickness, self.thickness)
        matrix = np.eye(2, dtype=np.float32) + np.float32(self.affine) * streams.normal("affine", (2, 2))
        matrix[:, 0, 1] += np.float32(self.slant) * streams.normal("slant")
        offset = np.float32(self.shift) * streams.normal("shift", (2,))
        nodes = np.float32(self.bend) * streams.normal("bend", (2, _CONTROL, _CONTROL))

        size = figures.shape[-1]
        centres = (2 * np.arange(size, dtype=np.float32) + 1) / size - 1
        basis = _cubic_basis(centres)
        bend = basis @ nodes @ basis.T  # a product for each image by itself, so that none depends on how many there are
        x = matrix[:, 0, 0, None, None] * centres + matrix[:, 0, 1, None, None] * centres[:, None] + offset[:, 0, None, None] + bend[:, 0]
        y = matrix[:, 1, 0, None, None] * centres + matrix[:, 1, 1, None, None] * centres[:, None] + offset[:, 1, None, None] + bend[:, 1]
        return _at(_grown(figures, amount), x, y)


@register("variations")
@dataclass(frozen=True)
class Variations:
    """Image i is a version of figure i // copies of another family. Options of that family go under its name: strokes.curves."""

    channels: int
    image_size: int
    family: str = "strokes"
    """The family that draws the figures."""
    copies: int = 16
    """How many versions of a figure follow one another."""
    affine: float = Deformation.affine
    """Standard deviation of the entries of the matrix that stretches and shears, around the identity."""
    slant: float = Deformation.slant
    """Standard deviation of a further horizontal shear, as writing has."""
    shift: float = Deformation.shift
    """Standard deviation of the displacement of the whole image, as a fraction of half the image side."""
    bend: float = Deformation.bend
    """Standard deviation of the displacements at a grid of 4 x 4 points, between which they change smoothly; in the same unit."""
    thickness: float = Deformation.thickness
    """How far bright parts grow or shrink: up to this fraction of a pixel's way to the brightest, or darkest, of its neighbours."""
    tone: float = 0.0
    """How much lighter or darker a version is: standard deviation of ln gamma, by which power of levels in [0, 1] its own differ."""
    pattern: float = 0.0
    """How far a version may be darkened in stripes, checks or grains that are its own: up to this fraction of its levels."""
    families: Nested = field(default_factory=dict)
    """The options of the family that draws the figures."""

    def __post_init__(self) -> None:
        require(self.copies >= 1, "copies", "an integer >= 1", self.copies)
        for name in ("affine", "slant", "shift", "bend"):
            require(getattr(self, name) >= 0, name, "a number >= 0", getattr(self, name))
        require(0 <= self.thickness <= 1, "thickness", "a number in [0, 1]", self.thickness)
        require(0 <= self.tone <= 2, "tone", "a number in [0, 2]", self.tone)
        require(0 <= self.pattern <= 1, "pattern", "a number in [0, 1]", self.pattern)
        self._figures  # noqa: B018 - refuses what it can't be made of

    @cached_property
    def _figures(self) -> Generator:
        return make_wrapped(self.family, self.channels, self.image_size, self.families)

    def generate(self, streams: Streams) -> np.ndarray:
        """Draw an image for each stream, uint8 [n, C, H, W]."""
        figure, which = np.unique(streams.indices // self.copies, return_inverse=True)
        figures = self._figures.generate(streams.child("figures").at(figure))
        deformed = Deformation(self.affine, self.slant, self.shift, self.bend, self.thickness)
        images = np.empty((len(streams), *figures.shape[1:]), dtype=np.uint8)
        for start in range(0, len(streams), _BLOCK):
            block = slice(start, start + _BLOCK)
            versions = deformed(streams.take(block), figures[which[block]])
            images[block] = self._dressed(streams.take(block), versions) if self.tone or self.pattern else versions
        return images

    def _dressed(self, streams: Streams, versions: np.ndarray) -> np.ndarray:
        """Each version, uint8 [n, C, H, W], in its own tone and with its own pattern; black stays black."""
        gamma = np.exp(np.float32(self.tone) * streams.normal("tone"))[:, None, None, None]
        darker = streams.uniform("pattern", (1, 1), 0, self.pattern) * _patterns(streams, versions.shape[-1])
        levels = (versions / np.float32(255)) ** gamma * (1 - darker[:, None])
        return (levels * 255 + np.float32(0.5)).astype(np.uint8)


def _patterns(streams: Streams, size: int) -> np.ndarray:
    """A pattern for each stream, float32 [n, size, size] in [0, 1]: nothing for half of them, else stripes, checks or grains.

    Stripes and checks are waves of 3 pixels' length or longer, upright for half of them; grains are pixels by themselves.
    """
    kind = streams.integers("pattern kind", 6, (1, 1))
    turn = streams.uniform("pattern turn", (1, 1), 0, 2)  # in right angles
    turn = np.where(streams.uniform("pattern upright", (1, 1)) < 0.5, np.floor(turn), turn) * np.float32(np.pi / 2)
    frequency = np.float32(2 * np.pi / 3) * streams.uniform("pattern frequency", (1, 1), 0.2, 1)
    phase = streams.uniform("pattern phase", (2, 1, 1), 0, 2 * np.pi)
    pixel = np.arange(size, dtype=np.float32)
    across = np.cos(frequency * (np.cos(turn) * pixel + np.sin(turn) * pixel[:, None]) + phase[:, 0])
    along = np.cos(frequency * (np.cos(turn) * pixel[:, None] - np.sin(turn) * pixel) + phase[:, 1])
    grain = streams.uniform("pattern grain", (size, size))
    return np.select([kind == 1, kind == 2, kind == 3], [(1 + across) / 2, (1 + across * along) / 2, grain], np.float32(0))


def _grown(figures: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Figures uint8 [n, C, H, W] a part of the way, amount [n] in [-1, 1], to the brightest (darkest, if negative) of 3 x 3 pixels; float32."""
    flip = np.where(amount < 0, np.uint8(255), np.uint8(0))[:, None, None, None]  # the darkest is the brightest of the negative
    padded = np.pad(figures ^ flip, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    rows = np.maximum(np.maximum(padded[:, :, :-2], padded[:, :, 1:-1]), padded[:, :, 2:])
    brightest = np.maximum(np.maximum(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:])
    grown = np.abs(amount)[:, None, None, None] * (brightest - padded[:, :, 1:-1, 1:-1]).astype(np.float32)
    return figures + np.where(amount < 0, np.float32(-1), np.float32(1))[:, None, None, None] * grown


def _cubic_basis(x: np.ndarray) -> np.ndarray:
    """Cubic B-splines whose nodes span [-1, 1], at the points x [L]: float32 [L, nodes], rows of unit norm, so that a field keeps its deviation."""
    distance = np.abs((x[:, None] + 1) / 2 * (_CONTROL - 1) - np.arange(_CONTROL, dtype=np.float32))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - np.minimum(distance, 2)) ** 3 / 6
    weights = np.where(distance < 1, near, far)
    return (weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))).astype(np.float32)


def _at(images: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Images float32 [n, C, H, W] at the points x, y [n, H, W] in [-1, 1], bilinear, the border continued; uint8."""
    n, channels, height, width = images.shape
    column = np.clip((x + 1) * np.float32(width / 2) - np.float32(0.5), 0, width - 1)
    row = np.clip((y + 1) * np.float32(height / 2) - np.float32(0.5), 0, height - 1)
    left, top = np.minimum(column.astype(np.int32), max(width - 2, 0)), np.minimum(row.astype(np.int32), max(height - 2, 0))
    to_right, down = (column - left)[:, None], (row - top)[:, None]
    right, below = min(1, width - 1), width * min(1, height - 1)  # steps to the neighbours, in flat pixels
    planes = np.arange(n * channels, dtype=np.int32).reshape(n, channels, 1, 1) * (height * width)
    first = planes + (top * width + left)[:, None]
    flat = images.reshape(-1)
    upper, lower = flat[first], flat[first + below]
    upper += to_right * (flat[first + right] - upper)
    lower += to_right * (flat[first + (below + right)] - lower)
    return (upper + down * (lower - upper) + np.float32(0.5)).astype(np.uint8)
