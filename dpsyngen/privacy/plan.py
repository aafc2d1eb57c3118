"""The privacy plan: one frozen object that sampling, clipping, noise and accounting all come out of."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError
from dpsyngen.privacy import accounting
from dpsyngen.privacy.accounting import GaussianMechanism, Mechanism, SubsampledGaussianMechanism
from dpsyngen.privacy.class_means import ClassMeansMechanism
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.randomness import PrivateKey, poisson_sample


@dataclass(frozen=True)
class PrivacyPlan:
    """Everything that touches private images, and what it costs.

    Guarantee: the outputs of `class_means`, released once, and of `steps` private steps, each built from `draw_batch`,
    `clip_and_sum` and `privatise`, are together (epsilon, delta)-DP for adding or removing one image, where epsilon is
    `epsilon_after(steps)` and at most the target that `calibrate` was given. It holds for any network, loss and labels.
    """

    target_epsilon: float
    delta: float
    expected_size: int
    batch_size: int
    steps: int
    noise_multiplicity: int
    clipping_norm: float
    noise_multiplier: float
    class_means: ClassMeansMechanism | None

    @classmethod
    def calibrate(cls, config: RunConfig, expected_size: int) -> "PrivacyPlan":
        """The least noise with which all mechanisms together cost at most `privacy.epsilon`. Touches no data.

        The class means get `hints.share` of the budget's mu^2, mu being the Gaussian-DP equivalent of (epsilon, delta).
        """
        if config.private.batch_size > expected_size:
            raise InputError(f"private.batch_size: expected at most the {expected_size} images of the dataset, got {config.private.batch_size}")
        steps, privacy = config.private.planned_steps(expected_size), config.privacy
        means, fixed = None, ()
        if config.hints.kind == "class_means":
            mu = accounting.gaussian_mu(privacy.epsilon, privacy.delta) * config.hints.share**0.5
            means = ClassMeansMechanism.from_config(config, 1 / mu)
            fixed = (GaussianMechanism(1 / mu),)
        rate, interval = config.private.batch_size / expected_size, _interval(privacy.epsilon)

        def epsilon(noise_multiplier: float) -> float:
            return accounting.epsilon_of((*fixed, SubsampledGaussianMechanism(noise_multiplier, rate, steps)), privacy.delta, interval)

        noise = accounting.smallest_noise(epsilon, privacy.epsilon, start=0.5 + rate * steps**0.5 / privacy.epsilon) if steps else 0.0
        return cls(
            target_epsilon=privacy.epsilon, delta=privacy.delta, expected_size=expected_size, batch_size=config.private.batch_size, steps=steps,
            noise_multiplicity=config.private.noise_multiplicity, clipping_norm=privacy.clipping_norm, noise_multiplier=noise, class_means=means,
        )  # fmt: skip

    @property
    def sampling_rate(self) -> float:
        """q, the probability with which each unit enters a batch."""
        return self.batch_size / self.expected_size

    def mechanisms(self, steps: int, means_releases: int = 1) -> tuple[Mechanism, ...]:
        """All that has touched private images after `steps` charged steps."""
        released = () if self.class_means is None else (GaussianMechanism(self.class_means.noise_multiplier),) * means_releases
        return (*released, SubsampledGaussianMechanism(self.noise_multiplier, self.sampling_rate, steps))

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - plans live as long as the process
    def epsilon_after(self, steps: int, means_releases: int = 1) -> float:
        """Epsilon at `delta` once the class means and `steps` steps have been spent."""
        return accounting.epsilon_of(self.mechanisms(steps, means_releases), self.delta, _interval(self.target_epsilon))

    def affordable_steps(self, means_releases: int) -> int:
        """The most charged steps that stay within the target after several releases of the class means; -1 if these alone exceed it."""
        low, high = -1, self.steps
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.epsilon_after(middle, means_releases) <= self.target_epsilon else (low, middle - 1)
        return low

    def draw_batch(self, key: PrivateKey, attempt: int, step: int, population: int) -> np.ndarray:
        """The step's Poisson sample: sorted indices below `population`; each unit independently with probability q."""
        return poisson_sample(key.substream("batch", attempt=attempt, step=step), population, self.sampling_rate)

    def clip_and_sum(self, record: PerExampleGradients) -> dict[str, Tensor]:
        """The sum over examples of their gradients, already averaged over K, each clipped to C."""
        return record.clipped_sum(self.clipping_norm)

    def privatise(self, total: dict[str, Tensor], key: PrivateKey, attempt: int, step: int) -> dict[str, Tensor]:
        """The noisy mean gradient from the sum over the whole logical batch: noise once, then a fixed divisor.

        `total` float32, the sum over all processes; every process that calls this gets the same noise.
        """
        rng = key.substream("gradient_noise", attempt=attempt, step=step)
        scale = self.noise_multiplier * self.clipping_norm
        noisy = {}
        for name in sorted(total):
            noise = torch.from_numpy(rng.standard_normal(total[name].shape, dtype=np.float32)).to(total[name].device)
            noisy[name] = (total[name] + scale * noise) / (self.sampling_rate * self.expected_size)
        return noisy


def _interval(epsilon: float) -> float:
    """The privacy loss's discretisation: fine enough to add less than a thousandth to epsilon, coarse enough to calibrate in seconds."""
    return min(1e-3, 4e-4 * epsilon)
