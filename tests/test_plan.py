"""The plan's price against independent accountants, and its calibration."""

import dataclasses

import numpy as np
import pytest
from opacus.accountants import PRVAccountant
from scipy.stats import norm

from dpsyngen.config import DataConfig, HintsConfig, NetworkConfig, PrivacyConfig, PrivateConfig, RunConfig
from dpsyngen.errors import InputError
from dpsyngen.planning import plan_run
from dpsyngen.privacy import accounting
from dpsyngen.privacy.accounting import GaussianMechanism, SubsampledGaussianMechanism
from dpsyngen.privacy.plan import PrivacyPlan


def config(
    epsilon: float = 10.0, batch_size: int = 256, steps: int = 100, hints: str = "class_means", size: int | None = 60000, **privacy: float
) -> RunConfig:
    return RunConfig(
        data=DataConfig(expected_size=size),
        network=NetworkConfig(width=8),
        hints=HintsConfig(kind=hints),  # type: ignore[arg-type]
        private=PrivateConfig(batch_size=batch_size, noise_multiplicity=1, steps=steps, epochs=None),
        privacy=PrivacyConfig(epsilon=epsilon, **privacy),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 10.0])
@pytest.mark.parametrize(("batch_size", "steps"), [(256, 400), (4096, 4395), (60000, 5)])
def test_calibration_comes_within_half_a_percent_and_never_above(epsilon: float, batch_size: int, steps: int) -> None:
    plan = PrivacyPlan.calibrate(config(epsilon, batch_size, steps), 60000)
    assert 0.995 * epsilon <= plan.epsilon_after(steps) <= epsilon
    assert plan.epsilon_after(steps // 2) < plan.epsilon_after(steps)


@pytest.mark.parametrize(
    ("q", "steps", "noise", "delta"), [(0.004, 400, 0.6, 1e-5), (0.068, 1000, 2.0, 1e-5), (0.02, 100, 1.0, 1e-6), (0.5, 20, 6.0, 1e-4)]
)
def test_prv_accountant_agrees(q: float, steps: int, noise: float, delta: float) -> None:
    """Gopi et al.'s PRV accountant in Opacus, run with a small error, brackets the pessimistic PLD bound within 1 %."""
    ours = accounting.epsilon_of((SubsampledGaussianMechanism(noise, q, steps),), delta)
    theirs = _prv_epsilon(q, steps, noise, delta)
    assert ours == pytest.approx(theirs, rel=0.01)


def _prv_epsilon(q: float, steps: int, noise: float, delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = [(noise, q, steps)]
    return float(accountant.get_epsilon(delta, eps_error=0.001, delta_error=delta / 1000))


@pytest.mark.parametrize("sigma", [0.5, 1.6, 20.0])
def test_gaussian_mechanism_is_the_closed_form(sigma: float) -> None:
    """Balle and Wang, arXiv 1805.06530, Theorem 8."""
    epsilon = accounting.epsilon_of((GaussianMechanism(sigma),), 1e-5)
    mu = 1 / sigma
    delta = norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
    assert delta == pytest.approx(1e-5, rel=2e-3)
    assert accounting.gaussian_mu(epsilon, 1e-5) == pytest.approx(mu, rel=1e-3)


def test_full_batches_are_the_gaussian_mechanism_composed() -> None:
    composed = accounting.epsilon_of((SubsampledGaussianMechanism(8.0, 1.0, 16),), 1e-5)
    assert composed == pytest.approx(accounting.epsilon_of((GaussianMechanism(2.0),), 1e-5), rel=1e-3)


def test_class_means_are_in_the_price() -> None:
    """Their share of mu^2 is what the config says, and without them the same noise costs less."""
    plan = PrivacyPlan.calibrate(config(), 60000)
    assert plan.class_means is not None
    mu = accounting.gaussian_mu(10.0, 1e-5)
    assert plan.class_means.noise_multiplier == pytest.approx(1 / (mu * 0.1**0.5))
    without = dataclasses.replace(plan, class_means=None)
    assert without.epsilon_after(100) < plan.epsilon_after(100)
    assert [type(m) for m in plan.mechanisms(100)] == [GaussianMechanism, SubsampledGaussianMechanism]
    assert PrivacyPlan.calibrate(config(hints="none"), 60000).noise_multiplier < plan.noise_multiplier


def test_a_second_release_of_the_means_leaves_fewer_steps() -> None:
    plan = PrivacyPlan.calibrate(config(steps=20), 60000)
    left = plan.affordable_steps(means_releases=2)
    assert 0 < left < 20
    assert plan.epsilon_after(left, 2) <= 10 < plan.epsilon_after(left + 1, 2)
    assert plan.affordable_steps(means_releases=1) == 20


def test_plan_is_frozen() -> None:
    plan = PrivacyPlan.calibrate(config(), 60000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.noise_multiplier = 0.0  # type: ignore[misc]


def test_batch_larger_than_the_counted_dataset_is_refused() -> None:
    with pytest.raises(InputError, match=r"private\.batch_size: expected at most the 100 images"):
        PrivacyPlan.calibrate(config(size=None), 100)


@pytest.mark.parametrize(
    ("changed", "warning"),
    [
        (config(delta=1e-3), "not below 1/N"),
        (config(epsilon=0.1, size=500, batch_size=100), "too small for epsilon"),
        (config(steps=0), "no gradient step sees a private image"),
    ],
)
def test_dry_run_warns(changed: RunConfig, warning: str) -> None:
    assert any(warning in found for found in plan_run(changed).warnings)


def test_dry_run_shows_the_price_and_needs_the_declared_size() -> None:
    plan = plan_run(config())
    assert plan.warnings == ()
    assert plan.epsilon is not None
    assert 9.95 <= plan.epsilon <= 10
    assert plan.private_steps == 100
    assert plan.parameters > 10_000
    assert plan.memory > 60000 * 784
    assert plan.seconds > 0
    with pytest.raises(InputError, match=r"data\.expected_size"):
        plan_run(config(size=None))
