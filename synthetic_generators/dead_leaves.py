"""Dead leaves: opaque shapes of all sizes that fall on one another.

The model has the edges, occlusions and scale invariance of natural images (Lee, Mumford and Huang, "Occlusion Models for Natural
Images", 2001). Its use as training data is due to Baradad et al., "Learning to See by Looking at Noise" (arXiv 2106.05963, section 3.1),
whose shapes, radii, uniform colours and textured leaves are the ones here; few leaves, varied grounds and silhouettes are added, so that
sparse bright figures on a dark ground occur too.

How it is fast: every leaf is convex, so each row of pixels meets it in one span. The spans of all leaves of a block of images are found
at once, written out as pixel indices, and assigned in the order in which the leaves fall.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from synthetic_generators.registry import register, require
from synthetic_generators.streams import Streams

_CIRCLE, _SQUARE, _RECTANGLE, _TRIANGLE = range(4)
_SHAPES = {"circle": _CIRCLE, "square": _SQUARE, "rectangle": _RECTANGLE, "triangle": _TRIANGLE}
_GROUNDS = {"black": 0, "gray": 128, "white": 255}
_STRIPES, _GRADIENT, _NOISE = range(3)
_TEXTURES = {"stripes": _STRIPES, "gradient": _GRADIENT, "noise": _NOISE}
_BLOCK_PIXELS = 500_000
"""Pixels painted together: enough to amortise NumPy's calls, few enough to stay in cache."""


def power_law(uniform: np.ndarray, exponent: float, low: float, high: float) -> np.ndarray:
    """Numbers uniform in [0, 1) as ones of the density p(r) proportional to r^-exponent on [low, high], by the inverse CDF; float64."""
    uniform = uniform.astype(np.float64)
    if exponent == 1:
        return low * (high / low) ** uniform
    power = 1 - exponent
    return (low**power + uniform * (high**power - low**power)) ** (1 / power)


@dataclass(frozen=True)
class Leaves:
    """K leaves that fall on n images in this order."""

    image: np.ndarray
    """int [K], the image that a leaf falls on."""
    number: np.ndarray
    """int [K], the how-manyth it is there."""
    centre: np.ndarray
    """float32 [2, K] as (x, y), like all lengths here in pixels of the canvas."""
    radius: np.ndarray
    """float32 [K]."""
    is_circle: np.ndarray
    """bool [K]."""
    corners: np.ndarray
    """float32 [2, 4, K] relative to the centre, in the order of their angles: of a parallelogram, or of a triangle with its last one twice."""


