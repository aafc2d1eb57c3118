"""Stages and draws of sigma, against scipy's truncated normal."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import kstest, truncnorm

from dpsyngen.cli import read_config
from dpsyngen.config import RunConfig, StagesConfig
from dpsyngen.errors import InputError
from dpsyngen.noise_levels import karras_grid, mixture, stages, turns
from dpsyngen.sigma_draws import Mixture, PiecewiseLinear, SigmaDraw, TruncatedNormal, Uniform, sigma_of

EVERYWHERE = TruncatedNormal(-math.inf, math.inf, -1.2, 1.2)
RANGES = [(-math.inf, math.inf), (-math.inf, -3.0), (-3.0, 2.0), (2.0, math.inf), (6.0, math.inf), (-12.0, -11.0)]


@pytest.mark.parametrize(("lower", "upper"), RANGES)
def test_sigma_follows_the_truncated_lognormal(lower: float, upper: float) -> None:
    uniform = np.random.default_rng(0).random(20_000)
    log_sigma = np.log(sigma_of(TruncatedNormal(lower, upper, -1.2, 1.2), uniform).double().numpy())
    assert log_sigma.min() >= lower - 1e-5
    assert log_sigma.max() <= upper + 1e-5
    reference = truncnorm((lower + 1.2) / 1.2, (upper + 1.2) / 1.2, loc=-1.2, scale=1.2)
    assert kstest(log_sigma, reference.cdf).pvalue > 1e-3


@pytest.mark.parametrize(("lower", "upper"), RANGES)
def test_the_truncated_normal_is_drawn_by_its_inverse_cdf(lower: float, upper: float) -> None:
    uniform = np.linspace(0.001, 0.999, 999)
    expected = truncnorm((lower + 1.2) / 1.2, (upper + 1.2) / 1.2, loc=-1.2, scale=1.2).ppf(uniform)
    np.testing.assert_allclose(TruncatedNormal(lower, upper, -1.2, 1.2).log_sigma(uniform), expected, atol=1e-6)


def test_a_stage_whose_probability_no_float_holds_is_drawn_all_the_same() -> None:
    drawn = TruncatedNormal(100.0, 101.0, -1.2, 1.2).log_sigma(np.random.default_rng(0).random(10_000))  # its probability is about exp(-3500)
    assert 100 <= drawn.min() and drawn.max() < 101
    assert kstest((drawn - 100) * (101.2 / 1.2**2), "expon").pvalue > 1e-3  # the tail of a normal is exponential


KNOTS = ((-4.0, 0.5), (-3.0, 0.0), (-2.0, 0.0), (0.0, 2.0), (1.0, 2.0), (3.0, 0.3))
DRAWS: dict[str, tuple[SigmaDraw, tuple[float, float]]] = {
    "uniform": (Uniform(-3.0, 1.5), (-3.0, 1.5)),
    "weights": (PiecewiseLinear(KNOTS, -math.inf, math.inf), (-4.0, 3.0)),
    "weights, restricted": (PiecewiseLinear(KNOTS, -3.5, 0.7), (-3.5, 0.7)),
    "weights within one piece": (PiecewiseLinear(KNOTS, -1.5, -0.5), (-1.5, -0.5)),
    "weights that begin at zero": (PiecewiseLinear(KNOTS, -2.5, 5.0), (-2.0, 3.0)),
}


def _density(name: str, x: float) -> float:
    lower, upper = DRAWS[name][1]
    inside = lower <= x <= upper
    return float(inside) if name == "uniform" else float(inside) * float(np.interp(x, *zip(*KNOTS, strict=True)))


@pytest.mark.parametrize("name", DRAWS)
def test_draws_follow_their_density(name: str) -> None:
    distribution, (lower, upper) = DRAWS[name]
    drawn = distribution.log_sigma(np.random.default_rng(0).random(20_000))
    assert lower <= drawn.min() and drawn.max() <= upper
    breaks = sorted({lower, upper, *(place for place, _ in KNOTS if lower < place < upper)})
    pieces = [quad(lambda x: _density(name, x), low, high)[0] for low, high in pairwise(breaks)]
    expected = np.diff(np.histogram(drawn, breaks)[0].cumsum(), prepend=0) / len(drawn)
    np.testing.assert_allclose(expected, np.array(pieces) / sum(pieces), atol=0.02)
    cdf = np.vectorize(lambda x: quad(lambda y: _density(name, y), lower, x, points=[b for b in breaks if b < x], limit=100)[0] / sum(pieces))
    assert kstest(drawn[:500], cdf).pvalue > 1e-3
    assert (np.diff(distribution.log_sigma(np.linspace(0, 1 - 2**-53, 5000))) >= 0).all()
    assert np.isfinite(distribution.log_sigma(np.array([0.0, 1 - 2**-53]))).all()


def test_a_mixture_takes_one_uniform_for_part_and_place() -> None:
    parts = (Uniform(-5.0, -4.0), EVERYWHERE, Uniform(3.0, 4.0))
    mixed = Mixture(parts, (1.0, 2.0, 5.0))
    uniform = np.random.default_rng(0).random(40_000)
    drawn = mixed.log_sigma(uniform)
    assert kstest(drawn[uniform < 1 / 8] + 5, "uniform").pvalue > 1e-3
    assert kstest(drawn[(uniform >= 1 / 8) & (uniform < 3 / 8)], truncnorm(-np.inf, np.inf, loc=-1.2, scale=1.2).cdf).pvalue > 1e-3
    assert kstest(drawn[uniform >= 3 / 8] - 3, "uniform").pvalue > 1e-3
    assert mixed.log_sigma(np.array([0.25])) == pytest.approx(-1.2)  # the middle of the second part's share
    assert np.isfinite(mixed.log_sigma(np.nextafter([1 / 8, 3 / 8, 1.0], 0))).all()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 2.0, 5.0), (0.01, 0.99), (3.0, 1.0, 1.0, 1.0), (0.1,) * 10, (7.0,)])
def test_turns_are_divided_by_the_weights_everywhere(weights: tuple[float, ...]) -> None:
    order, share = turns(weights, np.arange(5000)), np.array(weights) / sum(weights)
    had = (order[:, None] == np.arange(len(weights))).cumsum(axis=0)
    assert np.abs(had - share * np.arange(1, 5001)[:, None]).max() < len(weights)
    assert (turns(weights, np.arange(1234, 2345)) == order[1234:2345]).all()
    if weights == (1.0, 1.0):
        assert order[:4].tolist() == [0, 1, 0, 1]


def _custom(*entries: str, **fields: str) -> RunConfig:
    flags = [f"--{name.replace('__', '.')}={value}" for name, value in fields.items()]
    return read_config([], ["--stages.variant=custom", f"--stages.custom=[{', '.join(f'{{{entry}}}' for entry in entries)}]", *flags])


def test_stages_draw_by_their_own_settings_or_their_phases() -> None:
    config = _custom(
        "name: a, source: synthetic, upper: -2", "name: b, source: synthetic, lower: 1, sigma_draw: uniform, family: salt_and_pepper, weight: 3",
        "name: c, source: private, p_mean: 0.5", "name: d, source: private, sigma_draw: weights", "name: e, source: private, lower: 0, upper: 1",
        synthetic__p_std="2", private__sigma_draw="lognormal", private__sigma_weights="[[0, 0], [1, 1]]", sampling__sigma_max="10",
    )
    a, b, c, d, e = stages(config)
    assert a.sigma_draw == TruncatedNormal(-math.inf, -2, -1.2, 2)
    assert b.sigma_draw == Uniform(1, math.log(10))
    assert c.sigma_draw == TruncatedNormal(-math.inf, math.inf, 0.5, 1.2)
    assert d.sigma_draw == PiecewiseLinear(((0, 0), (1, 1)), -math.inf, math.inf)
    assert [(stage.family, stage.weight) for stage in (a, b, e)] == [("dead_leaves", 1), ("salt_and_pepper", 3), ("", 1)]
    assert mixture((a,)) == a.sigma_draw
    assert mixture((a, b)) == Mixture((a.sigma_draw, b.sigma_draw), (1, 3))


@pytest.mark.parametrize(
    ("entry", "fields", "said"),
    [
        ("name: x, source: private, lower: 5", {"private__sigma_draw": "uniform"}, r"stages.custom: stage x: sigma_draw: .*\[5, 4.38.*\] in stage x"),
        ("name: x, source: private, lower: 2, sigma_draw: weights, sigma_weights: [[0, 1], [1, 1]]", {}, r"weights above 0 somewhere in \[2, inf\]"),
        ("name: x, source: private, upper: 0.5, sigma_draw: weights, sigma_weights: [[0, 0], [0.5, 0], [1, 1]]", {}, "weights above 0 somewhere"),
        ("name: x, source: synthetic, lower: 200", {}, "noise levels that float32 can hold"),
        ("name: x, source: synthetic, lower: 0, p_mean: -1e200, p_std: 1e-100", {}, "p_mean and p_std that reach"),
    ],
)
def test_a_stage_in_which_nothing_can_be_drawn_is_refused(entry: str, fields: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        stages(_custom(entry, **fields))


def test_a_variants_draw_that_is_unusable_names_the_phases_field() -> None:
    flags = ["--stages.variant=coarse", "--synthetic.sigma_draw=weights", "--synthetic.sigma_weights=[[-3, 1], [1, 1]]"]
    with pytest.raises(InputError, match=r"synthetic.sigma_draw: expected weights above 0 .* in stage coarse"):
        stages(read_config([], flags))


def test_one_uniform_gives_one_sigma_and_the_ends_are_finite() -> None:
    sigma = sigma_of(EVERYWHERE, np.array([0.0, 0.5, 1 - 2**-53]))
    assert sigma[1] == pytest.approx(math.exp(-1.2))
    assert sigma.shape == (3,)
    assert torch.isfinite(sigma[1:]).all()
    assert 0 < sigma[2] < 1e6


@pytest.mark.parametrize("variant", ["dpdm", "coarse", "cleaning", "coarse_cleaning", "nonprivate"])
def test_stages_tile_the_line(variant: str) -> None:
    found = sorted(stages(RunConfig(stages=StagesConfig(variant=variant))), key=lambda stage: stage.lower)  # type: ignore[arg-type]
    assert found[0].lower == -math.inf
    assert found[-1].upper == math.inf
    assert all(a.upper == b.lower for a, b in pairwise(found))
    assert sum(stage.source != "synthetic" for stage in found) == 1


def test_authors_thresholds_cut_off_what_the_paper_says() -> None:
    """Under N(-1.2, 1.2^2) 6.7 % of the draws lie below -3 and 0.38 % above +2."""
    log_sigma = np.log(sigma_of(EVERYWHERE, np.random.default_rng(1).random(400_000)).numpy())
    assert (log_sigma < -3).mean() == pytest.approx(0.067, rel=0.03)
    assert (log_sigma > 2).mean() == pytest.approx(0.0038, rel=0.1)


def test_karras_grid_is_equation_5() -> None:
    grid = karras_grid(18, 0.002, 80, 7)
    assert grid[0] == pytest.approx(80)
    assert grid[-2] == pytest.approx(0.002)
    assert grid[-1] == 0
    i = 5
    assert grid[i] == pytest.approx((80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)
