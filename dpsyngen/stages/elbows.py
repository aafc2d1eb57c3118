"""Where a curve of excess error leaves its flat ends: the thresholds tau1 and tau2."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RULE = ("tau1: the first ln sigma at which ln(error of the family / error of the reference-trained denoiser) exceeds ln(1 + tolerance), "
        "coming from the smallest sigma; tau2: the same, coming from the largest. Linear between grid points, rounded outwards to 0.01; the "
        "family with the largest tau1 and the one with the smallest tau2. null where the outermost sigma is beyond tolerance already")  # fmt: skip


@dataclass(frozen=True)
class Elbows:
    """Where one denoiser is as good as the reference-trained one: ln sigma <= tau1 and ln sigma >= tau2; None where it isn't at the very end.

    knee1 and knee2 are what Kneedle finds on the two sides of the curve's highest point, for comparison.
    """

    tau1: float | None
    tau2: float | None
    knee1: float | None
    knee2: float | None

    @classmethod
    def of(cls, log_sigma: np.ndarray, excess: np.ndarray, tolerance: float) -> "Elbows":
        """The elbows of an excess [m] = ln(error / error of the reference-trained) over rising ln sigma [m]; tolerance 0.1 is 10 % more error."""
        limit = math.log1p(tolerance)
        right = last_within(-log_sigma[::-1], excess[::-1], limit)
        knee = kneedle(-log_sigma[::-1], excess[::-1])
        return cls(last_within(log_sigma, excess, limit), None if right is None else -right,
                   kneedle(log_sigma, excess), None if knee is None else -knee)  # fmt: skip


def last_within(x: np.ndarray, y: np.ndarray, limit: float) -> float | None:
    """Where y [m] over rising x [m] first exceeds `limit`, linearly between points; the last x if never, None if at once."""
    beyond = np.flatnonzero(y > limit)
    if not len(beyond):
        return float(x[-1])
    first = int(beyond[0])
    if first == 0:
        return None
    share = (limit - y[first - 1]) / (y[first] - y[first - 1])
    return float(x[first - 1] + share * (x[first] - x[first - 1]))


def kneedle(x: np.ndarray, y: np.ndarray) -> float | None:
    """The knee of y [m] on its way from the first x up to its highest point (Satopaa et al., "Finding a Kneedle in a Haystack", ICDCSW 2011).

    y is normalised to the unit square; a flat beginning that turns upwards lies below the diagonal, farthest at the knee. Their smoothing is
    left out: y is a mean over many images already. None where the curve doesn't rise so: fewer than three points, none below the diagonal, or
    one that it doesn't come back from (their threshold, with S = 1).
    """
    top = int(np.argmax(y)) + 1
    if top < 3 or np.ptp(y[:top]) == 0:
        return None
    across = (x[:top] - x[0]) / (x[top - 1] - x[0])
    below = across - (y[:top] - y[:top].min()) / np.ptp(y[:top])
    knee = int(np.argmax(below))
    comes_back = (below[knee:] < below[knee] - 1 / (top - 1)).any()
    return float(x[knee]) if below[knee] > 0 and comes_back else None


@dataclass(frozen=True)
class Proposal:
    """The thresholds, rounded outwards (the careful way) to 0.01, and the family that each is due to; None where no family is within tolerance."""

    tau1: float | None
    cleaning_family: str | None
    tau2: float | None
    coarse_family: str | None

    @classmethod
    def of(cls, elbows: Mapping[str, Elbows]) -> "Proposal":
        """The farthest tau1 and tau2 of the families' elbows; the first family where they are equal."""
        first = {name: found.tau1 for name, found in elbows.items() if found.tau1 is not None}
        second = {name: found.tau2 for name, found in elbows.items() if found.tau2 is not None}
        cleaning, coarse = max(first, key=first.__getitem__, default=None), min(second, key=second.__getitem__, default=None)
        return cls(
            None if cleaning is None else math.floor(100 * first[cleaning]) / 100, cleaning,
            None if coarse is None else math.ceil(100 * second[coarse]) / 100, coarse,
        )  # fmt: skip

    @property
    def covers_everything(self) -> bool:
        """Whether the two ends meet, so that nothing is left for private images to teach."""
        return self.tau1 is not None and self.tau2 is not None and self.tau1 >= self.tau2
