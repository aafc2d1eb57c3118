"""Random numbers by address: image `index` of `seed` has the same ones in any batch, on any process, in any order.

NumPy's generators are sequences, so a batch would share one, or every image would need an object of its own and a Python loop. Here a
number is a hash of its address instead (a counter-based generator, as in Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
2011), so that whole arrays over many images are computed at once. The hash is SplitMix64 (Steele, Lea and Flood, "Fast Splittable
Pseudorandom Number Generators", 2014). Not for secrets.
"""

import hashlib
from collections.abc import Sequence
from math import prod

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Streams:
    """The randomness of n images. Every draw names what it is for; another name, another independent draw.

    `uniform` and its kin give an array over all images; `uniform_at` gives single entries of such an array, for what images have
    in different numbers: leaves, strokes, points.
    """

    def __init__(self, seed: int, indices: np.ndarray | Sequence[int] | range) -> None:
        """seed any integer >= 0; indices [n], integers in [0, 2^63), the place of each image in the endless sequence of the seed."""
        self._begin(_hash(str(seed)), np.asarray(indices, dtype=np.int64))

    def _begin(self, seed_key: np.ndarray, indices: np.ndarray) -> None:
        self.indices = indices
        self._seed_key = seed_key
        self._keys = _mix(_mix(indices.astype(np.uint64) * _GAMMA + seed_key))

    def __len__(self) -> int:
        """The number of images, n."""
        return len(self._keys)

    def take(self, which: slice | np.ndarray) -> "Streams":
        """The streams of some of the images: a slice, integers, or bool [n]."""
        return self.at(self.indices[which])

    def at(self, indices: np.ndarray) -> "Streams":
        """The streams of other images of the same seed."""
        streams = Streams.__new__(Streams)
        streams._begin(self._seed_key, indices)
        return streams

    def child(self, name: str) -> "Streams":
        """Streams of the same images that are independent of these, for a part that must not know which names the whole draws."""
        streams = Streams.__new__(Streams)
        streams._begin(_mix(self._seed_key ^ _hash(name)), self.indices)
        return streams

    def uniform(self, name: str, shape: tuple[int, ...] = (), low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """float32 [n, *shape], uniform in [low, high)."""
        bits = self._bits(self._named(name)[:, None], np.arange(prod(shape), dtype=np.uint64))
        return _scaled(bits, low, high).reshape(len(self), *shape)

    def uniform_at(self, name: str, image: np.ndarray, number: np.ndarray, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """float32 [K]: entry [image_k, number_k] of what `uniform(name, (m,))` gives for any m > number_k."""
        return _scaled(self._bits(self._named(name)[image], number.astype(np.uint64)), low, high)

    def integers(self, name: str, high: int, shape: tuple[int, ...] = ()) -> np.ndarray:
        """int64 [n, *shape], uniform in 0, ..., high - 1; high at most 2^24."""
        return (self.uniform(name, shape).astype(np.float64) * high).astype(np.int64)

    def normal(self, name: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        """float32 [n, *shape], standard normal (Box and Muller, 1958; no value beyond 5.8)."""
        half = (prod(shape) + 1) // 2
        radius = np.sqrt(-2 * np.log1p(-self.uniform(name + " radius", (half,))))
        angle = self.uniform(name + " angle", (half,), 0, 2 * np.pi)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return both[:, : prod(shape)].reshape(len(self), *shape)

    def _named(self, name: str) -> np.ndarray:
        """One key per image for a draw: uint64 [n]."""
        return _mix(self._keys ^ _hash(name))

    @staticmethod
    def _bits(key: np.ndarray, number: np.ndarray) -> np.ndarray:
        """64 random bits for each number (broadcast) of the sequence that a key begins."""
        return _mix(key + (number + np.uint64(1)) * _GAMMA)


def _hash(text: str) -> np.ndarray:
    """64 bits of a text, uint64 [1]; an array, since NumPy warns when a scalar overflows."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), dtype="<u8").astype(np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of 64 bits in which every input bit moves every output bit."""
    x = x ^ (x >> np.uint64(30))
    x *= _FACTORS[0]
    x ^= x >> np.uint64(27)
    x *= _FACTORS[1]
    x ^= x >> np.uint64(31)
    return x


def _scaled(bits: np.ndarray, low: float, high: float) -> np.ndarray:
    """float32 in [low, high) from the upper 24 of 64 bits."""
    unit = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    if (low, high) == (0.0, 1.0):
        return unit
    return np.minimum(np.float32(low) + unit * np.float32(high - low), np.nextafter(np.float32(high), np.float32(low)))
