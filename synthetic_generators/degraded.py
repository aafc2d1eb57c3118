"""Degraded: another family's images, spoilt on purpose, to find out what the quality of programmatic images is worth."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from synthetic_generators.registry import Generator, Nested, make_wrapped, register, require
from synthetic_generators.streams import Streams

_PERIOD = 4  # pixels between the lines of a grid, and the side of a block


@register("degraded")
@dataclass(frozen=True)
class Degraded:
    """Another family with few different images, or with an artefact on each; this project's own, for experiments.

    Options of the family go under its name: `dead_leaves: {exponent: 2}`, or flat, `dead_leaves.exponent`.
    """

    channels: int
    image_size: int
    family: str = "dead_leaves"
    """The family that is spoilt."""
    distinct: int = 0
    """How many different images there are: image i is image i modulo this. 0 leaves all different."""
    artefact: Literal["none", "border", "grid", "blocks", "quantise", "salt"] = "none"
    """border: a white frame, an eighth of the side wide; grid: every fourth row and column white; blocks: means of 4 x 4 pixels;
    quantise: black and white alone; salt: pixels at random black or white."""
    strength: float = 0.5
    """How far each pixel goes from what it was to the artefact; for salt the fraction of the pixels that it replaces."""
    families: Nested = field(default_factory=dict)
    """The options of the family that is spoilt."""

    def __post_init__(self) -> None:
        require(self.distinct >= 0, "distinct", "an integer >= 0", self.distinct)
        require(0 <= self.strength <= 1, "strength", "a number in [0, 1]", self.strength)
        self._original  # noqa: B018 - refuses what it can't be made of

    @cached_property
    def _original(self) -> Generator:
        return make_wrapped(self.family, self.channels, self.image_size, self.families)

    def generate(self, streams: Streams) -> np.ndarray:
        """uint8 [n, C, H, W]."""
        if self.distinct == 0:
            return self._spoilt(streams)
        different, which = np.unique(streams.indices % self.distinct, return_inverse=True)
        images = self._spoilt(streams.at(different))
        return images[which]

    def _spoilt(self, streams: Streams) -> np.ndarray:
        images = self._original.generate(streams.child("image"))
        if self.artefact == "none":
            return images
        if self.artefact == "salt":
            draw = streams.uniform("salt", images.shape[2:])[:, None]
            return np.where(draw < self.strength, np.where(draw < self.strength / 2, np.uint8(0), np.uint8(255)), images)
        spoilt = self._with_artefact(images).astype(np.float32)
        return (images + np.float32(self.strength) * (spoilt - images) + np.float32(0.5)).astype(np.uint8)

    def _with_artefact(self, images: np.ndarray) -> np.ndarray:
        """All of the artefact, numbers in [0, 255] like the images."""
        side = self.image_size
        place = np.arange(side)
        if self.artefact == "quantise":
            return np.where(images < 128, np.uint8(0), np.uint8(255))
        if self.artefact == "blocks":
            starts = np.arange(0, side, _PERIOD)
            widths = np.diff(starts, append=side)
            total = np.add.reduceat(np.add.reduceat(images.astype(np.int64), starts, axis=2), starts, axis=3)
            return (total / (widths[:, None] * widths)).repeat(widths, axis=2).repeat(widths, axis=3)
        on_line = np.minimum(place, side - 1 - place) < side / 8 if self.artefact == "border" else place % _PERIOD == 0
        return np.where(on_line[:, None] | on_line, np.uint8(255), images)