@register("dead_leaves")
@dataclass(frozen=True)
class DeadLeaves:
    """Dead leaves with radii from a power law, centres uniform in the image, colours uniform (Baradad et al., arXiv 2106.05963)."""

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
    """The fraction of images whose leaves all have one colour, and one second colour in their textures."""
    texture: Literal["none", "stripes", "gradient", "noise", "mixed"] = "none"
    """What fills a leaf: its colour alone, or blended with a second random colour, in waves of random direction and length, once
    across the leaf, or from pixel to pixel; mixed draws one of the three for each leaf."""
    contrast: float = 1.0
    """The most of the second colour that a texture takes; each leaf has its own, uniform from 0."""
    supersampling: int = 2
    """Painted this many times larger in each direction and averaged, so that edges have the partial coverage of scaled-down
    pictures; 1 gives hard edges."""

    def __post_init__(self) -> None:
        require(self.radius_min > 0, "radius_min", "a number > 0", self.radius_min)
        require(self.radius_max > self.radius_min, "radius_max", f"a number > radius_min = {self.radius_min}", self.radius_max)
        require(self.leaves_min >= 0, "leaves_min", "an integer >= 0", self.leaves_min)
        require(self.leaves >= max(self.leaves_min, 1), "leaves", f"an integer >= 1 and >= leaves_min = {self.leaves_min}", self.leaves)
        require(0 <= self.silhouettes <= 1, "silhouettes", "a number in [0, 1]", self.silhouettes)
        require(0 <= self.contrast <= 1, "contrast", "a number in [0, 1]", self.contrast)
        require(1 <= self.supersampling <= 16, "supersampling", "an integer from 1 to 16", self.supersampling)

    def generate(self, streams: Streams) -> np.ndarray:
        """uint8 [n, C, H, W]."""
        images = np.empty((len(streams), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        block_size = max(1, _BLOCK_PIXELS // (self.image_size * self.supersampling) ** 2)
        for start in range(0, len(streams), block_size):
            block = slice(start, start + block_size)
            self._fill(images[block], streams.take(block))
        return images

    def _fill(self, images: np.ndarray, streams: Streams) -> None:
        leaves = self._draw_leaves(streams)
        grounds, colours = self._draw_grounds(streams), self._draw_colours(streams, leaves, "leaf colour")
        side = self.image_size * self.supersampling
        if self.texture == "none":
            canvas = paint(leaves, _packed(colours), _packed(grounds), side)
            total = _box_sum(canvas, self.supersampling)
            mean = _mean(total.view(np.uint16), self.supersampling).reshape(*total.shape, -1)
            images[:] = mean[..., : self.channels].transpose(0, 3, 1, 2)
            return
        n = len(streams)
        top = paint(leaves, np.arange(n, n + len(leaves.image)), np.arange(n), side)
        weight = self._blend(streams, leaves, top)
        seconds = self._draw_colours(streams, leaves, "second colour")
        for c in range(self.channels):
            first = np.concatenate([grounds[:, c], colours[:, c]]).astype(np.float32)
            second = np.concatenate([grounds[:, c], seconds[:, c]]).astype(np.float32)
            blended = first[top] + weight * (second - first)[top] + 0.5
            images[:, c] = _mean(_box_sum(blended.astype(np.uint16), self.supersampling), self.supersampling)

    def _draw_leaves(self, streams: Streams) -> Leaves:
        side = self.image_size * self.supersampling
        low, high = self.leaves_min + 1, self.leaves + 2  # one more, so that there may be none
        counts = np.minimum(low * (high / low) ** streams.uniform("leaves").astype(np.float64), high - 1).astype(np.int64) - 1
        image, number = _ranges(np.zeros_like(counts), counts)
        radius = (self.draw_radii(streams, image, number) * side).astype(np.float32)
        x, y = _draw_for(streams, "leaf centre", image, number, 2, 0, side)
        return Leaves(image, number, np.stack([x, y]), radius, *self._draw_shapes(streams, image, number, radius))

    def draw_radii(self, streams: Streams, image: np.ndarray, number: np.ndarray) -> np.ndarray:
        """The radius of the number_k-th leaf of the image_k-th stream, as a fraction of the image side; float64 [K]."""
        return power_law(streams.uniform_at("leaf radius", image, number), self.exponent, self.radius_min, self.radius_max)

    def _draw_shapes(self, streams: Streams, image: np.ndarray, number: np.ndarray, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """is_circle and corners of `Leaves`.

        A rectangle's diagonals meet at a random angle; a triangle's corners are three uniform points, as in the paper's code.
        """
        if self.shape == "circle":
            return np.ones(len(image), dtype=bool), np.zeros((2, 4, len(image)), dtype=np.float32)
        kind, *angles = _draw_for(streams, "leaf shape", image, number, 4)
        shape = (kind * len(_SHAPES)).astype(np.int64) if self.shape == "mixed" else np.full(len(image), _SHAPES[self.shape])
        a, b, c = (angle * np.float32(2 * np.pi) for angle in angles)
        low, high = np.minimum(a, b), np.maximum(a, b)
        is_triangle = shape == _TRIANGLE
        opening = np.where(shape == _SQUARE, np.float32(np.pi / 2), b / 2)
        turned = np.stack([
            np.where(is_triangle, np.minimum(low, c), a),
            np.where(is_triangle, np.maximum(low, np.minimum(high, c)), a + opening),
            np.where(is_triangle, np.maximum(high, c), a + np.float32(np.pi)),
        ])  # fmt: skip
        corners = np.empty((2, 4, len(image)), dtype=np.float32)
        np.multiply(np.cos(turned), radius, out=corners[0, :3])
        np.multiply(np.sin(turned), radius, out=corners[1, :3])
        corners[:, 3] = np.where(is_triangle, corners[:, 2], -corners[:, 1])
        return shape == _CIRCLE, corners

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

    def _draw_colours(self, streams: Streams, leaves: Leaves, name: str) -> np.ndarray:
        """uint8 [K, C]: uniform, in silhouettes the same for all leaves of an image."""
        is_silhouette = streams.uniform("is silhouette") < self.silhouettes
        number = np.where(is_silhouette[leaves.image], 0, leaves.number)
        return _draw_for(streams, name, leaves.image, number, self.channels, 0, 256).astype(np.uint8).T

    def _blend(self, streams: Streams, leaves: Leaves, top: np.ndarray) -> np.ndarray:
        """How much of the second colour each pixel of the canvas has: float32 like top, in [0, 1].

        Stripes and gradients are (1 + sin t) / 2 with t linear in the pixel's place.
        """
        n, side = top.shape[:2]
        image, number = leaves.image, leaves.number
        if self.texture == "mixed":
            kind = (streams.uniform_at("texture", image, number) * len(_TEXTURES)).astype(np.int64)
        else:
            kind = np.full(len(image), _TEXTURES[self.texture])
        shortest, longest = 3 * self.supersampling, max(side / 2, 3 * self.supersampling)
        wavelength = power_law(streams.uniform_at("wavelength", image, number), 1, shortest, longest).astype(np.float32)
        frequency = np.where(kind == _GRADIENT, np.float32(np.pi / 2) / leaves.radius, np.float32(2 * np.pi) / wavelength)
        direction = streams.uniform_at("direction", image, number, 0, 2 * np.pi)
        fx, fy = frequency * np.cos(direction), frequency * np.sin(direction)
        phase = np.where(kind == _GRADIENT, 0, streams.uniform_at("phase", image, number, 0, 2 * np.pi))
        phase -= fx * leaves.centre[0] + fy * leaves.centre[1]
        contrast = streams.uniform_at("contrast", image, number, 0, 0.5) * np.float32(self.contrast)

        def on_canvas(of_leaf: np.ndarray) -> np.ndarray:
            return np.concatenate([np.zeros(n, of_leaf.dtype), of_leaf])[top]

        place = np.arange(side, dtype=np.float32) + np.float32(0.5)
        pattern = np.sin(on_canvas(fx) * place + on_canvas(fy) * place[:, None] + on_canvas(phase))
        if self.texture in ("noise", "mixed"):
            noise = streams.uniform("noise", (self.image_size, self.image_size), -1, 1)
            noise = noise.repeat(self.supersampling, axis=1).repeat(self.supersampling, axis=2)
            pattern = np.where(on_canvas(kind == _NOISE), noise, pattern)
        return on_canvas(contrast) * (1 + pattern)


def paint(leaves: Leaves, values: np.ndarray, grounds: np.ndarray, side: int) -> np.ndarray:
    """Let the leaves fall; returns what lies on top, [n, side, side] of grounds' dtype.

    A leaf covers the pixels whose centres lie in it with its entry of values [K]; what none covers shows grounds [n].
    """
    (centre_x, centre_y), radius = leaves.centre - np.float32(0.5), leaves.radius
    low = np.where(leaves.is_circle, -radius, leaves.corners[1].min(axis=0))
    high = np.where(leaves.is_circle, radius, leaves.corners[1].max(axis=0))
    # The rows that each leaf meets: one entry per (leaf, row) from here on.
    first = np.clip(np.ceil(centre_y + low), 0, side).astype(np.int64)
    last = np.clip(np.floor(centre_y + high), -1, side - 1).astype(np.int64)
    leaf, row = _ranges(first, np.maximum(last - first + 1, 0))
    y = row.astype(np.float32) - centre_y[leaf]
    low, high = _polygon_spans(leaves.corners, leaf, y)
    (in_circle,) = leaves.is_circle[leaf].nonzero()
    half = np.sqrt(np.maximum(radius[leaf[in_circle]] ** 2 - y[in_circle] ** 2, 0))
    low[in_circle], high[in_circle] = -half, half

    x = centre_x[leaf]
    left = np.clip(np.ceil(x + low), 0, side).astype(np.int64)
    count = np.maximum(np.clip(np.floor(x + high), -1, side - 1).astype(np.int64) - left + 1, 0)
    start = (leaves.image[leaf] * side + row) * side + left
    pixel = np.repeat(start - (np.cumsum(count) - count), count)
    pixel += np.arange(len(pixel))
    canvas = np.repeat(grounds, side * side)
    canvas[pixel] = np.repeat(values[leaf], count)  # NumPy assigns in order: the last leaf on a pixel stays
    return canvas.reshape(len(grounds), side, side)


def _polygon_spans(corners: np.ndarray, leaf: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the line at height y of each entry enters and leaves its leaf's polygon: x twice.

    A convex polygon is what lies between the lines through its edges. With the corners in the order of their angles, edges with falling
    y bound x from below, those with rising y from above; triangles and parallelograms have at most two of each, the first and the last.
    """
    count = corners.shape[2]
    dx, dy = corners - np.roll(corners, 1, axis=1)
    slope = dx / np.where(dy == 0, 1, dy)
    offset = corners[0] - slope * corners[1]
    lines = np.empty((count, 2, 4), dtype=np.float32)  # all of a leaf's side by side, so that they are fetched at once
    for first, is_bound, otherwise in ((0, dy < 0, -np.inf), (2, dy > 0, np.inf)):
        no = (~is_bound).view(np.int8)
        for place, edge in ((first, no[0] * (1 + no[1] * (1 + no[2]))), (first + 1, 3 - no[3] * (1 + no[2] * (1 + no[1])))):
            address = edge * np.int64(count) + np.arange(count)
            lines[:, 0, place] = slope.take(address)
            lines[:, 1, place] = np.where(is_bound.take(address), offset.take(address), np.float32(otherwise))
    fetched = lines.take(leaf, axis=0)
    left, left_too, right, right_too = (fetched[:, 0, place] * y + fetched[:, 1, place] for place in range(4))
    return np.maximum(left, left_too), np.minimum(right, right_too)


def _draw_for(streams: Streams, name: str, image: np.ndarray, number: np.ndarray, count: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """`count` numbers for each leaf, float32 [count, K]."""
    return streams.uniform_at(name, image, number * count + np.arange(count)[:, None], low, high)


def _ranges(start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the integer ranges [start_i, start_i + count_i): (i of each element, the element), int64 both."""
    index = np.repeat(np.arange(len(count)), count)
    offset = np.cumsum(count) - count  # where each range begins in the output
    return index, np.arange(len(index)) + (start - offset)[index]


def _packed(colours: np.ndarray) -> np.ndarray:
    """Colours uint8 [m, C] as one number each, with 16 bits for a channel: uint16 [m] or uint64 [m], so that sums of boxes fit."""
    lanes = np.zeros((len(colours), 1 if colours.shape[1] == 1 else 4), dtype=np.uint16)
    lanes[:, : colours.shape[1]] = colours
    return lanes.view(np.uint16 if lanes.shape[1] == 1 else np.uint64)[:, 0]


def _box_sum(canvas: np.ndarray, factor: int) -> np.ndarray:
    """The sum of each box of factor x factor pixels: [n, factor H, factor W] to [n, H, W]."""
    rows = sum((canvas[:, i::factor] for i in range(1, factor)), start=canvas[:, ::factor])
    return np.ascontiguousarray(sum((rows[:, :, j::factor] for j in range(1, factor)), start=rows[:, :, ::factor]))


def _mean(total: np.ndarray, factor: int) -> np.ndarray:
    """The rounded mean of uint16 sums of boxes, uint8."""
    return ((total + np.uint16(factor**2 // 2)) // np.uint16(factor**2)).astype(np.uint8)
