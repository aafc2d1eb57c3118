"""The bounds of the audit against closed forms and brute force, and a short audit of the private step; `make test-audit` is the long one."""

import dataclasses
import math

import auditing
import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm

from dpsyngen.audit.bounds import certified_epsilon, clopper_pearson
from dpsyngen.errors import InputError
from dpsyngen.privacy.plan import PrivacyPlan


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.9999])
@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 40), (1, 40), (17, 40), (40, 40), (3, 20000)])
def test_clopper_pearson_is_scipys_exact_interval(successes: int, trials: int, confidence: float) -> None:
    expected = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    assert clopper_pearson(successes, trials, confidence) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-12)


def test_clopper_pearson_of_none_and_all_is_the_closed_form() -> None:
    assert clopper_pearson(0, 50, 0.9) == pytest.approx((0, 1 - 0.05 ** (1 / 50)))
    assert clopper_pearson(50, 50, 0.9) == pytest.approx((0.05 ** (1 / 50), 1))


def test_certified_epsilon_is_the_closed_form() -> None:
    """All of one and none of the other: ln((t - delta) / (1 - t)) with t = (tail)^(1 / n)."""
    t = 0.005 ** (1 / 200)
    assert certified_epsilon((200, 200), (0, 200), 0.1, 0.99) == pytest.approx(math.log((t - 0.1) / (1 - t)))
    assert certified_epsilon((5, 10), (5, 10), 0.0, 0.99) == 0
    assert certified_epsilon((0, 10), (10, 10), 0.5, 0.99) == 0


def test_certified_epsilon_is_consistent() -> None:
    """A mechanism that reveals with probability delta and is randomised response otherwise: its epsilon, in the limit of many trials."""
    n, delta, epsilon = 10**9, 0.05, 1.3
    truth = delta + (1 - delta) / (1 + math.exp(-epsilon))
    found = certified_epsilon((round(n * truth), n), (round(n * (1 - truth)), n), delta, 0.999)
    assert epsilon - 1e-3 < found < epsilon


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (1.0, 0.1), (1.5, 0.02)])
def test_certified_epsilon_errs_no_more_often_than_allowed(epsilon: float, delta: float) -> None:
    """Every outcome of 30 and 40 trials, weighed by its probability under a mechanism that spends (epsilon, delta) to the full."""
    unlikely = (1 - delta) / (1 + math.exp(epsilon))
    likely = 1 - unlikely
    assert likely == pytest.approx(math.exp(epsilon) * unlikely + delta)
    wrong = sum(
        binom.pmf(i, 30, likely) * binom.pmf(j, 40, unlikely)
        for i in range(31)
        for j in range(41)
        if certified_epsilon((i, 30), (j, 40), delta, 0.8) > epsilon
    )
    assert 0 < wrong <= 0.2


@pytest.mark.parametrize(
    ("counts", "delta", "confidence", "named"),
    [((11, 10), 0, 0.9, "successes"), ((-1, 10), 0, 0.9, "successes"), ((0, 0), 0, 0.9, "successes"),
     ((1, 10), 0, 1.0, "confidence"), ((1, 10), 1.0, 0.9, "delta"), ((1, 10), -0.1, 0.9, "delta")],
)  # fmt: skip
def test_impossible_counts_are_refused(counts: tuple[int, int], delta: float, confidence: float, named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}: expected"):
        certified_epsilon(counts, (1, 10), delta, confidence)


@pytest.mark.parametrize(("rate", "steps", "secure"), auditing.AUDITED)
def test_canary_is_the_worst_case(rate: float, steps: int, secure: bool) -> None:
    """Nearly without noise a step gives out C along the canary's gradient if it was drawn, else nothing."""
    config = auditing.config_of(rate, steps, secure)
    plan = PrivacyPlan.calibrate(config, round(1 / rate))
    silent = dataclasses.replace(plan, noise_multiplier=1e-4)
    found = auditing.projections(config, silent, True, 20)
    assert found.shape == (20, steps)
    assert set(np.round(found, 2).ravel()) == ({1.0} if rate == 1 else {0.0, 1.0})
    assert np.abs(auditing.projections(config, silent, False, 20)).max() < 1e-3


@pytest.mark.parametrize(("rate", "steps", "secure"), auditing.AUDITED)
def test_likelihood_ratio_is_that_of_the_mixture(rate: float, steps: int, secure: bool) -> None:
    plan = PrivacyPlan.calibrate(auditing.config_of(rate, steps, secure), round(1 / rate))
    points, deviation = np.random.default_rng(0).normal(size=(50, steps)), plan.noise_multiplier
    with_canary = rate * norm.pdf(points, 1, deviation) + (1 - rate) * norm.pdf(points, 0, deviation)
    expected = np.log(with_canary / norm.pdf(points, 0, deviation)).sum(axis=1)
    np.testing.assert_allclose(auditing.log_likelihood_ratio(points, plan), expected, rtol=1e-9)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_private_step_shows_no_more_than_is_claimed(rate: float) -> None:
    found = auditing.audit(rate, 1, False, 2000)
    assert found.certified <= found.claimed <= auditing.EPSILON


def test_audit_exposes_a_third_of_the_noise() -> None:
    found = auditing.audit(1.0, 1, False, 1200, noise=0.35)
    assert found.certified > found.claimed
