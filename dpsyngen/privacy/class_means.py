"""DP class means: one Gaussian mechanism on the per-class sums and counts of the clipped images."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpsyngen.config import RunConfig
from dpsyngen.privacy.randomness import SecureStream
from dpsyngen.privacy.secure_noise import Grid, refuse_inexact_sums, rounded_gaussian

# How far below the grid's sensitivity contributions are scaled: norms of up to 2^20 float64 entries are wrong by less than 2^-32.
_MARGIN = 2.0**-30


@dataclass(frozen=True)
class ClassMeansMechanism:
    """Each image contributes (a clip(x - c, R) / R, b) to the block of its class, a^2 + b^2 = 1, so the sensitivity is 1.

    All constants are public. Means are the noisy sums over the noisy counts, never over exact ones.
    """

    noise_multiplier: float
    num_classes: int
    centre: float
    radius: float
    count_weight: float
    count_floor: float

    @classmethod
    def from_config(cls, config: RunConfig, noise_multiplier: float) -> "ClassMeansMechanism":
        """With the public constants of `config.hints`; the radius in pixels' units, not multiples of sqrt(C H W)."""
        hints = config.hints
        radius = hints.radius * math.sqrt(math.prod(config.data.image_shape))
        classes = max(1, config.data.num_classes)
        return cls(noise_multiplier, classes, hints.centre, radius, hints.count_weight, hints.count_floor)

    def contributions(self, images: Tensor) -> tuple[np.ndarray, float]:
        """What images float32 [N, C, H, W] add to the sums, float64 [N, C H W] of L2 norm at most a, and to the counts, b."""
        shifted = images.flatten(start_dim=1).double().numpy() - self.centre
        norms = np.linalg.norm(shifted, axis=1, keepdims=True)
        image_weight = math.sqrt(1 - self.count_weight**2)
        scaled = shifted * (image_weight / np.maximum(norms, self.radius))
        return np.where(np.isfinite(norms), scaled, 0.0), self.count_weight

    def release(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        rng: np.random.Generator | SecureStream,
        sum_over_processes: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda own: own,
    ) -> Tensor:
        """The noisy means, float32 [num_classes, C, H, W] in [-1, 1], of all (images, labels) batches. Spends the mechanism once.

        Each process has batches of its own, at least one, which may be empty; all draw the same noise, on the sums of all. With a
        SecureStream contributions are truncated to a grid, so that their sums are exact, and the noise is rounded to it exactly.
        """
        grid = Grid.of(self.noise_multiplier, 1.0) if isinstance(rng, SecureStream) else None
        sums, counts, shape, seen = np.zeros(0), np.zeros(self.num_classes), torch.Size(), 0
        for images, labels in batches:
            if not shape:
                shape = images.shape[1:]
                sums = np.zeros((self.num_classes, math.prod(shape)))
            scaled, weight = self.contributions(images)
            seen += len(images)
            if grid is not None:
                scaled, weight = np.trunc(scaled * ((1 - _MARGIN) / grid.step)), math.trunc(weight * (1 - _MARGIN) / grid.step)
            for label in np.unique(labels.numpy()):
                of_class = labels.numpy() == label
                sums[label] += scaled[of_class].sum(axis=0)
                counts[label] += weight * of_class.sum()
        own = {"sums": torch.from_numpy(sums), "counts": torch.from_numpy(counts), "seen": torch.tensor([float(seen)], dtype=torch.float64)}
        total = sum_over_processes(own)
        if grid is not None:
            refuse_inexact_sums(int(total["seen"]))
        sums, counts = total["sums"].numpy(), total["counts"].numpy()
        sums, counts = self._noisy(sums, rng, grid), self._noisy(counts, rng, grid)
        return self.means(sums, counts).reshape(self.num_classes, *shape)

    def _noisy(self, total: np.ndarray, rng: np.random.Generator | SecureStream, grid: Grid | None) -> np.ndarray:
        """`total`, in units of the grid if there is one, with noise: in units of the sensitivity."""
        if isinstance(rng, SecureStream) and grid is not None:
            return (total + rounded_gaussian(rng, total.size, grid.exponent).numpy().reshape(total.shape)) * grid.step
        return total + self.noise_multiplier * rng.standard_normal(total.shape)

    def means(self, sums: np.ndarray, counts: np.ndarray) -> Tensor:
        """Post-processing of the noisy vector: sums float64 [num_classes, D], counts [num_classes] -> float32 [num_classes, D]."""
        image_weight = math.sqrt(1 - self.count_weight**2)
        units = np.maximum(counts / self.count_weight, self.count_floor)
        means = self.centre + sums * (self.radius / image_weight) / units[:, None]
        return torch.from_numpy(np.clip(means, -1, 1)).float()
