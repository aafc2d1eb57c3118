"""How the teacher learns from private images: noisy gradient descent on all of them at once, each step a Gaussian mechanism."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpsyngen.config import RunConfig
from dpsyngen.privacy.class_means import noisy_sum, on_grid
from dpsyngen.privacy.randomness import SecureStream
from dpsyngen.privacy.secure_noise import Grid, refuse_inexact_sums

_MOMENTUM = 0.9
_IMAGES_AT_ONCE = 64  # under secure noise each image's gradient is truncated by itself


@dataclass(frozen=True)
class TeacherMechanism:
    """Softmax regression. An image with features z, |z| <= 1, contributes its gradient z (p - y)^T, clipped to norm 1: the sensitivity is 1.

    Every image is in every step, so `steps` of them are one Gaussian mechanism with noise_multiplier / sqrt(steps) (Dong et al., arXiv
    1905.02383, Corollary 3.3). The noisy sum is divided by the declared size. All constants are public.
    """

    noise_multiplier: float
    """Of each step."""
    num_classes: int
    expected_size: int
    steps: int
    learning_rate: float

    @classmethod
    def from_config(cls, config: RunConfig, expected_size: int, noise_multiplier: float) -> "TeacherMechanism":
        """noise_multiplier is that of one Gaussian mechanism that costs as much as all steps together."""
        teacher = config.teacher
        return cls(noise_multiplier * math.sqrt(teacher.steps), config.data.num_classes, expected_size, teacher.steps, teacher.learning_rate)

    def release(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        rng: np.random.Generator | SecureStream,
        sum_over_processes: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda own: own,
    ) -> Tensor:
        """Weights float32 [D, num_classes] from all (features float32 [N, D], labels int64 [N]) batches, which every step goes through.

        Spends the mechanism once. Processes and noise as for class means.
        """
        own = [_Seen.of(features, labels) for features, labels in batches]
        dimension = own[0].features.shape[1]
        weights, velocity = np.zeros((dimension, self.num_classes)), np.zeros((dimension, self.num_classes))
        grid = Grid.of(self.noise_multiplier, 1.0) if isinstance(rng, SecureStream) else None
        for _ in range(self.steps):
            total = np.zeros_like(weights)
            for images in own:
                total += self._sum(images, weights, grid)
            seen = float(sum(len(images.labels) for images in own))
            shared = sum_over_processes({"gradient": torch.from_numpy(total), "seen": torch.tensor([seen], dtype=torch.float64)})
            if grid is not None:
                refuse_inexact_sums(int(shared["seen"]))
            gradient = noisy_sum(shared["gradient"].numpy(), self.noise_multiplier, rng, grid) / self.expected_size
            velocity = _MOMENTUM * velocity + gradient
            weights = weights - self.learning_rate * velocity
        return torch.from_numpy(weights).float()

    def _sum(self, images: "_Seen", weights: np.ndarray, grid: Grid | None) -> np.ndarray:
        """The clipped gradients of images added up, float64 [D, num_classes]; in units of the grid, each truncated to it, if there is one."""
        residuals = images.residuals(weights)
        if grid is None:
            return (residuals.T @ images.features).T  # a third faster than the product the other way round
        total = np.zeros_like(weights)
        for first in range(0, len(residuals), _IMAGES_AT_ONCE):
            some = slice(first, first + _IMAGES_AT_ONCE)
            gradients = images.features[some, :, None] * residuals[some, None]
            total += on_grid(gradients, grid).sum(axis=0)
        return total


class _Seen(NamedTuple):
    """Images as every step needs them: features float64 [N, D] and their lengths [N, 1], labels int64 [N]."""

    features: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, features: Tensor, labels: Tensor) -> "_Seen":
        """Of float32 [N, D] and int64 [N]. An image whose features aren't finite has none, so that it adds nothing."""
        exact = features.double().numpy()
        exact = np.where(np.isfinite(exact).all(axis=1, keepdims=True), exact, 0.0)
        return cls(exact, np.linalg.norm(exact, axis=1, keepdims=True), labels.numpy())

    def residuals(self, weights: np.ndarray) -> np.ndarray:
        """The other factor of what images add, float64 [N, num_classes]: the outer product of each with its features has norm at most 1."""
        logits = self.features @ weights
        likelihoods = np.exp(logits - logits.max(axis=1, keepdims=True))
        residuals = likelihoods / likelihoods.sum(axis=1, keepdims=True)
        residuals[np.arange(len(residuals)), self.labels] -= 1
        norms = self.lengths * np.linalg.norm(residuals, axis=1, keepdims=True)
        return residuals / np.maximum(norms, 1.0)
