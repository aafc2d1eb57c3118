"""From counts to a certificate: the epsilon that an experiment proves a mechanism to have at least."""

import math

from scipy.stats import beta

from dpsyngen.errors import InputError


def clopper_pearson(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """The exact two-sided interval for a binomial's probability, (low, high) in [0, 1] (Clopper and Pearson, Biometrika 1934).

    Each end errs with probability at most (1 - confidence) / 2, whatever the true probability is. Raises InputError for counts
    that can't be and for a confidence outside (0, 1).
    """
    if not 0 <= successes <= trials or trials == 0:
        raise InputError(f"successes: expected an integer from 0 to trials > 0, got {successes} of {trials}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence: expected a number in (0, 1), got {confidence!r}")
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes > 0 else 0.0
    high = float(beta.isf(tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def certified_epsilon(likely: tuple[int, int], unlikely: tuple[int, int], delta: float, confidence: float) -> float:
    """The largest epsilon that an event's two frequencies rule out: a mechanism that is (e, delta)-DP has e at least this, or luck had it.

    Differential privacy says P(S | one dataset) <= exp(e) P(S | its neighbour) + delta for every event S. `likely` is (how often S
    was seen, how many times it could have been) under the dataset that makes S more likely, `unlikely` the same under the neighbour.
    Both are replaced by the ends of their Clopper-Pearson intervals (Jagielski et al., arXiv 2006.07709, section 4), which hold together
    with probability at least `confidence`; so the result exceeds the mechanism's epsilon with probability at most 1 - confidence.

    S must be fixed before the counts are taken. Call twice to bound both directions, adding and removing, and divide 1 - confidence
    by the number of calls whose largest result is reported. Never below 0. Raises InputError as `clopper_pearson` does, and for a
    delta outside [0, 1).
    """
    if not 0 <= delta < 1:
        raise InputError(f"delta: expected a number in [0, 1), got {delta!r}")
    at_least, _ = clopper_pearson(*likely, confidence)
    _, at_most = clopper_pearson(*unlikely, confidence)
    return math.log(max(1.0, (at_least - delta) / at_most))
