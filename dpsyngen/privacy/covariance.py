"""DP covariance: one Gaussian mechanism on the outer products of images around their class means, at low resolution; its main axes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor

from dpsyngen.config import RunConfig
from dpsyngen.hints import nearest_prototypes
from dpsyngen.privacy.class_means import ClassMeans, noisy_sum, on_grid
from dpsyngen.privacy.randomness import SecureStream
from dpsyngen.privacy.secure_noise import Grid, refuse_inexact_sums

_IMAGES_AT_ONCE = 64  # under secure noise each image's outer product is truncated by itself


class Modes(NamedTuple):
    """Main axes of how images differ from their hints: modes float32 [rank, C, H, W], orthonormal, and the variance along each, [rank].

    Where there are fewer that stand out of the noise than were asked for, the others are zero.
    """

    modes: Tensor
    variances: Tensor


@dataclass(frozen=True)
class CovarianceMechanism:
    """Each image contributes z z^T / R^2, z the low-frequency part of x - m, m its hint, clipped to norm R: so the sensitivity is 1.

    The norm is Frobenius', under which a symmetric matrix is the vector of its diagonal and of sqrt(2) times what lies above it; noise goes on
    that vector. Low frequencies are the first `resolution` x `resolution` of the orthonormal cosine transform of each channel. Which of its class's
    prototypes is an image's hint is decided by itself and by what was released. The sum is divided by the declared size. All constants are public.
    """

    noise_multiplier: float
    expected_size: int
    radius: float
    resolution: int
    rank: int

    @classmethod
    def from_config(cls, config: RunConfig, expected_size: int, noise_multiplier: float) -> "CovarianceMechanism":
        """With the public constants of `config.hints`; the radius in pixels' units, not multiples of sqrt(C H W)."""
        hints, shape = config.hints, config.data.image_shape
        radius = hints.covariance_radius * math.sqrt(math.prod(shape))
        return cls(noise_multiplier, expected_size, radius, min(hints.covariance_resolution, shape[1]), hints.covariance_rank)

    def release(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        hints: ClassMeans,
        rng: np.random.Generator | SecureStream,
        sum_over_processes: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda own: own,
    ) -> Modes:
        """The main axes of all (images, labels) batches around `hints`. Spends the mechanism once; processes and noise as for class means."""
        grid = Grid.of(self.noise_multiplier, 1.0) if isinstance(rng, SecureStream) else None
        basis = self._basis(hints.means.shape[1:])
        upper, weights = _upper_triangle(len(basis))
        total, seen = np.zeros((len(basis), len(basis))), 0
        for images, labels in batches:
            z, seen = self._clipped(images, labels, hints, basis), seen + len(images)
            if grid is None:
                total += z.T @ z
                continue
            for part in np.split(z, range(_IMAGES_AT_ONCE, len(z), _IMAGES_AT_ONCE)):
                products = part[:, upper[0]] * part[:, upper[1]] * weights
                total[upper] += on_grid(products, grid).sum(axis=0)
        vector = total[upper] if grid is not None else total[upper] * weights
        own = {"vector": torch.from_numpy(vector), "seen": torch.tensor([float(seen)], dtype=torch.float64)}
        summed = sum_over_processes(own)
        if grid is not None:
            refuse_inexact_sums(int(summed["seen"]))
        vector = noisy_sum(summed["vector"].numpy(), self.noise_multiplier, rng, grid)
        return self.modes(vector, basis, hints.means.shape[1:])

    def modes(self, vector: np.ndarray, basis: np.ndarray, image_shape: torch.Size) -> Modes:
        """Post-processing of the noisy vector: the axes whose variance stands out of the noise, and what it is without it.

        The noise is a symmetric random matrix, with eigenvalues below 2 s sqrt(d); a true one, v, is seen at v + s^2 d / v (Benaych-Georges
        and Nadakuditi, "The eigenvalues and eigenvectors of finite, low rank perturbations of large random matrices", 2011).
        """
        dimension, unit = len(basis), self.radius**2 / self.expected_size
        upper, weights = _upper_triangle(dimension)
        matrix = np.zeros((dimension, dimension))
        matrix[upper] = vector * unit / weights
        matrix = matrix + np.triu(matrix, 1).T
        seen, axes = np.linalg.eigh(matrix)
        seen, axes = seen[::-1][: self.rank], axes.T[::-1][: self.rank]
        noise = self.noise_multiplier * unit * math.sqrt(dimension / 2)  # s sqrt(d), s that of entries off the diagonal
        true = np.where(seen > 2 * noise, (seen + np.sqrt(np.maximum(seen**2 - 4 * noise**2, 0))) / 2, 0.0)
        modes, variances = np.zeros((self.rank, math.prod(image_shape)), dtype=np.float32), np.zeros(self.rank, dtype=np.float32)
        modes[: len(axes)], variances[: len(axes)] = (axes * (true > 0)[:, None]) @ basis, true
        return Modes(torch.from_numpy(modes).reshape(self.rank, *image_shape), torch.from_numpy(variances))

    def _clipped(self, images: Tensor, labels: Tensor, hints: ClassMeans, basis: np.ndarray) -> np.ndarray:
        """z / R of images float32 [N, C, H, W]: float64 [N, d], rows of norm at most 1; zero for what isn't finite."""
        rows = nearest_prototypes(images, labels, hints.means, hints.per_class)
        z = (images - hints.means[rows]).flatten(start_dim=1).double().numpy() @ basis.T
        norms = np.linalg.norm(z, axis=1, keepdims=True)
        return np.where(np.isfinite(norms), z / np.maximum(norms, self.radius), 0.0)

    def _basis(self, image_shape: torch.Size) -> np.ndarray:
        """Orthonormal low-frequency fields, float64 [C resolution^2, C H W]."""
        channels, height, width = image_shape
        rows, columns = (dct(np.eye(size), axis=0, norm="ortho")[: self.resolution] for size in (height, width))
        fields = np.einsum("iy,jx->ijyx", rows, columns).reshape(-1, height * width)
        return np.kron(np.eye(channels), fields)


def _upper_triangle(dimension: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Where a symmetric matrix keeps its entries, and what makes a vector of the same norm of them: 1 on the diagonal, sqrt(2) above it."""
    rows, columns = np.triu_indices(dimension)
    return (rows, columns), np.where(rows == columns, 1, math.sqrt(2))
