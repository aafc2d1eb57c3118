"""Distributions of the noise level: each maps one uniform to one sigma by its inverse CDF.

Never by rejection: a draw costs the same whatever the data, the range and the density.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.special import log_ndtr, logsumexp, ndtri_exp
from torch import Tensor

_LARGEST_UNIFORM = 1 - 2.0**-53


class SigmaDraw(Protocol):
    """A distribution of ln sigma."""

    def log_sigma(self, uniform: np.ndarray) -> np.ndarray:
        """The inverse CDF: uniforms in [0, 1) to ln sigma, float64 of the same shape, non-decreasing within a stage."""


def sigma_of(distribution: SigmaDraw, uniform: np.ndarray) -> Tensor:
    """Sigma for each uniform in [0, 1), float32 of the same shape."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.exp(distribution.log_sigma(uniform)).astype(np.float32))


def stratified(uniform: np.ndarray, strata: int) -> np.ndarray:
    """Uniforms in [0, 1), float64 [n * strata], of which each `strata` adjacent ones lie one in each of as many equal parts of [0, 1).

    From independent ones of that shape: u becomes (k + u) / strata in part k. A random one of `strata` adjacent results is uniform again.
    """
    parts = (np.arange(strata) + uniform.reshape(-1, strata)) / strata
    return np.minimum(parts, _LARGEST_UNIFORM).ravel()


@dataclass(frozen=True)
class TruncatedNormal:
    """ln sigma ~ N(mean, std^2) truncated to [lower, upper], whose ends may be infinite, and renormalised (the draw of EDM, Karras et al.,
    arXiv 2206.00364, Table 1, within a stage).

    Raises ValueError if the range lies so far in a tail that its probability can't be told.
    """

    lower: float
    upper: float
    mean: float
    std: float

    def __post_init__(self) -> None:
        if not np.isfinite(log_ndtr(max(self._bounds))):
            raise ValueError(f"expected a p_mean and p_std that reach [{self.lower:g}, {self.upper:g}], got {self.mean:g} and {self.std:g}")

    def __str__(self) -> str:
        return f"lognormal of {self.mean:g} and {self.std:g}"

    @property
    def _bounds(self) -> tuple[float, float]:
        """The range in deviations, mirrored if most of it lies above the mean: log_ndtr is exact in the lower tail only."""
        a, b = (self.lower - self.mean) / self.std, (self.upper - self.mean) / self.std
        return (-b, -a) if self._mirrored else (a, b)

    @property
    def _mirrored(self) -> bool:
        return self.lower - self.mean + (self.upper - self.mean) > 0

    def log_sigma(self, uniform: np.ndarray) -> np.ndarray:
        """As `SigmaDraw`; in log probabilities, since a range may lie many deviations from the mean."""
        a, b = self._bounds
        with np.errstate(divide="ignore"):
            below, above = np.log1p(-uniform), np.log(uniform)
            if self._mirrored:
                below, above = above, below
            z = ndtri_exp(logsumexp(np.stack([below + log_ndtr(a), above + log_ndtr(b)]), axis=0))
        z = np.clip(z, a, b)
        return self.mean + self.std * (-z if self._mirrored else z)


@dataclass(frozen=True)
class Uniform:
    """ln sigma uniform on [lower, upper]; ValueError unless these are finite and in order."""

    lower: float
    upper: float

    def __post_init__(self) -> None:
        if not -np.inf < self.lower < self.upper < np.inf:
            raise ValueError(f"expected a range of ln sigma that begins before it ends, got [{self.lower:g}, {self.upper:g}]")

    def __str__(self) -> str:
        return f"uniform in ln sigma from {self.lower:.3g} to {self.upper:.3g}"

    def log_sigma(self, uniform: np.ndarray) -> np.ndarray:
        """As `SigmaDraw`."""
        return self.lower + uniform * (self.upper - self.lower)


@dataclass(frozen=True)
class PiecewiseLinear:
    """ln sigma with a density of straight lines between knots (ln sigma, weight), zero outside them, restricted to [lower, upper] and
    renormalised; ValueError if nothing is left of it there.
    """

    knots: tuple[tuple[float, float], ...]
    lower: float
    upper: float

    def __post_init__(self) -> None:
        places, _, mass = self._table()
        if len(places) < 2 or not mass[-1] > 0:
            raise ValueError(f"expected weights above 0 somewhere in [{self.lower:g}, {self.upper:g}], got {[list(knot) for knot in self.knots]}")

    def __str__(self) -> str:
        return f"weights at {len(self.knots)} ln sigma"

    def log_sigma(self, uniform: np.ndarray) -> np.ndarray:
        """As `SigmaDraw`: the piece by the cumulated mass, then the root of the quadratic that the mass is within it."""
        places, weights, mass = self._table()
        target = uniform * mass[-1]
        piece = np.clip(np.searchsorted(mass, target, side="right") - 1, 0, len(places) - 2)
        start, left, length = weights[piece], target - mass[piece], np.diff(places)[piece]
        slope = (np.diff(weights) / np.diff(places))[piece]
        root = np.sqrt(np.maximum(start**2 + 2 * slope * left, 0.0))
        with np.errstate(invalid="ignore"):
            inside = np.where(left > 0, 2 * left / (start + root), 0.0)  # Citardauq's form: no cancellation, and slope 0 is no exception
        return places[piece] + np.clip(inside, 0.0, length)

    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ends of the pieces, the weights there and the mass up to there, each float64 [pieces + 1]."""
        known, values = np.array(self.knots, dtype=np.float64).T
        low, high = max(self.lower, known[0]), min(self.upper, known[-1])
        places = np.array([low, *known[(known > low) & (known < high)], high]) if low < high else np.empty(0)
        weights = np.interp(places, known, values)
        return places, weights, np.concatenate([[0.0], np.cumsum(np.diff(places) * (weights[1:] + weights[:-1]) / 2)])


@dataclass(frozen=True)
class Mixture:
    """Several distributions by their weights, which are > 0. One uniform draws: it chooses the part by the cumulated weights, and where it
    fell within that part's share is the part's own uniform.
    """

    parts: tuple[SigmaDraw, ...]
    weights: tuple[float, ...]

    def log_sigma(self, uniform: np.ndarray) -> np.ndarray:
        """As `SigmaDraw`."""
        cumulated = np.concatenate([[0.0], np.cumsum(self.weights) / np.sum(self.weights)])
        chosen = np.clip(np.searchsorted(cumulated, uniform, side="right") - 1, 0, len(self.parts) - 1)
        found = np.empty(uniform.shape)
        for index, part in enumerate(self.parts):
            mine = chosen == index
            left = (uniform[mine] - cumulated[index]) / (cumulated[index + 1] - cumulated[index])
            found[mine] = part.log_sigma(np.minimum(left, _LARGEST_UNIFORM))
        return found
