"""Dead leaves: opaque shapes of all sizes that fall on one another.

The model has the edges, occlusions and scale invariance of natural images (Lee, Mumford and Huang 2001). Its use as
training data is due to Baradad et al., "Learning to See by Looking at Noise" (arXiv 2106.05963, section 3.1), whose
shapes, radii and uniform colours are the ones here; few leaves, varied grounds and silhouettes are added, so that
sparse bright figures on a dark ground occur too.

How it is fast: every leaf is convex, so each row of pixels meets it in one span. The spans of all leaves of a block of
images are found at once, written out as pixel indices, and assigned in the order in which the leaves fall.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from synthetic_generators.registry import register, require
from synthetic_generators.streams import Streams

_CIRCLE, _SQUARE, _RECTANGLE, _TRIANGLE = range(4)
_SHAPES = {"circle": _CIRCLE, "square": _SQUARE, "rectangle": _RECTANGLE, "triangle": _TRIANGLE}
_GROUNDS = {"black": 0, "gray": 128, "white": 255}
# Pixels painted together: enough to amortise NumPy's calls, few enough for the pixel indices to stay in cache.
_BLOCK_PIXELS = 100_000


def power_law(uniform: np.ndarray, exponent: float, low: float, high: float) -> np.ndarray:
    """Numbers uniform in [0, 1) as ones of the density p(r) proportional to r^-exponent on [low, high], by the inverse CDF; float64."""
    uniform = uniform.astype(np.float64)
    if exponent == 1:
        return low * (high / low) ** uniform
    power = 1 - exponent
    return (low**power + uniform * (high**power - low**power)) ** (1 / power)


@register("dead_leaves")
@dataclass(frozen=True)
class DeadLeaves:
    """Dead leaves with radii from a power law, centres uniform in the image, colours uniform."""

    channels: int
    image_size: int
    shape: Literal["mixed", "circle", "square", "rectangle", "triangle"] = "mixed"
    """mixed draws each leaf's shape evenly. Polygons are inscribed in the leaf's circle and turned at random; rectangles have
    random sides, triangles random corners on the circle."""
    exponent: float = 3.0
    """Radii follow p(r) ~ r^-exponent; 3 makes the images scale-invariant."""
    radius_min: float = 0.03
    """The smallest radius, as a fraction of the image side."""
    radius_max: float = 1.0
    """The largest radius, as a fraction of the image side."""
    leaves_min: int = 8
    """The fewest leaves in an image; their number is log-uniform up to `leaves`."""
    leaves: int = 256
    """The most leaves in an image; with the radii above, 256 hide nearly all of the ground."""
    ground: Literal["mixed", "black", "gray", "white", "random"] = "mixed"
    """What the leaves fall on; random is an even random colour, mixed draws one of the other four for each image."""
    silhouettes: float = 0.25
    """The fraction of images whose leaves all have one colour."""
    supersampling: int = 2
    """Painted this many times larger in each direction and averaged, so that edges have the partial coverage of scaled-down
    pictures; 1 gives hard edges."""

    def __post_init__(self) -> None:
        require(self.radius_min > 0, "radius_min", "a number > 0", self.radius_min)
        require(self.radius_max > self.radius_min, "radius_max", f"a number > radius_min = {self.radius_min}", self.radius_max)
        require(self.leaves_min >= 0, "leaves_min", "an integer >= 0", self.leaves_min)
        require(self.leaves >= max(self.leaves_min, 1), "leaves", f"an integer >= 1 and >= leaves_min = {self.leaves_min}", self.leaves)
        require(0 <= self.silhouettes <= 1, "silhouettes", "a number in [0, 1]", self.silhouettes)
        require(self.supersampling >= 1, "supersampling", "an integer >= 1", self.supersampling)

    def generate(self, streams: Streams) -> np.ndarray:
        """uint8 [n, C, H, W]."""
        images = np.empty((len(streams), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        block_size = max(1, _BLOCK_PIXELS // (self.image_size * self.supersampling) ** 2)
        for start in range(0, len(streams), block_size):
            block = slice(start, start + block_size)
            images[block] = self._generate_block(streams.take(block))
        return images

    def _generate_block(self, streams: Streams) -> np.ndarray:
        n, side = len(streams), self.image_size * self.supersampling
        leaves = self._draw_leaf_counts(streams)
        image, number = _ranges(np.zeros_like(leaves), leaves)  # [K], the image that each leaf falls on, and the how-manyth it is there
        radius = self.draw_radii(streams, image, number) * side
        centre = np.stack([streams.uniform_at(f"leaf centre {axis}", image, number) for axis in "xy"]) * side
        if self.shape == "mixed":
            shape = (streams.uniform_at("leaf shape", image, number) * len(_SHAPES)).astype(np.int64)
        else:
            shape = np.full(len(image), _SHAPES[self.shape])
        corners = radius[:, None] * _unit_corners(streams, image, number, shape)
        top = paint(image, centre, radius, shape == _CIRCLE, corners, n, side)  # [n, side, side]

        colours = np.concatenate([self._draw_grounds(streams), self._draw_leaf_colours(streams, image, number)])
        return _box_average(colours[top], self.supersampling).transpose(0, 3, 1, 2)

    def draw_radii(self, streams: Streams, image: np.ndarray, number: np.ndarray) -> np.ndarray:
        """The radius of the number_k-th leaf of the image_k-th stream, as a fraction of the image side; float64 [K]."""
        return power_law(streams.uniform_at("leaf radius", image, number), self.exponent, self.radius_min, self.radius_max)

    def _draw_leaf_counts(self, streams: Streams) -> np.ndarray:
        """Log-uniform integers in [leaves_min, leaves], int64 [n]; the shift by one admits leaves_min = 0."""
        low, high = self.leaves_min + 1, self.leaves + 2
        return np.minimum(low * (high / low) ** streams.uniform("leaves").astype(np.float64), high - 1).astype(np.int64) - 1

    def _draw_grounds(self, streams: Streams) -> np.ndarray:
        """uint8 [n, C]."""
        random = streams.integers("ground", 256, (self.channels,)).astype(np.uint8)
        if self.ground == "random":
            return random
        if self.ground == "mixed":
            kind = streams.integers("kind of ground", len(_GROUNDS) + 1)
            for index, level in enumerate(_GROUNDS.values()):
                random[kind == index] = level
            return random
        return np.full_like(random, _GROUNDS[self.ground])

    def _draw_leaf_colours(self, streams: Streams, image: np.ndarray, number: np.ndarray) -> np.ndarray:
        """uint8 [K, C]: uniform, in silhouettes the same for all leaves of an image."""
        is_silhouette = streams.uniform("is silhouette") < self.silhouettes
        number = np.where(is_silhouette[image], 0, number)
        return np.stack([256 * streams.uniform_at(f"leaf colour {c}", image, number) for c in range(self.channels)], axis=1).astype(np.uint8)


def _unit_corners(streams: Streams, image: np.ndarray, number: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Corners of the leaves' polygons on the unit circle in cyclic order, as (x, y): float32 [2, K, 4]. A triangle repeats its last one.

    A rectangle's diagonals meet at a random angle; a triangle's corners are three uniform points, as in the paper's code.
    """
    angle = np.stack([streams.uniform_at(f"leaf angle {i}", image, number, 0, 2 * np.pi) for i in range(3)], axis=1)
    turn, opening = angle[:, 0], angle[:, 1] / 2
    opening[shape == _SQUARE] = np.pi / 2
    corners = np.stack([turn, turn + opening, turn + np.pi, turn + opening + np.pi], axis=1)
    is_triangle = shape == _TRIANGLE
    corners[is_triangle] = np.sort(angle[is_triangle], axis=1)[:, [0, 1, 2, 2]]
    return np.stack([np.cos(corners), np.sin(corners)])


