"""Smooth shapes: shaded silhouettes with round outlines, like garments, organs, leaves and pebbles.

An outline is a closed curve described by a few Fourier coefficients, the oldest way to give a shape a smooth boundary of chosen
complexity (Zahn and Roskies, "Fourier descriptors for plane closed curves", IEEE Transactions on Computers C-21, 1972; they expand the
direction of the tangent). Here the radius about a centre is expanded,

    r(theta) = R (1 + sum_k a_k cos(k theta) + b_k sin(k theta)),

so outlines are star-shaped and never cross themselves, whether a pixel lies inside is a comparison, and the area has a closed form. The
distributions, mirror symmetry, shading, rims and hollows are ours.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from synthetic_generators.registry import register, require
from synthetic_generators.streams import Streams

_BLOCK = 256  # images whose shapes are drawn together: enough to amortise NumPy's calls
_PIXELS = 25_000  # laid on together: few enough to stay in cache
_DIRECTIONS = 256  # of the tables of outlines; a multiple of 4
_GROUNDS = ("black", "white", "plain", "gradient")


class _Shapes(NamedTuple):
    """n shapes: what `locate` takes, and their levels."""

    centre: np.ndarray
    axes: np.ndarray
    turn: np.ndarray
    distance: np.ndarray
    reach: np.ndarray
    fill: np.ndarray  # [n, C, 1, 1], the level in the middle
    rim: np.ndarray  # [n, C, 1, 1], how much more the rim's is
    shading: np.ndarray  # [n, 2, 1, 1], the change of level along the first axis, and from the centre to the outline
    core: np.ndarray  # [n, 1, 1, 1], the part of the radius within the rim; 0 where there is none
    hollow: np.ndarray  # bool [n, 1, 1, 1]


@register("smooth_shapes")
@dataclass(frozen=True)
class SmoothShapes:
    """Shaded silhouettes with smooth outlines, like garments, organs or pebbles, that lie on one another on an even or shaded ground.

    Outlines are given by Fourier coefficients, here of the radius, after Zahn and Roskies, "Fourier descriptors for plane closed curves"
    (IEEE Transactions on Computers, 1972); what the coefficients, shades and rims are is this project's.
    """

    channels: int
    image_size: int
    shapes: int = 3
    """The most shapes in an image; their number is log-uniform from 1, so half of the images have one."""
    lobes: int = 6
    """The highest harmonic of an outline: it has at most so many lobes."""
    lumps: float = 0.8
    """How far an outline may depart from an ellipse: the coefficients' amplitudes sum to an even random number from 0 to this."""
    decay: float = 1.0
    """Amplitudes fall as k^-decay; more makes outlines smoother."""
    stretch: float = 2.0
    """The largest ratio of a shape's two axes; log-uniform from its inverse."""
    symmetric: float = 0.5
    """The fraction of shapes that are mirror images of themselves about an upright axis, as many made and grown things are."""
    size_min: float = 0.3
    """The smallest diameter of a shape, as a fraction of the image side, in the mean over directions and before its outline is lumpy."""
    size_max: float = 0.9
    """The largest; uniform in between."""
    shift: float = 0.6
    """Where shapes lie: 0 in the centre of the image, 1 anywhere that leaves a circle of their size within it."""
    shading: float = 0.5
    """The most that a shape's level changes from its centre to its outline, as a fraction of the range, evenly in one direction and from
    the centre outwards; both are uniform from minus this."""
    hollow: float = 0.15
    """The fraction of shapes that are rims alone and show what is behind."""
    rims: float = 0.2
    """The fraction of the other shapes that have a rim of another colour."""
    contrast: float = 0.15
    """How far a shape's colour is from the ground's at least, in every channel and before shading, as a fraction of the range."""
    alike: float = 0.0
    """The fraction of later shapes of an image that have the first one's colour, as sleeves have that of the garment."""
    mirrored: float = 0.0
    """The fraction of images whose right half is the mirror image of the left, so that shapes beside the middle become pairs: legs, handles."""
    ground: Literal["mixed", "black", "white", "plain", "gradient"] = "mixed"
    """What the shapes lie on: plain is an even random colour, gradient one that changes evenly in a random direction; mixed draws one of
    the other four for each image."""
    edge: float = 1.0
    """How many pixels an edge takes: 1 is the partial coverage of scaled-down pictures, more is blurred."""

    def __post_init__(self) -> None:
        require(self.shapes >= 1, "shapes", "an integer >= 1", self.shapes)
        require(self.lobes >= 1, "lobes", "an integer >= 1", self.lobes)
        require(0 <= self.lumps < 1, "lumps", "a number in [0, 1)", self.lumps)
        require(self.decay >= 0, "decay", "a number >= 0", self.decay)
        require(self.stretch >= 1, "stretch", "a number >= 1", self.stretch)
        for name in ("symmetric", "shift", "shading", "hollow", "rims", "alike", "mirrored"):
            require(0 <= getattr(self, name) <= 1, name, "a number in [0, 1]", getattr(self, name))
        require(self.size_min > 0, "size_min", "a number > 0", self.size_min)
        require(self.size_min <= self.size_max <= 1, "size_max", f"a number from size_min = {self.size_min} to 1", self.size_max)
        require(0 <= self.contrast <= 0.5, "contrast", "a number in [0, 0.5]", self.contrast)
        require(self.edge > 0, "edge", "a number > 0", self.edge)

    def generate(self, streams: Streams) -> np.ndarray:
        """Draw an image for each stream, uint8 [n, C, H, W]."""
        images = np.empty((len(streams), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        for start in range(0, len(streams), _BLOCK):
            images[start : start + _BLOCK] = self._generate_block(streams.take(slice(start, start + _BLOCK)))
        return images

    def _generate_block(self, streams: Streams) -> np.ndarray:
        ground, images = self._draw_grounds(streams)
        count = np.float32(self.shapes + 1) ** streams.uniform("shapes")
        mirrored = streams.uniform("mirrored") < self.mirrored
        first = np.full_like(ground, np.nan)  # the first shapes' colours
        together = max(1, _PIXELS // self.image_size**2)
        for number in range(1, self.shapes + 1):
            image = np.flatnonzero(count >= number)
            shapes = self._draw_shapes(streams.take(image).child(f"shape {number}"), ground[image], first[image], mirrored[image])
            if number == 1:
                first[image] = shapes.fill
            for start in range(0, len(image), together):
                chunk = slice(start, start + together)
                images[image[chunk]] = self._lay(images[image[chunk]], _Shapes(*(field[chunk] for field in shapes)))
        half = self.image_size // 2
        images[mirrored, :, :, -half:] = images[mirrored, :, :, half - 1 :: -1]
        return (images * 255 + 0.5).astype(np.uint8)

    def _draw_grounds(self, streams: Streams) -> tuple[np.ndarray, np.ndarray]:
        """Levels in [0, 1] in the middle of the images, float32 [n, C, 1, 1], and the grounds, float32 [n, C, H, W]."""
        kind = streams.integers("ground", len(_GROUNDS), (1, 1, 1)) if self.ground == "mixed" else _GROUNDS.index(self.ground)
        level = streams.uniform("ground level", (self.channels, 1, 1))
        level = np.where(kind == 0, 0, np.where(kind == 1, 1, level)).astype(np.float32)
        slope = streams.uniform("ground slope", (2, 1, 1), -0.6, 0.6) * (kind == 3)
        x = ((np.arange(self.image_size, dtype=np.float32) + 0.5) / self.image_size - 0.5)[None, :]
        change = slope[:, :1] * x + slope[:, 1:] * x.T
        return level, np.clip(level + change, 0, 1)

    def _draw_shapes(self, streams: Streams, ground: np.ndarray, first: np.ndarray, mirrored: np.ndarray) -> _Shapes:
        """A shape for each image, given levels [n, C, 1, 1] of the ground and of the image's first shape, nan for that one, and bool [n]."""
        draw = streams.uniform
        diameter = self.image_size * draw("size", (1,), self.size_min, self.size_max)
        centre = self.image_size / 2 + draw("centre", (2,), -0.5, 0.5) * (self.image_size - diameter) * self.shift
        centre[:, 0] = np.where(mirrored, np.minimum(centre[:, 0], self.image_size - centre[:, 0]), centre[:, 0])
        ratio = np.float32(self.stretch) ** draw("stretch", (1,), -0.5, 0.5)
        symmetric = draw("symmetric") < self.symmetric
        turn = np.where(symmetric, np.float32(-np.pi / 2), draw("turn", (), 0, 2 * np.pi))

        weight = draw("amplitudes", (self.lobes,)) * np.arange(1, self.lobes + 1, dtype=np.float32) ** np.float32(-self.decay)
        amplitude = weight / np.maximum(np.cumsum(weight, axis=1)[:, -1:], 1e-6) * draw("lumps", (1,), 0, self.lumps)
        half_turns = draw("phases", (self.lobes,), 0, 2)
        phase = np.where(symmetric[:, None], np.floor(half_turns), half_turns) * np.float32(np.pi)
        axes = diameter / 2 * np.concatenate([ratio, 1 / ratio], axis=1)
        distance, reach = outline_tables(axes, amplitude * np.cos(phase), amplitude * np.sin(phase))

        fill, rim = ((ground + draw(name, ground.shape[1:], self.contrast, 1 - self.contrast)) % 1 for name in ("fill", "rim"))
        fill = np.where((draw("alike", (1, 1, 1)) < self.alike) & ~np.isnan(first), first, fill)
        kind = draw("kind", (1, 1, 1))
        hollow, rimmed = kind < self.hollow, (kind >= self.hollow) & (kind < self.hollow + self.rims * (1 - self.hollow))
        core = np.where(hollow | rimmed, 1 - draw("rim width", (1, 1, 1), 0.12, 0.4), 0)
        shading = draw("shading", (2, 1, 1), -self.shading, self.shading)
        return _Shapes(centre, axes, turn, distance, reach, fill, (rim - fill) * rimmed, shading, core, hollow)

    def _lay(self, images: np.ndarray, shapes: _Shapes) -> np.ndarray:
        """The images [n, C, H, W] with a shape on each; levels in [0, 1]."""
        share, reach, across = locate(shapes.centre, shapes.axes, shapes.turn, shapes.distance, shapes.reach, self.image_size)
        reach /= self.edge
        cover = np.clip((1 - share) * reach + 0.5, 0, 1)[:, None]
        shade = shapes.shading[:, 0] * across + shapes.shading[:, 1] * (share - 0.5)
        colour = shapes.fill + shade[:, None]

        cored = np.flatnonzero(shapes.core)
        inside = np.clip((shapes.core[cored, 0] - share[cored]) * reach[cored] + 0.5, 0, 1)[:, None]
        cover[cored] *= 1 - inside * shapes.hollow[cored]
        colour[cored] += (1 - inside) * shapes.rim[cored]
        return images + cover * (np.clip(colour, 0, 1) - images)


def outline_tables(axes: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `locate` needs of n outlines, for 258 directions: float32 [n, 258] twice.

    Half axes [n, 2] in pixels; cosine, sine [n, K] are a_k, b_k for k = 1, ..., K, whose amplitudes sum to less than 1. A shape has the
    area pi axes[0] axes[1] (1 + sum_k (a_k^2 + b_k^2) / 2). Given for points (u, v) with |u| + |v| = 1, in half axes from the centre, are
    their distance from it as a share of the radius, and the reach, by which 1 - share becomes the depth below the outline in pixels.

    Entry j is for v = 4 j / D - 1 and u >= 0 in the first half, v = 3 - 4 j / D and u < 0 in the other: a substitute for the angle that
    costs no arctangent, and whose kinks lie on entries.
    """
    length, theta, cos, sin = _directions(cosine.shape[1])
    radius = np.ones((len(axes), len(theta)), dtype=np.float32)
    for k in range(cosine.shape[1]):
        radius += cosine[:, k, None] * cos[k]
        radius += sine[:, k, None] * sin[k]
    slope = (radius[:, 2:] - radius[:, :-2]) / (theta[2:] - theta[:-2])  # dr / dtheta
    radius, cos, sin = radius[:, 1:-1], cos[0, 1:-1], sin[0, 1:-1]
    slope /= radius
    # The gradient of r(theta) - rho in pixels, on the outline.
    across, along = (cos + slope * sin) / axes[:, :1], (sin - slope * cos) / axes[:, 1:]
    return length[1:-1] / radius, radius / np.sqrt(across * across + along * along)


@lru_cache
def _directions(lobes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For `outline_tables`, with one more entry at each end: length and angle of (u, v), cos and sin [lobes, 260] of the angle's multiples."""
    place = np.arange(-1, _DIRECTIONS + 3, dtype=np.float32) * np.float32(4 / _DIRECTIONS) - 1
    v = np.where(place <= 1, place, 2 - place)
    u = np.where(place <= 1, 1 - np.abs(v), np.abs(v) - 1)
    theta = np.unwrap(np.arctan2(v, u))
    multiples = np.arange(1, lobes + 1, dtype=np.float32)[:, None] * theta
    return np.hypot(u, v), theta, np.cos(multiples), np.sin(multiples)


def locate(
    centre: np.ndarray, axes: np.ndarray, turn: np.ndarray, distance: np.ndarray, reach: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where every pixel's centre lies in n shapes: float32 [n, side, side] three times.

    centre [n, 2] as (x, y) and half axes [n, 2] in pixels; the first axis points to turn [n] radians, from x to y; distance and reach come
    from `outline_tables`. Returns share, the pixel's distance from the centre over the radius in its direction, 1 on the outline; reach,
    by which (1 - share) reach is the depth below the outline in pixels, to first order; the place along the first axis in half axes.
    """
    first, second = axes[:, 0, None, None], axes[:, 1, None, None]
    c, s = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
    pixel = np.arange(side, dtype=np.float32) + np.float32(0.5)
    x, y = (pixel - centre[:, :1])[:, None, :], (pixel - centre[:, 1:])[:, :, None]
    u, v = x * (c / first) + y * (s / first), y * (c / second) - x * (s / second)

    norm = np.abs(u) + np.abs(v) + np.float32(1e-6)
    v /= norm
    place = np.where(u < 0, 3 - v, 1 + v) * np.float32(_DIRECTIONS / 4)
    entry = np.floor(place)
    place -= entry
    index = entry.astype(np.int64) + (np.arange(len(turn)) * distance.shape[1])[:, None, None]
    share = distance.ravel()[index]
    share += place * (distance.ravel()[1:][index] - share)
    share *= norm
    return share, reach.ravel()[index], u
