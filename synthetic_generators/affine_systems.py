"""Random iterated function systems of affine maps of the plane, and points of their attractors.

How the maps are drawn, by singular values whose weighted sum keeps the attractor from being mere dust or an even blot, is section 3.2 of
Anderson and Farrell, "Improving Fractal Pre-training" (WACV 2022).

How it is fast: the usual chaos game applies randomly chosen maps to one point after another. Here a point of the attractor is addressed by
the sequence of its maps, thus by a number u in [0, 1): the first map is that whose probability interval holds u, the second follows from
where in that interval u lies, and so on. Evenly spaced u, shifted at random, give points of the chaos game's distribution that cover the
attractor more evenly than those of a game. An address is cut into two words of about equal probability. So P words, a few maps each, make
P^2 points of the attractor, every word applied to the end point of every other, at the price of one map a point.
"""

import numpy as np

from synthetic_generators.streams import Streams

# The most maps in a word. What should be longer, of maps of high probability, occurs more than once.
_LONGEST_WORD = 12
# Added to a map's determinant in its probability, or the thinnest maps would never be drawn.
_THIN = np.float32(0.02)


def draw_maps(streams: Streams, count: np.ndarray, most: int) -> np.ndarray:
    """Systems of `count` [n] affine maps x -> A x + b: float32 [2, 3, n, most], the matrices (A | b); further maps mean nothing.

    A = U diag(s1, s2) V with U, V evenly distributed orthogonal matrices and 1 >= s1 >= s2 >= 0, where the sum of s1 + 2 s2 over the maps
    is even in [(5 + count) / 2, (6 + count) / 2]; b is even in [-1, 1]^2 (Anderson and Farrell, algorithm 1).
    """
    s1, s2 = _singular_values(streams, count, most)
    (cu, su), (cv, sv) = ((np.cos(angle), np.sin(angle)) for angle in (streams.uniform(name, (most,), 0, 2 * np.pi) for name in ("U", "V")))
    s2 *= np.where(streams.uniform("mirror", (most,)) < 0.5, -1, 1)  # the reflections of U and V come to this one of A
    x, y = np.moveaxis(streams.uniform("b", (2, most), -1, 1), 1, 0)
    return np.array(
        [[cu * s1 * cv - su * s2 * sv, -cu * s1 * sv - su * s2 * cv, x],
         [su * s1 * cv + cu * s2 * sv, -su * s1 * sv + cu * s2 * cv, y]]
    )  # fmt: skip


def _singular_values(streams: Streams, count: np.ndarray, most: int) -> np.ndarray:
    """float32 [(s1, s2), n, most]: each value even in what the sum leaves to it when those before it are drawn."""
    uniform = streams.uniform("singular values", (2, most))
    values = np.empty((2, len(streams), most), dtype=np.float32)
    count = count.astype(np.float32)
    total = (5 + count + streams.uniform("singular value sum")) / 2
    least = total - 3 * count + 3  # what is left for this map if all later ones have s1 = s2 = 1
    for k in range(most):
        s1 = _between(np.maximum(least / 3, 0), np.minimum(total, 1), uniform[:, 0, k])
        s2 = _between(np.maximum((least - s1) / 2, 0), np.minimum(s1, (total - s1) / 2), uniform[:, 1, k])
        last = _between(np.maximum((total - 1) / 2, 0), total / 3, uniform[:, 1, k])
        is_last = count == k + 1
        values[:, :, k] = np.where(is_last, total - 2 * last, s1), np.where(is_last, last, s2)
        total, least = total - s1 - 2 * s2, least - s1 - 2 * s2 + 3
    return values


def _between(low: np.ndarray, high: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    return low + (high - low) * uniform


def draw_words(streams: Streams, maps: np.ndarray, count: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray]:
    """Words of each system, of probability about 1 / P, P = words: their products, float32 [2, 3, n, P], and their outermost maps, int64 [n, P].

    Maps are drawn with probabilities in proportion to their determinants, how much of the attractor's area they cover.
    """
    n, most = len(count), maps.shape[3]
    weight = np.abs(maps[0, 0] * maps[1, 1] - maps[0, 1] * maps[1, 0]) + _THIN
    upper = np.cumsum(weight * (np.arange(most) < count[:, None]), axis=1)
    upper /= upper[:, -1:]
    lower = np.concatenate([np.zeros((n, 1), np.float32), upper[:, :-1]], axis=1)
    # For each map its matrix, and where its interval begins and how long it is; last the map that changes nothing.
    rows = np.concatenate([maps.transpose(1, 0, 2, 3).reshape(6, n, most), lower[None], (upper - lower)[None]])
    nothing = np.array([1, 0, 0, 1, 0, 0, 0, 1], dtype=np.float32)
    rows = np.concatenate([rows, np.broadcast_to(nothing[:, None, None], (8, n, 1))], axis=2).reshape(8, -1)

    below_1 = np.float32(1 - 2**-24)  # rounding may not lead beyond the last map
    u = np.minimum((np.arange(words, dtype=np.float32) + streams.uniform("address", (1,))) / np.float32(words), below_1)
    first = _interval(u, upper)
    left = np.ones_like(u)  # the probability of the word so far
    word = np.zeros((2, 3, n, words), dtype=np.float32)
    word[0, 0] = word[1, 1] = 1
    x, y, shift = word[:, 0], word[:, 1], word[:, 2]
    for _ in range(_LONGEST_WORD):
        symbol = np.where(left * np.float32(words) >= 1, _interval(u, upper), most) + (np.arange(n) * (most + 1))[:, None]
        a, c, b, d, e, f, start, length = np.take(rows, symbol, axis=1)
        shift += x * e + y * f  # the later map is applied first
        x[:], y[:] = x * a + y * c, x * b + y * d
        u, left = np.minimum((u - start) / length, below_1), left * length
    return word, first


def _interval(u: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Which of the intervals that end at upper [n, m] holds each of u [n, P]: int64 [n, P]."""
    found = np.zeros(u.shape, dtype=np.int64)
    for k in range(upper.shape[1] - 1):
        found += u >= upper[:, k, None]
    return found


def attractor_points(word: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Every word of [2, 3, n, P] applied to the image under every word of a point [2, n] of the attractor: float32 [2, n, P, P]."""
    x, y = point[:, :, None]
    end = word[:, 0] * x + word[:, 1] * y + word[:, 2]  # [2, n, P]
    points = np.empty((*end.shape, end.shape[2]), dtype=np.float32)
    for axis in range(2):
        a, b, shift = word[axis, ..., None]
        np.multiply(a, end[0, :, None], out=points[axis])
        points[axis] += b * end[1, :, None]
        points[axis] += shift
    return points


def fixed_point(maps: np.ndarray) -> np.ndarray:
    """The solution of A x + b = x for maps [2, 3, n]: float32 [2, n]; it lies on the attractor of any system with that map."""
    (a, b, e), (c, d, f) = maps
    determinant = np.maximum((1 - a) * (1 - d) - b * c, np.float32(1e-6))
    return np.stack([(1 - d) * e + b * f, (1 - a) * f + c * e]) / determinant
