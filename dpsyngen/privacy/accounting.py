"""What mechanisms cost: epsilon by dp-accounting's pessimistic privacy loss distributions.

The unit is one image; neighbouring datasets differ by adding or removing one. The claim is the larger epsilon of the two.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import dp_accounting
from dp_accounting import pld
from scipy.optimize import brentq
from scipy.stats import norm

# Relative width to which calibration narrows the noise multiplier; far inside the half percent of epsilon that is promised.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class GaussianMechanism:
    """Noise N(0, (noise_multiplier * sensitivity)^2), once, on all the data."""

    noise_multiplier: float

    def event(self) -> dp_accounting.DpEvent:
        """As dp-accounting sees it."""
        return dp_accounting.GaussianDpEvent(self.noise_multiplier)


@dataclass(frozen=True)
class SubsampledGaussianMechanism:
    """DP-SGD: `steps` Gaussian mechanisms, each on a Poisson sample with probability `sampling_rate` (Abadi et al., 2016)."""

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def event(self) -> dp_accounting.DpEvent:
        """As dp-accounting sees it."""
        step = dp_accounting.PoissonSampledDpEvent(self.sampling_rate, dp_accounting.GaussianDpEvent(self.noise_multiplier))
        return dp_accounting.SelfComposedDpEvent(step, self.steps)


Mechanism = GaussianMechanism | SubsampledGaussianMechanism


def epsilon_of(mechanisms: tuple[Mechanism, ...], delta: float, interval: float = 1e-4) -> float:
    """The pessimistic PLD bound on epsilon of all mechanisms together at `delta`, for adding and removing one unit.

    `interval` is the discretisation of the privacy loss: the larger, the faster and the more pessimistic. 0.0 for none.
    """
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
    for mechanism in mechanisms:
        if not isinstance(mechanism, SubsampledGaussianMechanism) or mechanism.steps > 0:
            accountant.compose(mechanism.event())
    return float(accountant.get_epsilon(delta))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu of Gaussian DP that is exactly (epsilon, delta)-DP (Dong et al., arXiv 1905.02383, Corollary 2.13)."""

    def excess(log_mu: float) -> float:
        mu = math.exp(log_mu)
        return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon + norm.logcdf(-epsilon / mu - mu / 2))) - delta

    return math.exp(brentq(excess, math.log(1e-6), math.log(10 + 2 * math.sqrt(epsilon) + epsilon)))


def smallest_noise(epsilon: Callable[[float], float], target: float, start: float) -> float:
    """The smallest noise multiplier, within TOLERANCE, whose `epsilon` is at most `target`; never one above the target.

    Epsilon falls nearly as a power of the noise, so secant steps in logarithms from `start` need few of the costly evaluations.
    """
    low, high = 0.0, math.inf  # largest noise seen to cost too much, smallest seen to be enough
    noise, previous = start, None
    for _ in range(60):
        spent = epsilon(noise)
        low, high = (low, min(high, noise)) if spent <= target else (max(low, noise), high)
        if high / max(low, 1e-12) <= 1 + TOLERANCE:
            break
        point = (math.log(noise), math.log(max(spent, 1e-12)))
        slope = -1.5 if previous is None or point[0] == previous[0] else (point[1] - previous[1]) / (point[0] - previous[0])
        previous = point
        guess = math.exp(point[0] + (math.log(target) - point[1]) / min(slope, -0.2)) * (1 + TOLERANCE / 3)
        if spent <= target and guess > noise * (1 - TOLERANCE):
            guess = noise * (1 - TOLERANCE)  # close: one step down proves it or ends it
        outside = guess <= low or guess >= high
        noise = guess if not outside else (math.sqrt(low * high) if low and high < math.inf else noise * (2 if low else 0.5))
    return high
