"""The denoising loss of one image per row; who averages over what is the caller's business."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dpsyngen.denoiser import Denoiser
from dpsyngen.sigma_draws import SigmaDraw, sigma_of


class DrawSource(Protocol):
    """NumPy's generator, or something else that gives independent values of these two distributions."""

    def random(self, size: int, /) -> np.ndarray:
        """Uniforms in [0, 1), float64 [size]."""

    def standard_normal(self, size: tuple[int, ...], /, dtype: Any) -> np.ndarray:
        """Normal deviates, `dtype` [*size]."""


@dataclass(frozen=True)
class Draws:
    """The randomness of one forward pass over N rows: sigma float32 [N], noise float32 [N, C, H, W], labels int64 [N] after dropout."""

    sigma: Tensor
    noise: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Draws":
        """The same draws on another device."""
        return Draws(self.sigma.to(device), self.noise.to(device), self.labels.to(device))

    def rows(self, which: slice | Tensor) -> "Draws":
        """The draws of some rows: a slice, or bool [N]."""
        return Draws(self.sigma[which], self.noise[which], self.labels[which])

    @classmethod
    def cat(cls, parts: "Sequence[Draws]") -> "Draws":
        """The draws of several chunks, one after another."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("sigma", "noise", "labels")))


def denoising_loss(denoiser: Denoiser, x: Tensor, draws: Draws, hint: Tensor | None = None) -> Tensor:
    """Weighted squared error per image, float32 [N] (Karras et al., equation 2).

    x float32 [N, C, H, W] in [-1, 1]. The weight 1 / c_out^2 makes the network's own target unit-variance at every
    sigma; the square is averaged over pixels and never over rows, so that no row's loss depends on another's.
    """
    denoised = denoiser(x + draws.sigma[:, None, None, None] * draws.noise, draws.sigma, draws.labels, hint)
    _, c_out, _ = denoiser.coefficients(draws.sigma)
    return torch.mean((denoised - x) ** 2, dim=(1, 2, 3)) / c_out**2


def draw(
    rng: DrawSource,
    sigma_draw: SigmaDraw,
    labels: Tensor,
    image_shape: tuple[int, int, int],
    *,
    label_dropout: float,
    null_label: int,
) -> Draws:
    """Randomness for len(labels) rows, all from `rng`: sigma, unit noise, labels dropped to the null label."""
    rows = len(labels)
    sigma = sigma_of(sigma_draw, rng.random(rows))
    dropped = torch.from_numpy(rng.random(rows) < label_dropout)
    noise = torch.from_numpy(rng.standard_normal((rows, *image_shape), dtype=np.float32))
    return Draws(sigma, noise, torch.where(dropped, null_label, labels))
