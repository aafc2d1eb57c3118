"""How the teacher learns from private images: noisy gradient descent on all of them at once, each step a Gaussian mechanism."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
        own = list(batches)
        dimension = own[0][0].shape[1]
        weights, velocity = np.zeros((dimension, self.num_classes)), np.zeros((dimension, self.num_classes))
        grid = Grid.of(self.noise_multiplier, 1.0) if isinstance(rng, SecureStream) else None
        for _ in range(self.steps):
            total = np.zeros_like(weights)
            for features, labels in own:
                total += self._sum(features.double().numpy(), labels.numpy(), weights, grid)
            seen = float(sum(len(labels) for _, labels in own))
            shared = sum_over_processes({"gradient": torch.from_numpy(total), "seen": torch.tensor([seen], dtype=torch.float64)})
            if grid is not None:
                refuse_inexact_sums(int(shared["seen"]))
            gradient = noisy_sum(shared["gradient"].numpy(), self.noise_multiplier, rng, grid) / self.expected_size
            velocity = _MOMENTUM * velocity + gradient
            weights = weights - self.learning_rate * velocity
        return torch.from_numpy(weights).float()

    def _sum(self, features: np.ndarray, labels: np.ndarray, weights: np.ndarray, grid: Grid | None) -> np.ndarray:
        """The clipped gradients of images added up, float64 [D, num_classes]; in units of the grid, each truncated to it, if there is one."""
        features, residuals = self.contributions(features, labels, weights)
        if grid is None:
            return features.T @ residuals
        total = np.zeros_like(weights)
        for first in range(0, len(features), _IMAGES_AT_ONCE):
            some = slice(first, first + _IMAGES_AT_ONCE)
            gradients = features[some, :, None] * residuals[some, None]
            total += on_grid(gradients, grid).sum(axis=0)
        return total

    def contributions(self, features: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What images add, as two factors float64 [N, D] and [N, num_classes] of which each image's outer product has norm at most 1.

        An image whose features aren't finite adds nothing.
        """
        features = np.where(np.isfinite(features).all(axis=1, keepdims=True), features, 0.0)
        logits = features @ weights
        likelihoods = np.exp(logits - logits.max(axis=1, keepdims=True))
        residuals = likelihoods / likelihoods.sum(axis=1, keepdims=True)
        residuals[np.arange(len(labels)), labels] -= 1
        norms = np.linalg.norm(features, axis=1, keepdims=True) * np.linalg.norm(residuals, axis=1, keepdims=True)
        return features, residuals / np.maximum(norms, 1.0)
