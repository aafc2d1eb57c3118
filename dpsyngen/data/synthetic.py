"""Programmatic images for the synthetic phase: made on the fly, public, and the same for every number of processes."""

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
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
        """The images at these places of the sequence, float32 [n, C, H, W] in [-1, 1]; each a function of the seed and its index alone.

        As many threads as torch has share the work, since NumPy lets go of the interpreter while it computes.
        """
        threads = torch.get_num_threads()
        parts = _parts(np.asarray(indices), threads, self.copies)
        images = [self._images(parts[0])] if len(parts) == 1 else list(_pool(threads).map(self._images, parts))
        return to_unit_range(np.concatenate(images))

    def _images(self, indices: np.ndarray) -> np.ndarray:
        return self._generator.generate(Streams(self._seed, indices))

    @property
    def copies(self) -> int:
        """How many versions of a figure follow one another; 1 for families that draw each image by itself."""
        return getattr(self._generator, "copies", 1)

    def with_class_means(self, indices: np.ndarray, neighbours: int | None = None) -> tuple[Tensor, Tensor]:
        """As `batch`, and the mean of the other versions of each image's figure, like the images. Needs `copies` of 2 at least.

        With `neighbours` the mean of as many others that are nearest to the image, all of them if there are no more.
        Made of whole figures, so indices that follow one another cost little more than the images alone.
        """
        figures, figure = np.unique(indices // self.copies, return_inverse=True)
        versions = self.batch((figures[:, None] * self.copies + np.arange(self.copies)).ravel()).unflatten(0, (len(figures), self.copies))
        if neighbours is None or neighbours >= self.copies - 1:
            others = (versions.sum(dim=1, keepdim=True) - versions) / (self.copies - 1)
        else:
            others = _means_of_nearest(versions, neighbours)
        return versions[figure, indices % self.copies], others[figure, indices % self.copies]


def _means_of_nearest(versions: Tensor, neighbours: int) -> Tensor:
    """For each of float32 [figures, copies, C, H, W] the mean of the nearest other copies of its figure."""
    distances = (versions[:, :, None] - versions[:, None]).square().flatten(start_dim=3).sum(dim=3)
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = distances.topk(neighbours, dim=2, largest=False).indices
    return torch.stack([versions[i][nearest[i]].mean(dim=1) for i in range(len(versions))])


# Below this a thread costs more than it saves.
_IMAGES_PER_THREAD = 16


def _parts(indices: np.ndarray, threads: int, copies: int) -> list[np.ndarray]:
    """At least one and at most `threads` parts that follow one another, cut where a figure ends if whole figures follow one another."""
    size = max(_IMAGES_PER_THREAD, -(-len(indices) // threads))
    size = -(-size // copies) * copies
    return [indices[begin : begin + size] for begin in range(0, max(1, len(indices)), size)]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="programmatic images")
