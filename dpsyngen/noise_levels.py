"""Noise levels: the stages on ln sigma, draws of sigma inside a stage, and the grid that samplers walk down."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.special import log_ndtr, logsumexp, ndtri_exp
from torch import Tensor

from dpsyngen.config import StagesConfig

Source = Literal["synthetic", "private"]


@dataclass(frozen=True)
class Stage:
    """A range of the noise level and the images that teach it.

    `lower` and `upper` bound ln sigma and may be infinite. Within the stage ln sigma follows N(p_mean, p_std^2) truncated
    to the range and renormalised.
    """

    name: str
    lower: float
    upper: float
    source: Source

    def sigma(self, uniform: np.ndarray, p_mean: float, p_std: float) -> Tensor:
        """Map uniforms in [0, 1) to sigma by the inverse CDF of the truncated lognormal.

        Never by rejection: one uniform gives one sigma, so a draw costs the same whatever the data and the thresholds.
        Works in log probabilities, since a stage may lie many deviations from p_mean. Returns float32, same shape.
        """
        a, b = (self.lower - p_mean) / p_std, (self.upper - p_mean) / p_std
        mirrored = a + b > 0  # log_ndtr is exact in the lower tail only; N(0, 1) is symmetric
        if mirrored:
            a, b = -b, -a
        log_a, log_b = log_ndtr(a), log_ndtr(b)
        with np.errstate(divide="ignore"):
            z = ndtri_exp(logsumexp(np.stack([np.log1p(-uniform) + log_a, np.log(uniform) + log_b]), axis=0))
        z = np.clip(z, a, b)
        return torch.from_numpy(np.exp(p_mean + p_std * (-z if mirrored else z)).astype(np.float32))


def stages(config: StagesConfig) -> tuple[Stage, ...]:
    """The stages of a variant (Choi et al., arXiv 2412.09842, section 4): cleaning | tau1 | context | tau2 | coarse.

    Neighbouring stages with the same source are one. `finetune` and `finetune_all` refine with private images what
    programmatic images taught, so their ranges overlap; all others tile the line of ln sigma.
    """
    low, high, inf = config.tau1, config.tau2, math.inf
    cleaning, coarse = Stage("cleaning", -inf, low, "synthetic"), Stage("coarse", high, inf, "synthetic")
    return {
        "dpdm": (Stage("all", -inf, inf, "private"),),
        "nonprivate": (Stage("all", -inf, inf, "private"),),
        "coarse": (coarse, Stage("context", -inf, high, "private")),
        "cleaning": (cleaning, Stage("context", low, inf, "private")),
        "coarse_cleaning": (cleaning, coarse, Stage("context", low, high, "private")),
        "finetune": (coarse, Stage("all", -inf, inf, "private")),
        "finetune_all": (Stage("pretraining", -inf, inf, "synthetic"), Stage("all", -inf, inf, "private")),
    }[config.variant]


def private_stage(config: StagesConfig) -> Stage:
    """The one stage of a variant that private images teach."""
    (stage,) = (stage for stage in stages(config) if stage.source == "private")
    return stage


def karras_grid(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Noise levels from sigma_max down to sigma_min, then 0: float64 [steps + 1] (Karras et al., equation 5)."""
    if steps == 1:
        return torch.tensor([sigma_max, 0.0], dtype=torch.float64)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])
