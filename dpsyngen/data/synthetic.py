"""Programmatic images for the synthetic phase: made on the fly, public, and the same for every number of processes."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from dpsyngen.data.dataset import to_unit_range
from dpsyngen.errors import InputError
from synthetic_generators import Streams, UnknownFamilyError, make_generator


class SyntheticImages:
    """The endless sequence of a family's images that begins with a seed.

    options are the family's own; image_shape is (C, H, W) with H = W; seed is the run's public seed. Raises InputError for a family or
    an option that doesn't exist.
    """

    def __init__(self, family: str, options: Mapping[str, float | int | str | bool], image_shape: tuple[int, int, int], seed: int) -> None:
        channels, size, _ = image_shape
        try:
            self._generator = make_generator(family, channels, size, **options)
        except UnknownFamilyError as error:
            raise InputError(f"synthetic.family: {error}") from error
        except ValueError as error:
            raise InputError(f"synthetic.options: {error}") from error
        self._seed = seed

    def batch(self, indices: Sequence[int] | range | np.ndarray) -> Tensor:
        """The images at these places of the sequence, float32 [n, C, H, W] in [-1, 1]; each a function of the seed and its index alone."""
        return to_unit_range(self._generator.generate(Streams(self._seed, indices)))
