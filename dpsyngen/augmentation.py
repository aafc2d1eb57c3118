"""Augmentation that differs over the K rows of a private image: mirrored, shifted by whole pixels."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Which moves are drawn for a row: mirrored left to right with probability 1/2 (`flip`), then shifted in each direction by -shift, ...,
    shift pixels, all equally likely.
    """

    flip: bool = False
    shift: int = 0

    def draw(self, uniforms: Callable[[int], np.ndarray], rows: int) -> Tensor | None:
        """Moves int64 [rows, 3]: 1 for a mirrored row, pixels down, pixels to the right; None, and nothing is drawn, if rows stay as they are.

        `uniforms(n)` gives n independent uniforms in [0, 1), float64.
        """
        if not self.flip and self.shift == 0:
            return None
        moves = torch.zeros(rows, 3, dtype=torch.int64)
        if self.flip:
            moves[:, 0] = torch.from_numpy(uniforms(rows) < 0.5)
        if self.shift > 0:
            pixels = np.floor(uniforms(2 * rows) * (2 * self.shift + 1)) - self.shift
            moves[:, 1:] = torch.from_numpy(pixels.reshape(rows, 2))
        return moves


def moved(x: Tensor, moves: Tensor) -> Tensor:
    """Each row of x [N, C, H, W] by its own moves int64 [N, 3]; what a shift uncovers repeats the border, and no value is interpolated."""
    mirrored, down, right = moves[:, :, None].unbind(dim=1)
    height, width = x.shape[2:]
    rows = (torch.arange(height, device=x.device) - down).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) - right).clamp(0, width - 1)
    columns = torch.where(mirrored == 1, width - 1 - columns, columns)
    return x.take_along_dim(rows[:, None, :, None], dim=2).take_along_dim(columns[:, None, None, :], dim=3)
