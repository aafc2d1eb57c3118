"""DP class means, and DP prototypes, the means of the parts of each class: Gaussian mechanisms on sums and counts of the clipped images."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpsyngen.config import RunConfig
from dpsyngen.hints import nearest_prototypes
from dpsyngen.privacy.randomness import SecureStream
from dpsyngen.privacy.secure_noise import Grid, refuse_inexact_sums, rounded_gaussian

# How far below the grid's sensitivity contributions are scaled: norms of up to 2^20 float64 entries are wrong by less than 2^-32.
MARGIN = 2.0**-30
# What decides the parts of a class in the first place: smooth fields from this public seed, of at most so many waves along a side.
_FIELDS_SEED, _WAVES = 0, 3


class ClassMeans(NamedTuple):
    """What was released: means float32 [num_classes * prototypes, C, H, W] in [-1, 1], those of a class following one another, and the
    share of its class that each stands for, float32 [num_classes * prototypes], which add up to 1 in each class.
    """

    means: Tensor
    shares: Tensor

    @property
    def per_class(self) -> int:
        """Prototypes of each class."""
        return len(self.means) // round(float(self.shares.sum()))


@dataclass(frozen=True)
class ClassMeansMechanism:
    """Each image contributes (a clip(x - c, R) / R, b) to one block, that of its class, a^2 + b^2 = 1, so the sensitivity is 1.

    All constants are public. Means are the noisy sums over the noisy counts, never over exact ones.

    With several prototypes it is k-means by Lloyd's algorithm within each class (as in Su et al., "Differentially Private k-Means
    Clustering", 2016): `rounds` such mechanisms one after another, each of which costs the same. The block is that of the nearest of the
    class's prototypes, which the rounds before have released; the first round has a block for the whole class. Which block an image
    enters is decided by itself and by what is released, so each round's sensitivity is 1.
    """

    noise_multiplier: float
    """Of each round."""
    num_classes: int
    centre: float
    radius: float
    count_weight: float
    count_floor: float
    prototypes: int = 1
    """For each class."""
    rounds: int = 1
    """Gaussian mechanisms that one release is made of."""

    @classmethod
    def from_config(cls, config: RunConfig, noise_multiplier: float) -> "ClassMeansMechanism":
        """With the public constants of `config.hints`; the radius in pixels' units, not multiples of sqrt(C H W).

        noise_multiplier is that of one Gaussian mechanism that costs as much as all rounds together.
        """
        hints = config.hints
        radius = hints.radius * math.sqrt(math.prod(config.data.image_shape))
        classes, rounds = max(1, config.data.num_classes), hints.rounds_made
        noise = noise_multiplier * math.sqrt(rounds)
        return cls(noise, classes, hints.centre, radius, hints.count_weight, hints.count_floor, hints.prototypes, rounds)

    def contributions(self, images: Tensor) -> tuple[np.ndarray, float]:
        """What images float32 [N, C, H, W] add to the sums, float64 [N, C H W] of L2 norm at most a, and to the counts, b."""
        shifted = images.flatten(start_dim=1).double().numpy() - self.centre
        norms = np.linalg.norm(shifted, axis=1, keepdims=True)
        scaled = shifted * (self._image_weight / np.maximum(norms, self.radius))
        return np.where(np.isfinite(norms), scaled, 0.0), self.count_weight

    def release(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        rng: np.random.Generator | SecureStream,
        sum_over_processes: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda own: own,
    ) -> ClassMeans:
        """The noisy means of all (images, labels) batches, which every round goes through. Spends the mechanism once.

        Each process has batches of its own, at least one, which may be empty; all draw the same noise, on the sums of all. With a
        SecureStream contributions are truncated to a grid, so that their sums are exact, and the noise is rounded to it exactly.
        """
        sums, counts, shape = self._round(batches, None, rng, sum_over_processes)
        means = self.means(sums, counts).reshape(self.num_classes, *shape)
        if self.prototypes == 1:
            return ClassMeans(means, torch.ones(self.num_classes))
        prototypes = self._first_prototypes(means)
        for _ in range(1, self.rounds):
            sums, counts, shape = self._round(batches, prototypes, rng, sum_over_processes)
            prototypes = self.means_of_parts(sums, counts).reshape(-1, *shape)
        units = np.maximum(counts.reshape(self.num_classes, -1), self.count_weight * self.count_floor)
        return ClassMeans(prototypes, torch.from_numpy(units / units.sum(axis=1, keepdims=True)).float().flatten())

    def _round(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        prototypes: Tensor | None,
        rng: np.random.Generator | SecureStream,
        sum_over_processes: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    ) -> tuple[np.ndarray, np.ndarray, torch.Size]:
        """One Gaussian mechanism: noisy sums float64 [blocks, C H W] and counts [blocks] in units of the sensitivity, and (C, H, W).

        `prototypes` [num_classes * prototypes, C, H, W] cut the classes into blocks; without them each class is one.
        """
        grid = Grid.of(self.noise_multiplier, 1.0) if isinstance(rng, SecureStream) else None
        blocks = self.num_classes if prototypes is None else len(prototypes)
        sums, counts, shape, seen = np.zeros(0), np.zeros(blocks), torch.Size(), 0
        for images, labels in batches:
            if not shape:
                shape = images.shape[1:]
                sums = np.zeros((blocks, math.prod(shape)))
            scaled, weight = self.contributions(images)
            seen += len(images)
            if grid is not None:
                scaled, weight = on_grid(scaled, grid), float(on_grid(np.array(weight), grid))
            block = (labels if prototypes is None else nearest_prototypes(images, labels, prototypes, self.prototypes)).numpy()
            for which in np.unique(block):
                sums[which] += scaled[block == which].sum(axis=0)
                counts[which] += weight * (block == which).sum()
        own = {"sums": torch.from_numpy(sums), "counts": torch.from_numpy(counts), "seen": torch.tensor([float(seen)], dtype=torch.float64)}
        total = sum_over_processes(own)
        if grid is not None:
            refuse_inexact_sums(int(total["seen"]))
        sums, counts = total["sums"].numpy(), total["counts"].numpy()
        return noisy_sum(sums, self.noise_multiplier, rng, grid), noisy_sum(counts, self.noise_multiplier, rng, grid), shape

    def means(self, sums: np.ndarray, counts: np.ndarray) -> Tensor:
        """Post-processing of a round's noisy vector: sums float64 [blocks, D], counts [blocks] -> float32 [blocks, D]."""
        return torch.from_numpy(np.clip(self._quotients(sums, counts)[0], -1, 1)).float()

    def means_of_parts(self, sums: np.ndarray, counts: np.ndarray) -> Tensor:
        """As `means`, of the parts of classes, each drawn towards its class mean by as much as it is noise.

        The variance of the noise is known for each part; what the parts differ by beyond it, pixel by pixel over all of them, is the variance
        of the signal, and each difference is multiplied by signal / (signal + noise) (Efron and Morris, "Stein's Estimation Rule and
        Its Competitors", 1973). So many parts of few images, or a small epsilon, give class means and no garbage, as do parts below the floor.
        """
        parts, counts = sums.reshape(self.num_classes, -1, sums.shape[-1]), counts.reshape(self.num_classes, -1)
        of_class, _ = self._quotients(parts.sum(axis=1), counts.sum(axis=1))
        found, deviations = self._quotients(parts, counts)
        difference, noise = found - of_class[:, None], deviations**2
        trust = 1 / np.maximum(noise, 1e-12)
        signal = np.maximum(0, (trust * (difference**2 - noise)).sum(axis=(0, 1)) / trust.sum(axis=(0, 1)))
        kept = signal / np.maximum(signal + noise, 1e-12) * (counts >= self.count_weight * self.count_floor)[..., None]
        return torch.from_numpy(np.clip(of_class[:, None] + kept * difference, -1, 1).reshape(sums.shape)).float()

    def _quotients(self, sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Noisy sums [..., D] over noisy counts [...]: means [..., D], and the standard deviation of their noise [..., 1]."""
        scale = self.radius / self._image_weight / np.maximum(counts / self.count_weight, self.count_floor)[..., None]
        return self.centre + sums * scale, self.noise_multiplier * scale

    def _first_prototypes(self, means: Tensor) -> Tensor:
        """Class means float32 [num_classes, C, H, W], each moved along random smooth fields, where its class may differ from its mean.

        Fields of one class are equally long, so that the nearest prototype tells along which of them an image differs most.
        """
        classes, channels, height, width = means.shape
        rng = np.random.default_rng(_FIELDS_SEED)
        waves = rng.standard_normal((classes, self.prototypes, channels, _WAVES, _WAVES))
        rows, columns = (np.cos(np.pi * np.outer(np.arange(_WAVES), (np.arange(size) + 0.5) / size)) for size in (height, width))
        fields = torch.from_numpy(np.einsum("kpcij,iy,jx->kpcyx", waves, rows, columns)).float() * (1.01 - means**2)[:, None]
        fields /= fields.flatten(start_dim=2).norm(dim=2)[:, :, None, None, None]
        return (means[:, None] + fields).flatten(end_dim=1)

    @property
    def _image_weight(self) -> float:
        return math.sqrt(1 - self.count_weight**2)


def on_grid(contributions: np.ndarray, grid: Grid) -> np.ndarray:
    """Contributions in units of the grid, whole ones: none is longer than the sensitivity."""
    return np.trunc(contributions * ((1 - MARGIN) / grid.step))


def noisy_sum(total: np.ndarray, noise_multiplier: float, rng: np.random.Generator | SecureStream, grid: Grid | None) -> np.ndarray:
    """`total`, in units of the grid if there is one, with the noise of a Gaussian mechanism: float64 like it, in units of the sensitivity."""
    if isinstance(rng, SecureStream) and grid is not None:
        return (total + rounded_gaussian(rng, total.size, grid.exponent).numpy().reshape(total.shape)) * grid.step
    return total + noise_multiplier * rng.standard_normal(total.shape)
