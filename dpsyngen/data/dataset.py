"""Sets of labelled images, in memory or elsewhere, and the way between bytes and the networks' range."""

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dpsyngen.config import DataConfig

MOST_FOR_EVALUATION = 50_000
"""The most images of a set on disk that evaluation reads, if they take at most MOST_BYTES_FOR_EVALUATION as uint8."""
MOST_BYTES_FOR_EVALUATION = 2**31
_IMAGES_PER_READ = 1024

# Neither the number of images nor a rate: the size of a private dataset is not for logs.
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left"


class Dataset(ABC):
    """N images with their labels, each an index into class_names. What training needs, wherever the images are.

    Images without labels all have label 0, and class_names is ("image",).
    """

    class_names: tuple[str, ...]

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @abstractmethod
    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images uint8 [n, C, H, W] and labels int64 [n] at indices int [n]; n may be 0. InputError names what can't be read."""

    @abstractmethod
    def slice(self, start: int, stop: int) -> "Dataset":
        """The images from start to before stop, sharing memory and files with this set."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digits that change when the images, their labels or their order do. A function of the private data: never publish it."""

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """As `read`, with images float32 [n, C, H, W] in [-1, 1]."""
        images, labels = self.read(indices)
        return to_unit_range(images), torch.from_numpy(labels)

    def into_memory(self) -> "ImageDataset":
        """The same images and order in memory, with a progress bar while they are read."""
        images, labels = np.empty((len(self), *self.image_shape), dtype=np.uint8), np.empty(len(self), dtype=np.int64)
        for start in tqdm(range(0, len(self), _IMAGES_PER_READ), desc="reading images", bar_format=BAR_FORMAT, disable=None):
            block = slice(start, min(start + _IMAGES_PER_READ, len(self)))
            images[block], labels[block] = self.read(np.arange(block.start, block.stop))
        return ImageDataset(images, labels, self.class_names)

    def for_evaluation(self) -> "ImageDataset":
        """As much of the set as evaluation needs, in memory: evenly spaced images, at most MOST_FOR_EVALUATION."""
        most = max(1, min(MOST_FOR_EVALUATION, MOST_BYTES_FOR_EVALUATION // math.prod(self.image_shape)))
        count = min(len(self), most)
        images, labels = self.read(np.arange(count) * len(self) // max(1, count))
        return ImageDataset(images, labels, self.class_names)


@dataclass(frozen=True, eq=False)
class DatasetOnDisk(Dataset):
    """The images from start to before stop of a source that is read again for every batch."""

    class_names: tuple[str, ...]
    config: DataConfig
    start: int
    stop: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """As the base class has it."""
        return self.config.image_shape

    def __len__(self) -> int:
        return self.stop - self.start

    def slice(self, start: int, stop: int) -> Self:
        """As the base class has it."""
        return replace(self, start=self.start + start, stop=self.start + stop)


@dataclass(frozen=True, eq=False)
class ImageDataset(Dataset):
    """Images in memory: uint8 [N, C, H, W] and labels int64 [N]."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """As the base class has it."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As the base class has it."""
        return self.images[indices], self.labels[indices]

    def slice(self, start: int, stop: int) -> "ImageDataset":
        """As the base class has it."""
        return ImageDataset(self.images[start:stop], self.labels[start:stop], self.class_names)

    def fingerprint(self) -> str:
        """SHA-256 of shape, images and labels."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()

    def into_memory(self) -> "ImageDataset":
        """The set itself."""
        return self

    def for_evaluation(self) -> "ImageDataset":
        """The set itself."""
        return self


def to_unit_range(images: np.ndarray) -> Tensor:
    """uint8 of any shape to float32 of the same shape in [-1, 1]: x / 127.5 - 1."""
    return torch.from_numpy(images.astype(np.float32)).div_(127.5).sub_(1)


def to_uint8(x: Tensor) -> np.ndarray:
    """float [N, C, H, W] in [-1, 1] to uint8 [N, H, W, C]: clamped and rounded; the inverse of `to_unit_range`."""
    levels = x.detach().float().add(1).mul_(127.5).round_().clamp_(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
