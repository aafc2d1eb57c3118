"""Stages and draws of sigma, against scipy's truncated normal."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import kstest, truncnorm

from dpsyngen.config import RunConfig, StagesConfig
from dpsyngen.noise_levels import karras_grid, stages
from dpsyngen.sigma_draws import TruncatedNormal, sigma_of

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
