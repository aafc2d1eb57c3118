"""What mechanisms cost: epsilon by dp-accounting's pessimistic privacy loss distributions (PLD).

The unit is one image; neighbouring datasets differ by adding or removing one. The claim is the larger epsilon of the two.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import dp_accounting
from dp_accounting import pld, rdp
from scipy.optimize import brentq
from scipy.stats import norm

# Calibration ends when epsilon is at most this part below its target; well inside the half percent that is promised.
TOLERANCE = 1e-3
# FFTs of composed loss distributions are wrong by less than this per composition (up to 7e-16 was seen); the claim pays for it out of delta.
ROUNDING = 1e-15
_DELTA_PER_COMPOSITION = 1e-14
# Grids of the privacy loss: connecting the dots over an interval h widens a loss of deviation s by about (h / s)^2 / 12 of s, which at
# h = s / 10 is a thousandth of epsilon or less. Time is proportional to a single step's points.
_INTERVALS_PER_DEVIATION = 10
_COARSEST, _FINEST, _MOST_POINTS = 1e-2, 1e-8, 1e5
RDP_ORDERS = (*rdp.rdp_privacy_accountant.DEFAULT_RDP_ORDERS, 2048, 4096, 8192, 16384)  # the large ones are for small epsilon


class Mechanism(Protocol):
    """One mechanism on private images, as the accountants see it. A frozen dataclass whose other fields are its parameters."""

    @property
    def name(self) -> str:
        """What it is for, for people."""

    @property
    def interval(self) -> float:
        """The coarsest discretisation of the privacy loss that prices it within about a thousandth."""

    def event(self) -> dp_accounting.DpEvent:
        """It as dp-accounting knows it."""


@dataclass(frozen=True)
class GaussianMechanism:
    """Noise N(0, (noise_multiplier * sensitivity)^2) on all the data, once or `steps` times."""

    noise_multiplier: float
    name: str = "Gaussian mechanism"
    steps: int = 1

    @property
    def interval(self) -> float:
        """As the protocol has it."""
        return _interval(self.noise_multiplier, 1.0)

    def event(self) -> dp_accounting.DpEvent:
        """As the protocol has it."""
        once = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        return once if self.steps == 1 else dp_accounting.SelfComposedDpEvent(once, self.steps)


@dataclass(frozen=True)
class SubsampledGaussianMechanism:
    """DP-SGD: `steps` Gaussian mechanisms, each on a Poisson sample with probability `sampling_rate` (Abadi et al., 2016)."""

    noise_multiplier: float
    sampling_rate: float
    steps: int
    name: str = "Poisson-subsampled Gaussian mechanism"

    @property
    def interval(self) -> float:
        """As the protocol has it; the same for any number of steps, so that a plan is priced on one grid from beginning to end."""
        return _interval(self.noise_multiplier, self.sampling_rate)

    def event(self) -> dp_accounting.DpEvent:
        """As the protocol has it."""
        if self.steps == 0:
            return dp_accounting.NoOpDpEvent()
        step = dp_accounting.PoissonSampledDpEvent(self.sampling_rate, dp_accounting.GaussianDpEvent(self.noise_multiplier))
        return dp_accounting.SelfComposedDpEvent(step, self.steps)


def epsilon_of(mechanisms: tuple[Mechanism, ...], delta: float, interval: float | None = None) -> float:
    """The claim: the pessimistic PLD bound on epsilon of all mechanisms together at `delta`, for adding and removing one unit.

    `interval` is the discretisation of the privacy loss (`interval_of` by default): the larger, the faster and the more pessimistic.
    0.0 for no mechanism, infinity where no epsilon holds or `delta` is not above the rounding errors (`smallest_delta`).
    """
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, interval or interval_of(mechanisms))
    compositions = 0
    for mechanism in mechanisms:
        event = mechanism.event()
        accountant.compose(event)
        compositions += event.count if isinstance(event, dp_accounting.SelfComposedDpEvent) else 1
    return float(accountant.get_epsilon(delta - ROUNDING * compositions))


def renyi_epsilon_of(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """The bound by Renyi DP (Mironov, arXiv 1702.07476), for comparison with older papers; looser than the claim, and never it."""
    with without_warnings_of_orders():
        accountant = rdp.RdpAccountant(RDP_ORDERS, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
        for mechanism in mechanisms:
            accountant.compose(mechanism.event())
        return float(accountant.get_epsilon(delta))


@contextmanager
def without_warnings_of_orders() -> Iterator[None]:
    """Inside, nobody is warned of each Renyi order that is left out since a series didn't converge; the others still bound epsilon."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def interval_of(mechanisms: tuple[Mechanism, ...]) -> float:
    """The discretisation of the privacy loss that `epsilon_of` takes: the finest that one of the mechanisms needs."""
    return min((mechanism.interval for mechanism in mechanisms), default=_COARSEST)


