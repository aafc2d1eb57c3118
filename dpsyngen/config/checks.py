"""What the checks of all sections say alike."""

from itertools import pairwise
from math import inf

from dpsyngen.errors import InputError


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise InputError, "NAME: expected EXPECTED, got VALUE", unless the condition holds."""
    if not condition:
        raise InputError(f"{name}: expected {expected}, got {value!r}")


def require_density(name: str, knots: tuple[tuple[float, float], ...]) -> None:
    """Raise InputError unless the knots (ln sigma, weight) make a density: ascending, finite, weights >= 0 and not all of them 0."""
    places, weights = [place for place, _ in knots], [weight for _, weight in knots]
    ascending = all(low < high for low, high in pairwise(places)) and all(abs(place) < inf for place in places)
    require(len(knots) >= 2 and ascending, name, "at least two pairs [ln sigma, weight] with ascending, finite ln sigma", knots)
    require(all(0 <= weight < inf for weight in weights) and any(weights), name, "finite weights >= 0, one of them above 0", knots)
