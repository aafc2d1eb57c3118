"""Hints: which prototype of its class an image has, and for programmatic images a blurred and faded copy of themselves."""

import numpy as np
import torch
from torch import Tensor

from dpsyngen.config import HintsConfig


def synthetic_hints(images: Tensor, config: HintsConfig, rng: np.random.Generator) -> Tensor:
    """Hints float32 [N, C, H, W] for images of that shape in [-1, 1]: each blurred by its own Gaussian, faded towards the centre, and noisy.

    So the network learns, before it sees private data, that a hint tells where the mass is, and how far to trust it.
    """
    n, _, height, width = images.shape
    deviations = rng.uniform(*config.synthetic_blur, size=n) * height
    contrast = torch.from_numpy(rng.uniform(*config.synthetic_fade, size=n).astype(np.float32))[:, None, None, None]
    rows = _gaussian_matrices(deviations, height)
    columns = rows if height == width else _gaussian_matrices(deviations, width)
    blurred = torch.einsum("nyh,nchw,nxw->ncyx", rows, images, columns)
    hints = config.centre + contrast * (blurred - config.centre)
    if config.synthetic_noise[1] == 0:
        return hints
    noise = rng.uniform(*config.synthetic_noise, size=(n, 1, 1, 1)) * rng.standard_normal(images.shape)
    return (hints + torch.from_numpy(noise.astype(np.float32))).clamp(-1, 1)


def _gaussian_matrices(deviations: np.ndarray, size: int) -> Tensor:
    """Matrices float32 [N, size, size] that blur by N standard deviations in pixels; rows sum to one, also at the border."""
    distance = torch.arange(size)[:, None] - torch.arange(size)
    exponents = torch.from_numpy(-0.5 / np.maximum(deviations, 1e-3) ** 2).float()[:, None, None]
    return torch.softmax(exponents * distance.square(), dim=2)


def nearest_prototypes(images: Tensor, labels: Tensor, prototypes: Tensor, per_class: int) -> Tensor:
    """For each image the nearest prototype of its class, as its row in `prototypes`, int64 [N].

    images float32 [N, C, H, W]; labels int64 [N]; prototypes float32 [classes * per_class, C, H, W], those of a class following one another.
    """
    own = prototypes.flatten(start_dim=1).unflatten(0, (-1, per_class))
    nearness = own[labels] @ images.flatten(start_dim=1)[:, :, None]  # a product for each image by itself, whatever others there are
    return labels * per_class + (nearness[:, :, 0] - own.square().sum(dim=2)[labels] / 2).argmax(dim=1)