def smallest_delta(compositions: int) -> float:
    """The delta from which on the rounding errors that the claim pays for are at most a tenth of it."""
    return _DELTA_PER_COMPOSITION * compositions


def _interval(noise_multiplier: float, rate: float) -> float:
    if noise_multiplier <= 0:
        return _COARSEST
    # the deviation of one step's loss (a chi^2 divergence), and its largest value on noise that isn't further out than 10 deviations
    deviation = rate * math.sqrt(math.expm1(min(1 / noise_multiplier**2, 700)))
    reach = math.log1p(rate * math.expm1(min(10 / noise_multiplier + 0.5 / noise_multiplier**2, 700)))
    return max(min(deviation / _INTERVALS_PER_DEVIATION, _COARSEST), reach / _MOST_POINTS, _FINEST)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu of Gaussian DP that is exactly (epsilon, delta)-DP (Dong et al., arXiv 1905.02383, Corollary 2.13)."""

    def excess(log_mu: float) -> float:
        mu = math.exp(log_mu)
        return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon + norm.logcdf(-epsilon / mu - mu / 2))) - delta

    return math.exp(brentq(excess, math.log(1e-6), math.log(10 + 2 * math.sqrt(epsilon) + epsilon)))


def estimated_noise(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """About the noise multiplier that DP-SGD needs: the larger of what many steps need in the limit, and of what one step needs.

    The limit is Gaussian DP (Dong et al., arXiv 1905.02383, Corollary 5.4, without its small-noise terms); one step is a Gaussian mechanism
    amplified by sampling, exactly.
    """
    many = 1 / math.sqrt(math.log1p(gaussian_mu(epsilon, delta) ** 2 / (rate**2 * steps)))
    if delta >= rate:
        return many
    return max(many, 1 / gaussian_mu(math.log1p(math.expm1(epsilon) / rate), delta / rate))


def smallest_noise(epsilon: Callable[[float], float], target: float, start: float, tolerance: float = TOLERANCE) -> float:
    """The noise multiplier whose `epsilon`, a falling function of it, is at most `target` and within the relative `tolerance` of it.

    Epsilon falls nearly as a power of the noise, so secant steps in logarithms from `start` need few of the costly evaluations. Where
    epsilon jumps over the tolerance, the result is the upper end of the jump: never one above the target.
    """
    aim, low, high = target * (1 - tolerance / 2), 0.0, math.inf  # low: the largest noise seen to cost too much; high: the smallest seen to do
    noise, slope, previous = start, -1.5, None
    while high > low * (1 + 1e-9):
        spent = epsilon(noise)
        if (1 - tolerance) * target <= spent <= target:
            return noise
        low, high = (noise, high) if spent > target else (low, noise)
        point = (math.log(noise), math.log(min(max(spent, 1e-9), 1e9)))
        if previous is not None and point[1] != previous[1]:
            slope = min(-0.2, (point[1] - previous[1]) / (point[0] - previous[0]))
        previous = point
        guess = noise * math.exp(min(max((math.log(aim) - point[1]) / slope, -1.5), 1.5))
        noise = guess if low < guess < high else math.sqrt(low * high)
    return high
