"""Programmatic images for the synthetic phase: made on the fly, public, and the same for every number of processes."""

import numpy as np
from torch import Tensor

from dpsyngen.config import SyntheticConfig
from dpsyngen.data.dataset import to_unit_range
from dpsyngen.errors import InputError
from synthetic_generators import available, make_generator


class SyntheticImages:
    """An endless stream of programmatic images, addressed by step and chunk.

    image_shape is (C, H, W) with H = W; seed is the run's public seed. Raises InputError for a family or an option that
    doesn't exist.
    """

    def __init__(self, config: SyntheticConfig, image_shape: tuple[int, int, int], seed: int) -> None:
        channels, size, _ = image_shape
        try:
            self._generator = make_generator(config.family, channels, size, **config.options)
        except ValueError as error:
            field = "synthetic.options" if config.family in available() else "synthetic.family"
            raise InputError(f"{field}: {error}") from error
        self._seed = seed

    def batch(self, step: int, chunk: int, n: int) -> Tensor:
        """n images float32 [n, C, H, W] in [-1, 1]: a function of the seed and these arguments alone."""
        sequence = np.random.SeedSequence(self._seed, spawn_key=(step, chunk))
        return to_unit_range(self._generator.generate(np.random.default_rng(sequence), n))
