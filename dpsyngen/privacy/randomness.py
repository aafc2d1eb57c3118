"""The run's secret key and the independent substreams that every private draw comes from."""

import hashlib
import math
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from scipy.special import ndtri

from dpsyngen.errors import InputError
from dpsyngen.files import writing

Purpose = Literal["batch", "draws", "gradient_noise", "class_means"]

# Values whose keystream is made at once: zeros and keystream stay in a core's cache.
_STREAM_BLOCK = 2**16
_ZEROS = bytes(8 * _STREAM_BLOCK)


class SecureStream:
    """Random bits that nobody without the key can tell from chance: the keystream of AES-256 in counter mode (NIST SP 800-38A).

    `more` reads the second half of the counter's range, so it never moves what `uint64` gives next. `random` and `standard_normal` stand in
    for NumPy's generator where an approximate distribution of independent values is enough.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._main = _keystream(key, counter=0)
        self._more: CipherContext | None = None

    def uint64(self, count: int) -> np.ndarray:
        """The next `count` values, uniform on [0, 2^64)."""
        values = np.empty(count, dtype="<u8")
        for start in range(0, count, _STREAM_BLOCK):
            block = values[start : start + _STREAM_BLOCK].view(np.uint8).data
            self._main.update_into(memoryview(_ZEROS)[: len(block)], block)
        return values

    def more(self) -> int:
        """64 further bits, from a part of the stream of their own."""
        if self._more is None:
            self._more = _keystream(self._key, counter=2**127)
        return int.from_bytes(self._more.update(bytes(8)), "little")

    def random(self, size: int) -> np.ndarray:
        """Multiples of 2^-53 in [0, 1), float64 [size]."""
        return (self.uint64(size) >> np.uint64(11)) * 2.0**-53

    def standard_normal(self, size: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        """Normal deviates from 32 bits each, so within 6.3 deviations: `dtype` [*size]."""
        count = math.prod(size)
        halves = self.uint64(-(-count // 2)).view("<u4")[:count]
        return ndtri((halves + 0.5) * 2.0**-32).astype(dtype).reshape(size)


def _keystream(key: bytes, counter: int) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.CTR(counter.to_bytes(16, "big"))).encryptor()


@dataclass(frozen=True)
class PrivateKey:
    """256 bits from the operating system that sampling, noise, sigma, n and label dropout derive from.

    Who knows the key can subtract the noise, so it lives in runs/NAME/private/ with mode 0600, is never logged, never
    shared between runs, and is destroyed when the run is finished. `guaranteed` is False for a fixed key, which tests ask for by name.
    """

    secret: bytes = field(repr=False)
    guaranteed: bool = True

    @classmethod
    def fresh(cls) -> "PrivateKey":
        """A new key from the operating system's generator."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def fixed(cls, digits: str) -> "PrivateKey":
        """The key that `privacy.unsafe_fixed_key` spells in hexadecimal; voids the guarantee."""
        return cls(bytes.fromhex(digits), guaranteed=False)

    def substream(self, purpose: Purpose, *, attempt: int = 0, step: int = 0, chunk: int = 0) -> np.random.Generator:
        """The generator of one (purpose, attempt, step, chunk): the same arguments give the same draws, others independent ones.

        BLAKE2b keyed with the secret derives a 128-bit Philox key (Salmon et al., SC 2011).
        """
        message = f"{purpose}/{attempt}/{step}/{chunk}".encode()
        derived = hashlib.blake2b(message, key=self.secret, digest_size=16, person=b"dpsyngen").digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(derived, "little")))

    def secure_stream(self, purpose: Purpose, *, attempt: int = 0, step: int = 0, chunk: int = 0) -> SecureStream:
        """The cryptographic stream of one (purpose, attempt, step, chunk); BLAKE2b keyed with the secret derives its key."""
        message = f"{purpose}/{attempt}/{step}/{chunk}".encode()
        return SecureStream(hashlib.blake2b(message, key=self.secret, digest_size=32, person=b"dpsyngen secure").digest())

    def save(self, path: Path) -> None:
        """Write the key with mode 0600; the file is complete or absent, and never replaces another."""
        partial = path.with_suffix(".partial")
        with writing(path):
            partial.unlink(missing_ok=True)
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write((b"guaranteed\n" if self.guaranteed else b"fixed\n") + self.secret)
                file.flush()
                os.fsync(file.fileno())
        os.link(partial, path)
        partial.unlink()

    @classmethod
    def load(cls, path: Path) -> "PrivateKey":
        """Read a key that `save` wrote; InputError if the file isn't one."""
        kind, _, secret = path.read_bytes().partition(b"\n")
        if kind not in (b"guaranteed", b"fixed") or len(secret) != 32:
            raise InputError(f"{path}: expected a private key of 32 bytes; the run can't go on without it")
        return cls(secret, guaranteed=kind == b"guaranteed")


def destroy(path: Path) -> None:
    """Overwrite a key's file and remove it, so that nobody can subtract the noise later. Missing is fine."""
    path.with_suffix(".partial").unlink(missing_ok=True)  # the same file by another name, where `save` was killed before its last line
    if path.exists():
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()


def poisson_sample(rng: np.random.Generator, population: int, probability: float) -> np.ndarray:
    """Each of `population` units independently with `probability`: sorted int64 indices, possibly none.

    Walks from one drawn unit to the next by geometric gaps, so time and memory grow with the batch, not the population.
    """
    if probability >= 1:
        return np.arange(population)
    drawn: list[np.ndarray] = []
    last, block = -1, max(16, int(1.1 * population * probability))
    while last < population:
        positions = last + np.cumsum(np.minimum(rng.geometric(probability, size=block), population + 1))
        drawn.append(positions)
        last = int(positions[-1])
    indices = np.concatenate(drawn)
    return indices[indices < population]


def secure_poisson_sample(stream: SecureStream, population: int, probability: float) -> np.ndarray:
    """Each of `population` units independently with floor(2^64 probability) / 2^64: sorted int64 indices, possibly none.

    That is `probability` itself from 2^-11 on, and below it less by under 2^-64: never more than was accounted for. Reads 64 bits a unit,
    since geometric gaps worked out in floating point would not be exact.
    """
    if probability >= 1:
        return np.arange(population)
    threshold, block = np.uint64(int(probability * 2.0**64)), 2**20
    drawn = [start + np.flatnonzero(stream.uint64(min(block, population - start)) < threshold) for start in range(0, population, block)]
    return np.concatenate([np.empty(0, dtype=np.int64), *drawn])
