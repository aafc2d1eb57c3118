"""The plan's price against independent accountants, and its calibration."""

import dataclasses
import warnings
from collections.abc import Callable

import dp_accounting
import numpy as np
import pytest
from opacus.accountants import PRVAccountant
from scipy.stats import norm

from dpsyngen.config import DataConfig, HintsConfig, NetworkConfig, PrivacyConfig, PrivateConfig, RunConfig
from dpsyngen.errors import InputError
from dpsyngen.planning import plan_run
from dpsyngen.privacy import accounting
from dpsyngen.privacy.accounting import GaussianMechanism, Mechanism, SubsampledGaussianMechanism
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


@pytest.mark.parametrize(("epsilon", "delta", "batch_size", "steps"), [
    (1e-3, 1e-10, 4096, 4395), (1e-3, 1e-5, 256, 400), (0.2, 1e-10, 256, 400), (10.0, 1e-10, 4096, 4395),
    (100.0, 1e-10, 4096, 4395), (100.0, 1e-5, 256, 400), (100.0, 1e-5, 60000, 1), (0.2, 1e-8, 256, 100_000),
])  # fmt: skip
def test_the_whole_range_calibrates(epsilon: float, delta: float, batch_size: int, steps: int) -> None:
    plan = PrivacyPlan.calibrate(config(epsilon, batch_size, steps, hints="none", delta=delta), 60000)
    assert 0.995 * epsilon <= plan.epsilon_after(steps) <= epsilon


# (q, noise multiplier, steps, delta). Epsilon is 0.1 to 15. With small epsilon and many steps PRV's grid, whose points are proportional to
# sqrt(steps) / eps_error, would take gigabytes; so the small epsilons have few steps.
SETTINGS = [
    (1e-4, 0.5, 100, 1e-6), (0.001, 0.5, 10, 1e-6), (0.001, 0.5, 100, 1e-4), (0.001, 0.7, 100, 1e-5),
    (0.001, 0.5, 1000, 1e-6), (0.001, 0.5, 10000, 1e-4), (0.001, 0.7, 10000, 1e-5), (0.01, 0.5, 1, 1e-6), (0.01, 0.5, 10, 1e-4),
    (0.01, 1, 10, 1e-6), (0.01, 0.5, 100, 1e-6), (0.01, 0.7, 100, 1e-3), (0.01, 1, 100, 1e-4), (0.01, 2, 100, 1e-5),
    (0.01, 0.5, 1000, 1e-4), (0.01, 1, 1000, 1e-6), (0.01, 2, 1000, 1e-3), (0.01, 5, 1000, 1e-4), (0.01, 0.7, 10000, 1e-3),
    (0.01, 2, 10000, 1e-5), (0.01, 5, 10000, 1e-6), (0.068, 0.5, 1, 1e-4), (0.068, 1, 1, 1e-6), (0.068, 0.7, 10, 1e-3),
    (0.068, 2, 10, 1e-5), (0.068, 5, 10, 1e-6), (0.068, 1, 100, 1e-6), (0.068, 5, 100, 1e-4), (0.068, 20, 100, 1e-6),
    (0.068, 2, 1000, 1e-5), (0.068, 10, 1000, 1e-3), (0.068, 5, 10000, 1e-4), (0.068, 20, 10000, 1e-6), (0.3, 2, 1, 1e-5),
    (0.3, 5, 10, 1e-4), (0.3, 20, 10, 1e-6), (0.3, 5, 100, 1e-6), (0.3, 10, 1000, 1e-5), (0.3, 20, 10000, 1e-4),
    (1.0, 0.7, 1, 1e-5), (1.0, 5, 1, 1e-4), (1.0, 2, 10, 1e-5), (1.0, 10, 10, 1e-3), (1.0, 10, 100, 1e-5), (1.0, 20, 1000, 1e-4),
]  # fmt: skip


@pytest.mark.parametrize(("q", "noise", "steps", "delta"), SETTINGS)
def test_prv_accountant_agrees(q: float, noise: float, steps: int, delta: float) -> None:
    """Opacus' accountant (Gopi et al., arXiv 2106.02848), independent of dp-accounting, is within 1 %; Renyi DP is looser than both."""
    mechanisms = (SubsampledGaussianMechanism(noise, q, steps),)
    ours = accounting.epsilon_of(mechanisms, delta)
    assert 0.1 <= ours <= 15
    assert ours == pytest.approx(_prv_epsilon([(noise, q, steps)], delta, ours), rel=0.01)
    assert ours < accounting.renyi_epsilon_of(mechanisms, delta)


@pytest.mark.parametrize(("history", "delta"), [
    ([(5.0, 1.0, 1), (2.0, 0.068, 500)], 1e-5), ([(1.6, 1.0, 1), (0.6, 0.004, 400)], 1e-5),
    ([(12.0, 1.0, 2), (3.0, 0.01, 1000)], 1e-6), ([(3.0, 1.0, 1), (1.0, 0.01, 300), (0.7, 0.001, 100)], 1e-4),
])  # fmt: skip
def test_prv_accountant_agrees_on_different_mechanisms_together(history: list[tuple[float, float, int]], delta: float) -> None:
    mechanisms: list[Mechanism] = []
    for noise, q, steps in history:
        mechanisms += [GaussianMechanism(noise)] * steps if q == 1 else [SubsampledGaussianMechanism(noise, q, steps)]
    ours = accounting.epsilon_of(tuple(mechanisms), delta)
    assert ours == pytest.approx(_prv_epsilon(history, delta, ours), rel=0.01)
    assert ours < accounting.renyi_epsilon_of(tuple(mechanisms), delta)
    assert max(accounting.epsilon_of((mechanism,), delta) for mechanism in mechanisms) < ours


