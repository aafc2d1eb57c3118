"""A set of labelled images in memory, and the way between bytes and the networks' range."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """N images with their labels.

    images uint8 [N, C, H, W]; labels int64 [N], each an index into class_names. Images without labels all have label 0,
    and class_names is ("image",).
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """The images float32 [n, C, H, W] in [-1, 1] and labels int64 [n] at indices int [n]; n may be 0."""
        return to_unit_range(self.images[indices]), torch.from_numpy(self.labels[indices])

    def slice(self, start: int, stop: int) -> "ImageDataset":
        """The images from start to before stop, sharing memory with this set."""
        return ImageDataset(self.images[start:stop], self.labels[start:stop], self.class_names)

    def fingerprint(self) -> str:
        """SHA-256 of shape, images and labels, as hex digits. It is a function of the private data: never publish it."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


def to_unit_range(images: np.ndarray) -> Tensor:
    """uint8 of any shape to float32 of the same shape in [-1, 1]: x / 127.5 - 1."""
    return torch.from_numpy(images.astype(np.float32)).div_(127.5).sub_(1)


def to_uint8(x: Tensor) -> np.ndarray:
    """float [N, C, H, W] in [-1, 1] to uint8 [N, H, W, C]: clamped and rounded; the inverse of `to_unit_range`."""
    levels = x.detach().float().add(1).mul_(127.5).round_().clamp_(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