def paint(image: np.ndarray, centre: np.ndarray, radius: np.ndarray, is_circle: np.ndarray, corners: np.ndarray, n: int, side: int) -> np.ndarray:
    """Let K leaves fall on n images in the order given; int32 [n, side, side] says what lies on top.

    image int [K]; centre float [2, K] as (x, y), radius float [K], corners float [2, K, 4] relative to the centre, all in
    pixels; is_circle bool [K]. A leaf covers the pixels whose centres lie in it. An entry below n is the ground of that image;
    n + k is leaf k.
    """
    # The rows that each leaf's circle meets: one entry per (leaf, row) from here on.
    first = np.clip(np.ceil(centre[1] - radius - 0.5), 0, side).astype(np.int32)
    last = np.clip(np.floor(centre[1] + radius - 0.5), -1, side - 1).astype(np.int32)
    leaf, row = _ranges(first, np.maximum(last - first + 1, 0))
    y = (row + 0.5 - centre[1][leaf]).astype(np.float32)

    low, high = np.empty_like(y), np.empty_like(y)
    in_circle = is_circle[leaf]
    half = np.sqrt(np.maximum(radius[leaf[in_circle]] ** 2 - y[in_circle] ** 2, 0))
    low[in_circle], high[in_circle] = -half, half
    in_polygon = ~in_circle
    low[in_polygon], high[in_polygon] = _polygon_spans(corners[:, leaf[in_polygon]], y[in_polygon])

    x = centre[0][leaf] - 0.5
    left = np.clip(np.ceil(x + low), 0, side).astype(np.int32)
    right = np.clip(np.floor(x + high), -1, side - 1).astype(np.int32)
    span, pixel = _ranges((image[leaf] * side + row).astype(np.int32) * side + left, np.maximum(right - left + 1, 0))

    top = np.repeat(np.arange(n, dtype=np.int32), side * side)
    top[pixel] = (leaf + n).astype(np.int32)[span]  # NumPy assigns in order: the last leaf on a pixel stays
    return top.reshape(n, side, side)


def _polygon_spans(corners: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the line at height y [M] enters and leaves a convex polygon, corners [2, M, 4] in cyclic order: x [M] twice.

    A line that misses the polygon gets an empty span, (inf, -inf).
    """
    low, high = np.full_like(y, np.inf), np.full_like(y, -np.inf)
    for i in range(corners.shape[2]):
        (x0, y0), (x1, y1) = corners[:, :, i - 1], corners[:, :, i]
        crosses = (y0 <= y) != (y1 <= y)
        rise = np.where(crosses, y1 - y0, 1)
        x = x0 + (y - y0) / rise * (x1 - x0)
        low = np.where(crosses, np.minimum(low, x), low)
        high = np.where(crosses, np.maximum(high, x), high)
    return low, high


def _ranges(start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the integer ranges [start_i, start_i + count_i): (i of each element, the element), int32 both."""
    index = np.repeat(np.arange(len(count), dtype=np.int32), count)
    offset = np.cumsum(count) - count  # where each range begins in the output
    return index, np.arange(len(index), dtype=np.int32) + (start - offset).astype(np.int32)[index]


def _box_average(images: np.ndarray, factor: int) -> np.ndarray:
    """Shrink uint8 [n, H, W, C] by an integer factor: the rounded mean of each box."""
    if factor == 1:
        return images
    total = np.full_like(images[:, ::factor, ::factor], factor**2 // 2, dtype=np.uint32)
    for i in range(factor):
        for j in range(factor):
            total += images[:, i::factor, j::factor]
    return (total // factor**2).astype(np.uint8)
