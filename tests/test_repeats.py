"""Repeat and select: the price against the theorems worked out by hand, and against the exact divergence of a mechanism that can be enumerated."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from scipy.stats import chisquare, norm

from dpsyngen.privacy.accounting import (
    RDP_ORDERS,
    GaussianMechanism,
    SubsampledGaussianMechanism,
    epsilon_of,
    renyi_epsilon_of,
    without_warnings_of_orders,
)
from dpsyngen.privacy.repeats import Repeats, repeated_epsilon

DELTA = 1e-5
LAST = 3000  # runs beyond which no probability of these distributions reaches 1e-9
ALL = [Repeats(10, 1), Repeats(10, 0), Repeats(4, 0.5), Repeats(6, 3), Repeats(5, math.inf)]
NAMES = ["geometric", "logarithmic", "negative_binomial", "negative_binomial", "poisson"]


def by_hand(curve: np.ndarray, orders: np.ndarray, repeats: Repeats) -> float:
    """Papernot and Steinke's Theorem 2 or 6 on a run's Renyi curve, then epsilon by Canonne et al. (arXiv 2004.00010, Proposition 12)."""
    far = orders > 1.01  # nearer to 1, Proposition 12 is numerically unstable
    if math.isinf(repeats.shape):
        at = np.log1p(1 / (orders - 1))[:, None]  # the epsilon at which delta of one run enters, by the same proposition or by Pinsker's kin
        deltas = np.exp(np.minimum((orders - 1) * (curve - at + np.log1p(-1 / orders)) - np.log(orders), 0))[:, far].min(axis=1)
        added = repeats.mean * np.minimum(deltas, np.sqrt(-np.expm1(-curve)).min())
    else:
        added = (1 + repeats.shape) * np.min((1 - 1 / orders) * curve + math.log(1 / repeats.gamma) / orders)
    total = curve + added + math.log(repeats.mean) / (orders - 1)
    return float(np.min((total + np.log1p(-1 / orders) - np.log(DELTA * orders) / (orders - 1))[far]))


@pytest.mark.parametrize("repeats", ALL, ids=lambda repeats: f"{repeats.distribution}-{repeats.shape}")
@pytest.mark.parametrize("noise", [2.0, 8.0])
def test_price_is_the_theorems_worked_out_by_hand(repeats: Repeats, noise: float) -> None:
    orders = np.array([1.0001, *RDP_ORDERS])
    expected = by_hand(orders / (2 * noise**2), orders, repeats)
    assert repeated_epsilon([(GaussianMechanism(noise),)], repeats, DELTA) == pytest.approx(expected, rel=1e-6)


def test_settings_that_differ_cost_the_largest_divergence_at_each_order() -> None:
    """Two curves that cross: neither alone is the price, nor is the larger of the two prices."""
    orders, repeats = np.array([1.0001, *RDP_ORDERS]), Repeats(8, 1)
    settings = [(SubsampledGaussianMechanism(0.8, 0.01, 50),), (GaussianMechanism(2.0), SubsampledGaussianMechanism(4.0, 0.1, 20))]
    curves = []
    with without_warnings_of_orders():
        for mechanisms in settings:
            accountant = rdp.RdpAccountant(orders)
            for mechanism in mechanisms:
                accountant.compose(mechanism.event())
            curves.append(accountant._rdp)
    assert np.any(curves[0] > curves[1]) and np.any(curves[0] < curves[1])
    together = repeated_epsilon(settings, repeats, DELTA)
    assert together == pytest.approx(by_hand(np.maximum(*curves), orders, repeats), rel=1e-6)
    alone = [repeated_epsilon([mechanisms], repeats, DELTA) for mechanisms in settings]
    assert together >= max(alone)
    assert repeated_epsilon([settings[0], settings[0]], repeats, DELTA) == alone[0]
    event = dp_accounting.dp_event.RepeatAndSelectDpEvent(dp_accounting.ComposedDpEvent([m.event() for m in settings[1]]), 8, 1)
    assert alone[1] == pytest.approx(rdp.RdpAccountant(orders).compose(event).get_epsilon(DELTA), rel=1e-12)


@pytest.mark.parametrize("shape", [0, 0.5, 1, 3])
def test_one_run_costs_what_it_costs_and_more_runs_cost_more(shape: float) -> None:
    settings = [(GaussianMechanism(6.0),)]
    prices = [repeated_epsilon(settings, Repeats(mean, shape), DELTA) for mean in (1, 2, 8, 64)]
    assert prices[0] == pytest.approx(renyi_epsilon_of(settings[0], DELTA), rel=2e-3)
    assert prices[0] >= epsilon_of(settings[0], DELTA)
    assert prices == sorted(prices) and prices[1] > 1.05 * prices[0]
    assert repeated_epsilon([(GaussianMechanism(12.0),)], Repeats(8, shape), DELTA) < prices[2]


def best_of(weights: np.ndarray, repeats: Repeats) -> np.ndarray:
    """The exact distribution of the highest of K draws from `weights` (in rising order of score), no draw first: by enumerating K."""
    below = np.concatenate([[0.0], np.cumsum(weights)])
    best = np.zeros(len(weights) + 1)
    for runs, probability in itertools.takewhile(lambda item: item[0] < LAST, repeats.probabilities()):
        best[0] += probability * (runs == 0)
        best[1:] += probability * np.diff(below**runs if runs else np.zeros_like(below))
    return best


@pytest.mark.parametrize("repeats", ALL, ids=lambda repeats: f"{repeats.distribution}-{repeats.shape}")
def test_price_bounds_what_selection_gives_away_exactly(repeats: Repeats) -> None:
    """Gaussians on a fine grid, the highest wins: every delta at the claimed epsilon is covered, and that of a single run's epsilon is not."""
    noise, delta, edges = 3.0, 1e-3, np.linspace(-30, 30, 1201)
    with_image, without = (np.diff(norm.cdf(edges, loc=mean, scale=noise)) for mean in (1.0, 0.0))
    p, q = (best_of(weights / weights.sum(), repeats) for weights in (with_image, without))
    assert p.sum() == pytest.approx(1, abs=1e-9)

    def spent(epsilon: float) -> float:
        return max(np.maximum(a - math.exp(epsilon) * b, 0).sum() for a, b in ((p, q), (q, p)))

    claimed = repeated_epsilon([(GaussianMechanism(noise),)], repeats, delta)
    assert spent(claimed) <= delta
    assert spent(epsilon_of((GaussianMechanism(noise),), delta)) > delta, "a selection that costs no more than a run would test nothing"
    for order in (1.5, 2, 4, 8):
        seen = (p > 1e-30) & (q > 1e-30)
        divergence = max(math.log(np.sum(a**order * b ** (1 - order))) / (order - 1) for a, b in ((p[seen], q[seen]), (q[seen], p[seen])))
        accountant = rdp.RdpAccountant([1.0001, *RDP_ORDERS])
        accountant.compose(dp_accounting.dp_event.RepeatAndSelectDpEvent(dp_accounting.GaussianDpEvent(noise), repeats.mean, repeats.shape))
        assert divergence <= accountant._rdp[np.searchsorted(accountant._orders, order)] * (1 + 1e-9)


