"""The run's secret key and the independent substreams that every private draw comes from."""

import hashlib
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from dpsyngen.errors import InputError
from dpsyngen.files import writing

Purpose = Literal["batch", "draws", "gradient_noise", "class_means"]


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
