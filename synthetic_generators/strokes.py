"""Pen strokes: figures of a few curves drawn by a round pen, like digits, letters and signs.

A figure is built as in the motor programs of Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic
program induction" (Science 350, 2015): a few strokes, each a chain of short curves, and each after the first begun apart from the earlier
ones or attached to the start, the end or some place along one of them. There the parts are splines whose distributions were fitted to
drawings of 30 alphabets. Here they are cubic Bezier curves whose turns, lengths and joints follow plain distributions, chosen by hand and
fitted to nothing, since programmatic images must cost no privacy; these, the loops and the pen are ours.

How it is fast: the paths of all images are computed at once, the pen is set down on them at equal distances, and only the pixels around
each position are compared with it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from synthetic_generators.registry import register, require
from synthetic_generators.streams import Streams

_STEPS = 12  # straight pieces of a curve
_BLOCK = 256  # images computed together: enough to amortise NumPy's calls, few enough for memory
_SCALLOP = 0.2  # how much shallower, in pixels, the ink may be between two positions of the pen than at them
_CONTRAST = 0.2  # between random colours, as a fraction of the range
_WINDOW_PIXELS = 20_000  # pixels around positions of the pen that are computed together: few enough to stay in cache


@register("strokes")
@dataclass(frozen=True)
class Strokes:
    """Figures like digits, letters and signs: strokes of a round pen on an even ground, each a chain of Bezier curves.

    How strokes are made of curves and hung on one another follows Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through
    probabilistic program induction" (Science, 2015); the distributions, chosen by hand and fitted to nothing, are this project's.
    """

    channels: int
    image_size: int
    strokes: int = 3
    """The most strokes in an image; their number is log-uniform from 1, so half of the images have one."""
    curves: int = 3
    """The most curves in a stroke; their number is uniform from 1."""
    straight: float = 0.25
    """The fraction of curves that are straight lines."""
    turn: float = 240.0
    """The most degrees that a curve turns, to either side; uniform. From about 200 on a curve can cross itself."""
    corners: float = 0.35
    """The fraction of joints of two curves that are corners of any angle; at the others the pen goes on in the same direction."""
    closed: float = 0.2
    """The fraction of strokes that are closed loops, of two curves at least."""
    size_min: float = 0.55
    """The smallest larger side of a figure with its ink, as a fraction of the image side."""
    size_max: float = 0.85
    """The largest; sides are uniform in between."""
    shift: float = 0.2
    """Where a figure lies: 0 in the centre of the image, 1 anywhere within it."""
    width_min: float = 0.6
    """Figures are made narrower by a factor uniform from here to 1, as most writing is."""
    pen_min: float = 0.06
    """The smallest width of the pen, as a fraction of the image side."""
    pen_max: float = 0.14
    """The largest; widths are log-uniform in between, one an image."""
    pressure: float = 0.25
    """How much the pen's width changes along a stroke: up and down by this fraction."""
    edge: float = 1.0
    """How many pixels an edge takes from ink to ground: 1 is the partial coverage of scaled-down pictures, more is blurred."""
    polarity: Literal["bright", "dark", "mixed", "random"] = "bright"
    """bright: light ink on black; dark: black ink on a light ground; mixed: either, half each; random: even random colours, in
    every channel a fifth of the range apart at least."""
    level_min: float = 0.75
    """The darkest of the light levels, as a fraction of white; uniform from here to white, one an image, the same in all channels."""
    random_levels: float = 0.05
    """The fraction of images that have random colours whatever `polarity` says."""

    def __post_init__(self) -> None:
        require(self.strokes >= 1, "strokes", "an integer >= 1", self.strokes)
        require(self.curves >= 1, "curves", "an integer >= 1", self.curves)
        require(0 <= self.turn <= 300, "turn", "degrees in [0, 300]", self.turn)
        for name in ("straight", "corners", "closed", "shift", "level_min", "random_levels"):
            require(0 <= getattr(self, name) <= 1, name, "a number in [0, 1]", getattr(self, name))
        require(0 < self.width_min <= 1, "width_min", "a number in (0, 1]", self.width_min)
        require(self.pen_min > 0, "pen_min", "a number > 0", self.pen_min)
        require(self.pen_max >= self.pen_min, "pen_max", f"a number >= pen_min = {self.pen_min}", self.pen_max)
        require(0 <= self.pressure < 1, "pressure", "a number in [0, 1)", self.pressure)
        thickest = self.pen_max * (1 + self.pressure)
        require(self.size_min > thickest, "size_min", f"a number > pen_max (1 + pressure) = {thickest:.3g}", self.size_min)
        require(self.size_min <= self.size_max <= 1, "size_max", f"a number from size_min = {self.size_min} to 1", self.size_max)
        require(self.edge > 0, "edge", "a number > 0", self.edge)

    def generate(self, streams: Streams) -> np.ndarray:
        """Draw an image for each stream, uint8 [n, C, H, W]."""
        images = np.empty((len(streams), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        for start in range(0, len(streams), _BLOCK):
            images[start : start + _BLOCK] = self._generate_block(streams.take(slice(start, start + _BLOCK)))
        return images

    def _generate_block(self, streams: Streams) -> np.ndarray:
        ratio = np.float32(self.pen_max / self.pen_min)
        half_width = self.image_size * self.pen_min / 2 * ratio ** streams.uniform("pen")
        path, exists = self._draw_figure(streams)
        path = self._fit(streams, path, exists[:, :, 0], half_width)

        along = np.linspace(0, 1, path.shape[3], dtype=np.float32)
        wave = streams.uniform("waves", (self.strokes, 1), 0.25, 1.5) * along + streams.uniform("phase", (self.strokes, 1))
        radius = half_width[:, None, None] * (1 + np.float32(self.pressure) * np.sin(2 * np.pi * wave))
        pieces, widths = (sliding_window_view(v, _STEPS + 1, axis=-1)[..., ::_STEPS, :] for v in (path, radius))  # one a curve
        inside = pen_depth(np.nonzero(exists)[0], pieces[:, exists], widths[exists], len(streams), self.image_size, self.edge / 2)
        coverage = np.clip(inside / self.edge + 0.5, 0, 1)[:, None]
        ink, ground = self._draw_levels(streams)
        return (ground + coverage * (ink - ground) + 0.5).astype(np.uint8)

    def _draw_figure(self, streams: Streams) -> tuple[np.ndarray, np.ndarray]:
        """Paths float32 [2, n, S, L] as (x, y) in no particular unit, and which of their curves there are, bool [n, S, J]."""
        count = np.float32(self.strokes + 1) ** streams.uniform("strokes")
        drawn = np.arange(1, self.strokes + 1) <= count[:, None]
        path, exists = self._draw_strokes(streams)
        # A stroke is hung by one of its points, often the first, on a point of an earlier one or near it.
        rows, last = np.arange(len(streams)), path.shape[3] - 1
        for stroke in range(1, self.strokes):
            earlier = streams.integers(f"earlier {stroke}", stroke)
            own, place = (streams.integers(f"{end} {stroke}", last + 1) for end in ("own", "place"))
            own[streams.uniform(f"begins there {stroke}") < 0.5] = 0
            relation = streams.integers(f"relation {stroke}", 4)  # apart, from the start, from the end, along
            place[relation == 1], place[relation == 2] = 0, last
            apart = streams.uniform(f"apart {stroke}", (2,), -0.8, 0.8).T * (relation == 0)
            path[:, :, stroke] += (path[:, rows, earlier, place] - path[:, rows, stroke, own] + apart)[:, :, None]
        return path, exists & drawn[:, :, None]

    def _draw_strokes(self, streams: Streams) -> tuple[np.ndarray, np.ndarray]:
        """Every stroke by itself from (0, 0), float32 [2, n, S, L], and its curves, bool [n, S, J]; after the last it stays at its end."""
        curves = max(self.curves, 2)
        shape = (self.strokes, curves)
        closed = streams.uniform("closed", (self.strokes, 1)) < self.closed
        count = np.maximum(streams.integers("curves", self.curves, (self.strokes, 1)) + 1, np.where(closed, 2, 1))
        exists = np.arange(curves) < count

        bound = np.radians(self.turn)
        turn = streams.uniform("turn", shape, -bound, bound) * (streams.uniform("straight", shape) >= self.straight)
        share = streams.uniform("share", shape, 1, 1.8) * exists
        sense = np.where(streams.uniform("sense", (self.strokes, 1)) < 0.5, -2 * np.pi, 2 * np.pi)
        turn = np.where(closed, sense * share / np.cumsum(share, axis=2)[:, :, -1:], turn).astype(np.float32)
        # A curve that turns more is longer, or thick pens would fill it.
        length = streams.uniform("length", shape, 0.3, 1) * (1 + np.abs(turn) / 2) * exists
        length[:, 1:] *= streams.uniform("shorter", (self.strokes - 1, 1), 0.4, 1)

        bend = streams.uniform("bend", shape, 0, 2 * np.pi)  # the change of direction before each curve
        bend[:, :, 1:] *= (streams.uniform("corner", shape)[:, :, 1:] < self.corners) & ~closed
        bend[:, :, 1:] += turn[:, :, :-1]
        path = bezier_chain(np.cumsum(bend, axis=2), turn, length, streams.uniform("handles", (2, *shape), 0.7, 1.3))
        # What is left open of a loop is spread evenly along it.
        progress = np.minimum(np.arange(path.shape[3]) / (_STEPS * count), closed).astype(np.float32)
        return path - path[:, :, :, -1:] * progress, exists

    def _fit(self, streams: Streams, path: np.ndarray, drawn: np.ndarray, half_width: np.ndarray) -> np.ndarray:
        """Scale and place the figures; pixels, float32 [2, n, S, L]."""
        path[0] *= streams.uniform("width", (1, 1), self.width_min, 1)
        low = np.where(drawn[:, :, None], path, np.inf).min(axis=(2, 3))
        high = np.where(drawn[:, :, None], path, -np.inf).max(axis=(2, 3))
        size = self.image_size * streams.uniform("size", (), self.size_min, self.size_max)
        scale = (size - 2 * half_width * (1 + self.pressure)) / np.maximum((high - low).max(axis=0), 1e-3)
        room = self.image_size - (high - low) * scale - 2 * half_width * (1 + self.pressure)
        centre = self.image_size / 2 + streams.uniform("place", (2,), -0.5, 0.5).T * room * self.shift
        return ((path - ((low + high) / 2)[:, :, None, None]) * scale[:, None, None] + centre[:, :, None, None]).astype(np.float32)

    def _draw_levels(self, streams: Streams) -> tuple[np.ndarray, np.ndarray]:
        """Ink and ground, float32 [n, C, 1, 1] each, in [0, 255]."""
        light = streams.uniform("level", (1, 1, 1), 255 * self.level_min, 255)
        is_bright = streams.uniform("polarity", (1, 1, 1)) < {"dark": 0.0, "mixed": 0.5}.get(self.polarity, 1.0)
        is_random = streams.uniform("random levels", (1, 1, 1)) < (1 if self.polarity == "random" else self.random_levels)
        colour = streams.uniform("colour", (self.channels, 1, 1), 0, 255)
        other = (colour + streams.uniform("contrast", (self.channels, 1, 1), 255 * _CONTRAST, 255 * (1 - _CONTRAST))) % 255
        return np.where(is_random, other, light * is_bright), np.where(is_random, colour, light * ~is_bright)


def bezier_chain(heading: np.ndarray, turn: np.ndarray, length: np.ndarray, handles: np.ndarray) -> np.ndarray:
    """Chains of cubic Bezier curves that begin at (0, 0), as polygons of L = 12 J + 1 points: float32 [2, n, S, L] as (x, y).

    Curve j sets out in direction heading [n, S, J] and turns by turn, radians both; with handles [n, 2, S, J] of 1 it is the usual
    approximation of a circle's arc of the given length (control points (4/3) tan(turn/4) radii from the ends).
    """
    quarter = np.maximum(np.abs(turn / 4), 1e-3)
    chord = length * np.sin(2 * quarter) / (2 * quarter)
    handle = length * np.tan(quarter) / (3 * quarter)
    first, middle, last = (np.stack([np.cos(a), np.sin(a)]) for a in (heading, heading + turn / 2, heading + turn))
    end = chord * middle
    controls = handle * handles[:, 0] * first, end - handle * handles[:, 1] * last, end
    t = np.arange(1, _STEPS + 1, dtype=np.float32) / _STEPS
    weights = 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
    curve = sum(control[..., None] * weight for control, weight in zip(controls, weights, strict=True))
    curve[:, :, :, 1:] += np.cumsum(end, axis=3)[:, :, :, :-1, None]
    path = np.zeros((*curve.shape[:3], _STEPS * turn.shape[2] + 1), dtype=np.float32)
    path[..., 1:] = curve.reshape(*curve.shape[:3], -1)
    return path


def pen_depth(image: np.ndarray, path: np.ndarray, radius: np.ndarray, n: int, side: int, blur: float) -> np.ndarray:
    """How deep each pixel's centre lies in the ink: radius of the pen minus distance, the largest over its positions.

    Curve m of M lies in image [M] (below n) and goes along path [2, M, L], points (x, y) within the image, with radius [M, L] of the
    pen there; both in pixels. Returns float32 [n, side, side], cut off at -blur, right to 0.14 pixels from there to blur.
    """
    points = radius.shape[1]
    walked = np.zeros_like(radius)
    np.cumsum(np.hypot(*np.diff(path, axis=2)), axis=1, out=walked[:, 1:])
    # Between positions s apart, the ink at distance d from the path is up to s^2 / (8 d), at most s / 2, too shallow; its edges begin at
    # d = r - blur. A wider pen makes good the mean, a third.
    spacing = np.sqrt(8 * _SCALLOP * np.maximum(radius.min(axis=1, initial=np.inf) - blur, _SCALLOP / 2))
    positions = np.maximum(np.ceil(walked[:, -1] / spacing), 1)
    walked *= (positions / np.maximum(walked[:, -1], 1e-6))[:, None]  # position k is where k has been walked
    reached = np.minimum(np.floor(walked), positions[:, None]).astype(np.int64)
    reached[:, -1] = positions
    count = np.diff(reached, axis=1, prepend=-1).ravel()  # positions after point l - 1, up to point l

    end = np.repeat(np.arange(len(count)), count)
    start = end - (end % points > 0)
    walked, number = walked.ravel(), np.arange(len(end)) + (reached.ravel() + 1 - np.cumsum(count))[end]
    part = np.clip((number - walked[start]) / np.maximum(walked[end] - walked[start], 1e-6), 0, 1).astype(np.float32)
    x, y, radius = (v[start] + part * (v[end] - v[start]) for v in (path[0].ravel(), path[1].ravel(), radius.ravel()))
    return _stamp(image[end // points], x, y, radius + np.float32(_SCALLOP / 3), n, side, blur)


def _stamp(image: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray, n: int, side: int, blur: float) -> np.ndarray:
    """Set the pen down at positions (x, y) of images [T]; see `pen_depth`."""
    reach = float(radius.max(initial=0)) + blur
    window = int(2 * reach) + 1
    margin = window // 2 + 1
    padded = side + 2 * margin
    depth = np.full(n * padded**2, -blur, dtype=np.float32)

    cells = np.arange(window)
    left, top = np.ceil(x - reach - 0.5), np.ceil(y - reach - 0.5)
    corner = (image * padded + top.astype(np.int64) + margin) * padded + left.astype(np.int64) + margin
    dx, dy = ((low - centre + 0.5)[:, None] + cells.astype(np.float32) for low, centre in ((left, x), (top, y)))
    dx, dy = (dx * dx)[:, None, :], (dy * dy)[:, :, None]
    offsets = (cells[:, None] * padded + cells).ravel()
    together = max(1, _WINDOW_PIXELS // window**2)
    for start in range(0, len(image), together):
        chunk = slice(start, start + together)
        pixel = corner[chunk, None] + offsets
        inside = radius[chunk, None] - np.sqrt(dy[chunk] + dx[chunk]).reshape(pixel.shape)
        np.maximum.at(depth, pixel.ravel(), inside.ravel())
    return depth.reshape(n, padded, padded)[:, margin:-margin, margin:-margin]