@pytest.mark.parametrize(("repeats", "name"), list(zip(ALL, NAMES, strict=True)))
def test_number_of_runs_follows_the_distribution_that_is_paid_for(repeats: Repeats, name: str) -> None:
    assert repeats.distribution == name
    known = dict(itertools.takewhile(lambda item: item[0] < LAST, repeats.probabilities()))
    assert sum(known.values()) == pytest.approx(1, abs=1e-9)
    mean = sum(runs * probability for runs, probability in known.items())
    assert repeats.mean * (1 - 1e-7) <= mean <= repeats.mean * (1 + 1e-12), "fewer runs than paid for, never more"
    assert (0 in known) == (name == "poisson")
    if name not in ("poisson", "logarithmic"):  # Definition 1
        eta, gamma = repeats.shape, repeats.gamma
        for runs in (1, 2, 7):
            product = math.prod((step + eta) / (step + 1) for step in range(runs))
            assert known[runs] == pytest.approx((1 - gamma) ** runs / (gamma**-eta - 1) * product, rel=1e-9)
    drawn = np.bincount([repeats.draw() for _ in range(2000)], minlength=LAST)
    common = [runs for runs in known if 2000 * known[runs] >= 20]
    expected = np.array([2000 * known[runs] for runs in common])
    observed = drawn[common]
    rest = 2000 - expected.sum(), 2000 - observed.sum()
    assert chisquare([*observed, rest[1]], [*expected, rest[0]]).pvalue > 1e-6


def test_one_run_on_average_is_one_run() -> None:
    assert {Repeats(1, shape).draw() for shape in (0, 0.5, 1) for _ in range(50)} == {1}
