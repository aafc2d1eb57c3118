"""Hints for programmatic images: what a class mean is to a private image, a blurred and faded copy is to a synthetic one."""

import numpy as np
import torch
from torch import Tensor

from dpsyngen.config import HintsConfig


def synthetic_hints(images: Tensor, config: HintsConfig, rng: np.random.Generator) -> Tensor:
    """Hints float32 [N, C, H, W] for images of that shape in [-1, 1]: each blurred by its own Gaussian and faded towards the centre.

    So the network learns, before it sees private data, that a hint tells where the mass is, and how far to trust it.
    """
    n, _, height, width = images.shape
    deviations = rng.uniform(*config.synthetic_blur, size=n) * height
    contrast = torch.from_numpy(rng.uniform(*config.synthetic_fade, size=n).astype(np.float32))[:, None, None, None]
    rows, columns = _gaussian_matrices(deviations, height), _gaussian_matrices(deviations, width)
    blurred = rows[:, None] @ images @ columns[:, None].transpose(2, 3)
    return config.centre + contrast * (blurred - config.centre)


def _gaussian_matrices(deviations: np.ndarray, size: int) -> Tensor:
    """Matrices float32 [N, size, size] that blur by N standard deviations in pixels; rows sum to one, also at the border."""
    distance = np.arange(size)[:, None] - np.arange(size)[None, :]
    kernel = np.exp(-0.5 * (distance / np.maximum(deviations, 1e-3)[:, None, None]) ** 2)
    return torch.from_numpy((kernel / kernel.sum(axis=2, keepdims=True)).astype(np.float32))
