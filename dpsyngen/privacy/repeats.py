"""Repeat and select: what it costs to release only the best of a random number of runs (Papernot and Steinke, arXiv 2110.03620).

The theorems hold for a run that draws its setting, trains and is scored, all of it under Renyi DP, repeated K times with fresh randomness,
where K is drawn from a known distribution, never from the data, and is never shown; only the run with the highest score leaves.
"""

import math
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import dp_accounting
import numpy as np
from dp_accounting import rdp
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from scipy.optimize import brentq

from dpsyngen.privacy.accounting import RDP_ORDERS, Mechanism, without_warnings_of_orders

Distribution = Literal["geometric", "logarithmic", "negative_binomial", "poisson"]

# The theorem takes any two orders; one near 1 matters where hardly more than one run is expected.
_ORDERS = (1.0001, *RDP_ORDERS)
_MOST_RUNS = 2**20


@dataclass(frozen=True)
class Repeats:
    """The distribution of the number of runs K.

    `shape` is eta of the truncated negative binomial distribution (Papernot and Steinke, Definition 1): 1 is the geometric distribution, which
    stops after every run with probability 1 / mean, 0 the logarithmic one; infinity stands for Poisson, which alone may give no run at all.
    """

    mean: float
    """The mean number of runs, in [1, 500]."""
    shape: float

    @property
    def distribution(self) -> Distribution:
        """Its name."""
        named: dict[float, Distribution] = {1.0: "geometric", 0.0: "logarithmic", math.inf: "poisson"}
        return named.get(self.shape, "negative_binomial")

    @property
    def gamma(self) -> float:
        """The parameter gamma in (0, 1] of the truncated negative binomial distribution that has this mean."""
        if self.shape == 1:
            return 1 / self.mean
        if self.mean < 1 + 1e-6:
            return 1.0  # one run

        def excess(x: float) -> float:  # x = log(1 / gamma); the mean grows with it (Definition 1)
            spread = x if self.shape == 0 else -math.expm1(-self.shape * x) / self.shape
            return math.expm1(x) / spread - self.mean

        # rounded towards fewer runs, which cost less than the accountant is told
        return math.exp(-brentq(excess, 1e-9, 100.0, xtol=1e-13) * (1 - 1e-9))

    def probabilities(self) -> Iterator[tuple[int, float]]:
        """The numbers of runs in rising order with their probabilities, without end."""
        if math.isinf(self.shape):
            yield from ((k, math.exp(k * math.log(self.mean) - self.mean - math.lgamma(k + 1))) for k in range(_MOST_RUNS))
            return
        gamma, eta = self.gamma, self.shape
        if gamma == 1:
            yield 1, 1.0
            return
        probability = (1 - gamma) / -math.log(gamma) if eta == 0 else eta * (1 - gamma) / math.expm1(-eta * math.log(gamma))
        for k in range(1, _MOST_RUNS):
            yield k, probability
            probability *= (1 - gamma) * (k + eta) / (k + 1)

    def draw(self) -> int:
        """A number of runs, from the operating system's randomness."""
        uniform = secrets.randbits(53) * 2.0**-53
        last = 0
        for k, probability in self.probabilities():
            if probability == 0 and k > self.mean:
                break  # the probabilities' sum was rounded to less than `uniform`
            last, uniform = k, uniform - probability
            if uniform < 0:
                break
        return last


@dataclass(frozen=True)
class _OneOfDpEvent(dp_accounting.DpEvent):
    """One of `events`, drawn by chance that no data has a part in, and told: a divergence of the whole is at most the largest of theirs."""

    events: tuple[dp_accounting.DpEvent, ...]


class _Accountant(rdp.RdpAccountant):
    """dp-accounting's, which also takes `_OneOfDpEvent`: at each order the largest of the events' Renyi divergences."""

    _rdp: np.ndarray

    def _maybe_compose(self, event: dp_accounting.DpEvent, count: int, do_compose: bool) -> object:
        if not isinstance(event, _OneOfDpEvent):
            return super()._maybe_compose(event, count, do_compose)
        if do_compose:
            alone = [rdp.RdpAccountant(self._orders, self._neighboring_relation).compose(one) for one in event.events]
            self._rdp = self._rdp + count * np.max([accountant._rdp for accountant in alone], axis=0)
        return None


def repeated_epsilon(settings: Collection[tuple[Mechanism, ...]], repeats: Repeats, delta: float) -> float:
    """Epsilon at `delta` of releasing the best of a random number of runs, each of a setting drawn anew, with replacement, from `settings`.

    `settings` has the mechanisms of a run of each setting, its score's included; settings with the same mechanisms may share an entry.
    By dp-accounting's RepeatAndSelectDpEvent (Theorems 2 and 6), for adding or removing one image. The setting is told with the
    run, and drawn without looking at data, so at each order a run's Renyi divergence is at most the largest of its settings'.
    """
    events = tuple(dp_accounting.ComposedDpEvent([mechanism.event() for mechanism in mechanisms]) for mechanisms in settings)
    with without_warnings_of_orders():
        accountant = _Accountant(_ORDERS, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
        accountant.compose(RepeatAndSelectDpEvent(_OneOfDpEvent(events), repeats.mean, repeats.shape))
        return float(accountant.get_epsilon(delta))
