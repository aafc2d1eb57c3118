"""Power-function averages over training, and others made of snapshots of them (Karras et al., arXiv 2312.02696, section 3 and appendix C).

The average at step T weighs what was there between steps t - 1 and t by the profile p(t) = (gamma + 1) t^gamma / T^(gamma + 1), 0 < t <= T. Its
length sigma_rel is the profile's standard deviation as a fraction of T, so it covers the same part of a short training as of a long one.
"""

from functools import cache

import numpy as np

TRACKED = (0.05, 0.10)
"""The lengths of the averages that are tracked while training, as in the paper."""
SHORTEST, LONGEST = 0.001, 0.288
"""The lengths that others can have. At 1/sqrt(12), a little above, gamma is 0, and the average is that of all steps alike."""


@cache
def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile of a length, the positive root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2 (Algorithm 2)."""
    return float(np.roots([1.0, 7.0, 16.0 - sigma_rel**-2, 12.0 - sigma_rel**-2]).real.max())


def kept(sigma_rel: float, step: int) -> float:
    """The share of the average after `step` - 1 steps in that after `step` = 1, 2, ... (beta of equation 127); the newest weights have the rest.

    That is exact: each step's weights get the integral of the profile over the step.
    """
    return float((1 - 1 / step) ** (gamma_of(sigma_rel) + 1))


def inner_product(ends: np.ndarray, gammas: np.ndarray, other_ends: np.ndarray, other_gammas: np.ndarray) -> np.ndarray:
    """Integrals of products of two profiles, float64 (Algorithm 3); ends are steps T > 0, arguments are broadcast against each other."""
    earlier, later = np.minimum(ends, other_ends), np.maximum(ends, other_ends)
    gamma_of_later = np.where(ends < other_ends, other_gammas, gammas)
    return (gammas + 1) * (other_gammas + 1) / (gammas + other_gammas + 1) * (earlier / later) ** gamma_of_later / later


def combination(ends: np.ndarray, gammas: np.ndarray, end: float, gamma: float) -> tuple[np.ndarray, float]:
    """How to make the profile (`end`, `gamma`) of those of snapshots.

    Args:
        ends: steps of the snapshots, float64 [M]; no two snapshots have both end and gamma in common.
        gammas: their exponents, float64 [M].
    Returns:
        Coefficients float64 [M] that sum to 1, with the profile that is nearest in the sense of least squares (Algorithm 3; that the sum is 1 is
        a constraint here, since weights are not zero on average), and the norm of what is missing, relative to that of the profile.
    """
    target_end, target_gamma = np.asarray(end, dtype=np.float64), np.asarray(gamma)
    gram = inner_product(ends[:, None], gammas[:, None], ends, gammas)
    products = inner_product(ends, gammas, target_end, target_gamma)
    square = inner_product(target_end, target_gamma, target_end, target_gamma)
    scale = 1 / np.sqrt(np.diag(gram))  # profiles of norm 1, or early snapshots and late ones would be of different size
    count = len(scale)
    system = np.zeros((count + 1, count + 1))  # a Lagrange multiplier comes last
    system[:count, :count] = gram * scale * scale[:, None]
    system[:count, count] = system[count, :count] = scale
    coefficients = scale * np.linalg.solve(system, np.append(products * scale, 1.0))[:count]
    missing = square - 2 * coefficients @ products + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(0.0, missing) / square))