def _prv_epsilon(history: list[tuple[float, float, int]], delta: float, about: float) -> float:
    """PRV's upper bound, which includes its own errors: 0.3 % of epsilon here, and a thousandth of delta."""
    accountant = PRVAccountant()
    accountant.history = history
    with np.errstate(divide="ignore"), warnings.catch_warnings():  # log(1 - q) is -inf at q = 1, and meant so
        # it bounds its domain by Renyi DP of orders up to 63; where a larger one were better the domain is just wider than it need be
        warnings.filterwarnings("ignore", message="Optimal order is the largest alpha")
        return float(accountant.get_epsilon(delta, eps_error=0.003 * about, delta_error=delta / 1000))


@pytest.mark.parametrize(("q", "noise", "steps"), [(0.068, 2.4, 4395), (0.068, 7800, 4395), (0.004, 0.8, 280), (0.5, 80, 100_000)])
def test_a_finer_grid_changes_epsilon_by_a_thousandth_and_only_down(q: float, noise: float, steps: int) -> None:
    mechanisms = (SubsampledGaussianMechanism(noise, q, steps),)
    coarse = accounting.epsilon_of(mechanisms, 1e-5)
    assert 0.998 * coarse < accounting.epsilon_of(mechanisms, 1e-5, accounting.interval_of(mechanisms) / 3) < coarse


@pytest.mark.parametrize(("steps", "delta"), [(100_000, 1e-9), (10_000, 1e-10), (1_000_000, 1e-8)])
def test_rounding_errors_of_many_steps_are_paid_for(steps: int, delta: float) -> None:
    """At the smallest delta that is accepted the claim is still no less than the closed form."""
    assert delta == accounting.smallest_delta(steps)
    claimed = accounting.epsilon_of((SubsampledGaussianMechanism(steps**0.5, 1.0, steps),), delta)
    assert _gaussian_delta(claimed, mu=1.0) < delta
    assert claimed == pytest.approx(accounting.epsilon_of((GaussianMechanism(1.0),), delta), rel=0.01)


@dataclasses.dataclass(frozen=True)
class NoisyVote:
    """A mechanism that the package doesn't know: a count with Laplace noise."""

    scale: float
    name: str = "noisy vote"
    interval: float = 1e-3

    def event(self) -> dp_accounting.DpEvent:
        return dp_accounting.LaplaceDpEvent(self.scale)


def test_any_mechanism_composes() -> None:
    assert accounting.epsilon_of((NoisyVote(2.0),), 1e-12) == pytest.approx(0.5, rel=2e-3)
    both = (NoisyVote(2.0), SubsampledGaussianMechanism(1.0, 0.01, 100))
    assert accounting.epsilon_of(both[1:], 1e-5) < accounting.epsilon_of(both, 1e-5) < accounting.epsilon_of(both[1:], 1e-5) + 0.5


def test_nothing_costs_nothing() -> None:
    assert accounting.epsilon_of((), 1e-5) == 0
    assert accounting.epsilon_of((SubsampledGaussianMechanism(1.0, 0.1, 0),), 1e-5) == 0
    assert accounting.epsilon_of((SubsampledGaussianMechanism(0.0, 0.1, 1),), 1e-5) == float("inf")


@pytest.mark.parametrize(("bound", "jump"), [(lambda noise: 3 / noise, False), (lambda noise: 50.0 if noise < 2 else 0.5, True),
                                             (lambda noise: float("inf") if noise < 0.7 else 1 / noise**4, False)])  # fmt: skip
@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3])
def test_smallest_noise_never_exceeds_the_target(bound: Callable[[float], float], jump: bool, start: float) -> None:
    found = accounting.smallest_noise(bound, 1.0, start)
    assert bound(found) <= 1
    assert bound(found * (0.999999 if jump else 0.999)) > 1


@pytest.mark.parametrize("sigma", [0.5, 1.6, 20.0])
def test_gaussian_mechanism_is_the_closed_form(sigma: float) -> None:
    """Balle and Wang, arXiv 1805.06530, Theorem 8."""
    epsilon = accounting.epsilon_of((GaussianMechanism(sigma),), 1e-5)
    mu = 1 / sigma
    assert _gaussian_delta(epsilon, mu) == pytest.approx(1e-5, rel=1e-2)
    assert _gaussian_delta(epsilon, mu) <= 1e-5
    assert accounting.gaussian_mu(epsilon, 1e-5) == pytest.approx(mu, rel=1e-3)


def _gaussian_delta(epsilon: float, mu: float) -> float:
    return float(norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)))


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


def test_a_given_noise_is_priced_not_calibrated() -> None:
    plan = PrivacyPlan.with_noise(config(hints="none"), 60000, 1.5)
    assert plan.noise_multiplier == 1.5
    assert plan.epsilon_after(100) == accounting.epsilon_of((SubsampledGaussianMechanism(1.5, 256 / 60000, 100),), 1e-5)


@pytest.mark.parametrize(("changed", "complaint"), [
    (config(batch_size=1, steps=1, delta=1e-4), r"privacy\.delta: expected less than 1\.67e-05, the chance that an image is ever drawn"),
    (config(delta=1e-14), r"privacy\.delta: expected at least 1e-12, since below that rounding errors"),
])  # fmt: skip
def test_delta_that_asks_for_nothing_or_too_much_is_refused(changed: RunConfig, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        PrivacyPlan.calibrate(changed, 60000)


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
