"""Mixtures: each image from one of several families."""

from dataclasses import dataclass, field
from functools import cached_property
from math import inf

import numpy as np

from synthetic_generators.registry import Generator, Nested, make_generator, register, require
from synthetic_generators.streams import Streams


@register("mixture")
@dataclass(frozen=True)
class Mixture:
    """Images of several families, as Baradad et al. (arXiv 2106.05963) mix their datasets: each image draws its family by weight.

    Options of a family go under its name, with its weight among them: `dead_leaves: {weight: 2, exponent: 2}`, or flat,
    `dead_leaves.weight`. A family may be there several times, told apart by what follows a slash: `dead_leaves/sparse: {leaves: 20}`.
    """

    channels: int
    image_size: int
    families: Nested = field(default_factory=lambda: {"dead_leaves": {}, "salt_and_pepper": {}})
    """What is mixed, with its own options; `weight`, 1 where it isn't given, is its share relative to the others'."""

    def __post_init__(self) -> None:
        require(sum(self._weights) > 0, "weight", "one above 0", self._weights)

    @cached_property
    def _members(self) -> tuple[tuple[Generator, float], ...]:
        """The families with their weights, sorted by name, whatever order a configuration has them in."""
        members = []
        for name, options in sorted(self.families.items()):
            weight = options.get("weight", 1.0)
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            require(is_number and 0 <= weight < inf, f"{name}.weight", "a finite number >= 0", weight)
            slash = name.find("/", name.find(":") + 1)  # one before a colon belongs to the path of a file
            own = {option: value for option, value in options.items() if option != "weight"}
            try:
                member = make_generator(name if slash < 0 else name[:slash], self.channels, self.image_size, **own)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            members.append((member, float(weight)))
        return tuple(members)

    @property
    def _weights(self) -> list[float]:
        return [weight for _, weight in self._members]

    def generate(self, streams: Streams) -> np.ndarray:
        """uint8 [n, C, H, W]."""
        images = np.empty((len(streams), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        cumulative = np.cumsum(self._weights) / sum(self._weights)
        drawn = np.searchsorted(cumulative[:-1], streams.uniform("family"), side="right")
        for index, (member, _) in enumerate(self._members):
            (own,) = (drawn == index).nonzero()
            if len(own):
                images[own] = member.generate(streams.take(own).child("image"))
        return images
