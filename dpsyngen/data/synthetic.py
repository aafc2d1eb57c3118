"""Programmatic images for the synthetic phase: made on the fly, public, and the same for every number of processes."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dpsyngen.data.dataset import to_uint8, to_unit_range
from dpsyngen.errors import InputError
from synthetic_generators import Streams, UnknownFamilyError, make_generator
from synthetic_generators.variations import Deformation

_MOST_BYTES_KEPT = 4 * 2**30


class SyntheticImages:
    """The endless sequence of a family's images that begins with a seed.

    options are the family's own; image_shape is (C, H, W) with H = W; seed is the run's public seed. With `distinct` the first so many
    images come again and again, made once and kept as bytes where they fit into a few GiB. Raises InputError for a family or an
    option that doesn't exist.
    """

    def __init__(
        self, family: str, options: Mapping[str, float | int | str | bool], image_shape: tuple[int, int, int], seed: int, distinct: int | None = None
    ) -> None:
        channels, size, _ = image_shape
        try:
            self._generator = make_generator(family, channels, size, **options)
        except UnknownFamilyError as error:
            raise InputError(f"synthetic.family: {error}") from error
        except ValueError as error:
            raise InputError(f"synthetic.options: {error}") from error
        self._seed = seed
        self._distinct = distinct
        self._kept: np.ndarray | None = None
        if distinct is not None:
            places = distinct + self.copies  # the last figure's other versions may lie beyond the last image
            if places * channels * size**2 <= _MOST_BYTES_KEPT:
                self._kept = np.empty((places, *image_shape), dtype=np.uint8)
                self._is_kept = np.zeros(places, dtype=bool)

    def batch(self, indices: Sequence[int] | range | np.ndarray) -> Tensor:
        """The images at these places of the sequence, float32 [n, C, H, W] in [-1, 1]; each a function of the seed and its index alone."""
        return to_unit_range(self._images(self._places(indices)))

    def _places(self, indices: Sequence[int] | range | np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, dtype=np.int64)
        return indices if self._distinct is None else indices % self._distinct

    def _images(self, indices: np.ndarray) -> np.ndarray:
        if self._kept is None:
            return self._generator.generate(Streams(self._seed, indices))
        missing = np.unique(indices[~self._is_kept[indices]])
        if len(missing) > 0:
            self._kept[missing] = self._generator.generate(Streams(self._seed, missing))
            self._is_kept[missing] = True
        return self._kept[indices]

    @property
    def copies(self) -> int:
        """How many versions of a figure follow one another; 1 for families that draw each image by itself."""
        return getattr(self._generator, "copies", 1)

    def with_class_means(self, indices: np.ndarray, neighbours: int | None = None) -> tuple[Tensor, Tensor]:
        """As `batch`, and the mean of the other versions of each image's figure, like the images. Needs `copies` of 2 at least.

        With `neighbours` the mean of as many others that are nearest to the image, all of them if there are no more.
        Made of whole figures, so indices that follow one another cost little more than the images alone.
        """
        indices = self._places(indices)
        figures, figure = np.unique(indices // self.copies, return_inverse=True)
        images = self._images((figures[:, None] * self.copies + np.arange(self.copies)).ravel())
        versions = to_unit_range(images).unflatten(0, (len(figures), self.copies))
        if neighbours is None or neighbours >= self.copies - 1:
            others = (versions.sum(dim=1, keepdim=True) - versions) / (self.copies - 1)
        else:
            others = _means_of_nearest(versions, neighbours)
        return versions[figure, indices % self.copies], others[figure, indices % self.copies]


def deformed(images: Tensor, places: np.ndarray, seed: int, factor: float) -> Tensor:
    """Each image float32 [n, C, H, W] in [-1, 1] as its version at a place, int64 [n], of the endless sequence that a seed begins: like the images.

    Deformed `factor` times as far as the family variations deforms figures.
    """
    figures = to_uint8(images).transpose(0, 3, 1, 2)
    return to_unit_range(Deformation().scaled(factor)(Streams(seed, places).child("deformed"), figures))


def _means_of_nearest(versions: Tensor, neighbours: int) -> Tensor:
    """For each of float32 [figures, copies, C, H, W] the mean of the nearest other copies of its figure."""
    flat = versions.flatten(start_dim=2)
    nearness = flat @ flat.transpose(1, 2) - flat.square().sum(dim=2)[:, None] / 2  # a product for each figure by itself
    nearness.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    chosen = torch.zeros_like(nearness).scatter_(2, nearness.topk(neighbours, dim=2).indices, 1 / neighbours)
    return (chosen @ flat).view_as(versions)
