"""The privacy plan: one frozen object that sampling, clipping, noise and accounting all come out of."""

import functools
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError
from dpsyngen.loss import DrawSource
from dpsyngen.privacy import accounting
from dpsyngen.privacy.accounting import GaussianMechanism, Mechanism, SubsampledGaussianMechanism
from dpsyngen.privacy.class_means import ClassMeansMechanism
from dpsyngen.privacy.covariance import CovarianceMechanism
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.randomness import PrivateKey, SecureStream, poisson_sample, secure_poisson_sample
from dpsyngen.privacy.secure_noise import Grid, refuse_inexact_sums, rounded_gaussian
from dpsyngen.privacy.teacher import TeacherMechanism


@dataclass(frozen=True)
class PrivacyPlan:
    """Everything that touches private images, and what it costs.

    Guarantee: the outputs of `class_means`, `covariance` and `teacher`, released once, and of `steps` private steps, each built from `draw_batch`,
    `clip_and_sum` and `privatise`, are together with the mechanisms `before` (epsilon, delta)-DP for adding or removing one image,
    where epsilon is `epsilon_after(steps)` and at most the target that `calibrate` was given. It holds for any network, loss and labels.
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
    covariance: CovarianceMechanism | None = None
    """Released together with the class means."""
    teacher: TeacherMechanism | None = None
    """Likewise."""
    secure_noise: bool = False
    clipping_stability: float | None = None
    """The public constant gamma of automatic clipping; None: clipping at the norm C."""
    start: int = 0
    """At which of the run's private steps the plan begins; the earlier ones were made under other plans."""
    before: tuple[Mechanism, ...] = ()
    """What had touched the private images under other plans of the same run."""

    @classmethod
    def calibrate(cls, config: RunConfig, expected_size: int) -> "PrivacyPlan":
        """The least noise with which all mechanisms together cost at most `privacy.epsilon`, within half a percent. Touches no data.

        The class means get `hints.share`, the teacher `teacher.share` of the budget's mu^2, mu being the Gaussian-DP equivalent of (epsilon, delta).
        InputError where no noise is the least (nobody is drawn with more than delta) or delta is within the accountant's rounding errors.
        """
        return cls.with_noise(config, expected_size, 0.0)._calibrated()

    def continuing(self, before: tuple[Mechanism, ...], start: int, *, has_class_means: bool) -> "PrivacyPlan":
        """This plan for the steps from `start` on alone, its noise calibrated so that `before` and it together stay within the target.

        The class means are not released again where `has_class_means`. Raises InputError as `calibrate` does, and if `before` leaves nothing.
        """
        if start > self.end:
            raise InputError(f"private.steps: expected at least the {start} that are part of the weights already, got {self.end}")
        moments: dict[str, Any] = {"class_means": None, "covariance": None, "teacher": None} if has_class_means else {}
        plan = replace(self, before=before, start=start, steps=self.end - start, noise_multiplier=0.0, **moments)
        spent, most = plan.epsilon_after(0), self.target_epsilon * (1 - accounting.TOLERANCE if plan.steps else 1)
        if spent > most:
            raise InputError(f"privacy.epsilon: expected more than the {spent:.4g} that was spent before at delta = {self.delta:g}, "
                             f"got {self.target_epsilon:g}")  # fmt: skip
        return plan._calibrated()

    def _calibrated(self) -> "PrivacyPlan":
        plan = self
        if plan.steps == 0:
            return plan
        drawn = -math.expm1(plan.steps * math.log1p(-plan.sampling_rate)) if plan.sampling_rate < 1 else 1.0
        if plan.delta >= drawn:
            raise InputError(f"privacy.delta: expected less than {drawn:.3g}, the chance that an image is ever drawn, got {plan.delta:g}")
        start = accounting.estimated_noise(plan.target_epsilon, plan.delta, plan.sampling_rate, plan.steps)
        noise = accounting.smallest_noise(lambda noise: replace(plan, noise_multiplier=noise).epsilon_after(plan.steps), plan.target_epsilon, start)
        return replace(plan, noise_multiplier=noise)

    @classmethod
    def with_noise(cls, config: RunConfig, expected_size: int, noise_multiplier: float) -> "PrivacyPlan":
        """The plan with this noise in DP-SGD, whatever it costs; the class means still get their share of the target."""
        if config.private.batch_size > expected_size:
            raise InputError(f"private.batch_size: expected at most the {expected_size} images of the dataset, got {config.private.batch_size}")
        steps, privacy = config.private_steps(expected_size), config.privacy
        if privacy.delta < accounting.smallest_delta(steps):
            raise InputError(f"privacy.delta: expected at least {accounting.smallest_delta(steps):.3g}, since below that rounding errors of the "
                             f"accounting of {steps} steps matter, got {privacy.delta:g}")  # fmt: skip
        means = covariance = teacher = None
        if config.hints.kind == "class_means":
            mu = accounting.gaussian_mu(privacy.epsilon, privacy.delta)
            means = ClassMeansMechanism.from_config(config, 1 / (mu * config.hints.share**0.5))
            if config.hints.covariance_rank > 0:
                covariance = CovarianceMechanism.from_config(config, expected_size, 1 / (mu * config.hints.covariance_share**0.5))
            if config.teacher.used:
                teacher = TeacherMechanism.from_config(config, expected_size, 1 / (mu * config.teacher.share**0.5))
        return cls(
            target_epsilon=privacy.epsilon, delta=privacy.delta, expected_size=expected_size, batch_size=config.private.batch_size, steps=steps,
            noise_multiplicity=config.private.noise_multiplicity, clipping_norm=privacy.clipping_norm, noise_multiplier=noise_multiplier,
            class_means=means, covariance=covariance, teacher=teacher, secure_noise=privacy.secure_noise,
            clipping_stability=privacy.clipping_stability if privacy.clipping == "automatic" else None,
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """All of the plan but `before`, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "before"}

    @classmethod
    def from_record(cls, record: dict[str, Any], before: tuple[Mechanism, ...]) -> "PrivacyPlan":
        """The plan whose `record` this is; TypeError or LookupError if it is no record. What older records lack has its default."""
        means, covariance, teacher = record["class_means"], record.get("covariance"), record.get("teacher")
        mechanisms = {
            "class_means": None if means is None else ClassMeansMechanism(**means),
            "covariance": None if covariance is None else CovarianceMechanism(**covariance),
            "teacher": None if teacher is None else TeacherMechanism(**teacher),
        }
        return cls(**record | mechanisms | {"before": before})

    @property
    def end(self) -> int:
        """The number of the run's private steps when the plan is carried out."""
        return self.start + self.steps

    @property
    def sampling_rate(self) -> float:
        """q, the probability with which each unit enters a batch."""
        return self.batch_size / self.expected_size

    def mechanisms(self, steps: int, means_releases: int = 1) -> tuple[Mechanism, ...]:
        """All that has touched private images after `steps` charged steps of this plan."""
        sgd = SubsampledGaussianMechanism(self.noise_multiplier, self.sampling_rate, steps, name="DP-SGD")
        if self.class_means is None:
            return (*self.before, sgd)
        round_of_means = GaussianMechanism(self.class_means.noise_multiplier, name="DP class means")
        beside: tuple[Mechanism, ...] = ()
        if self.covariance is not None:
            beside += (GaussianMechanism(self.covariance.noise_multiplier, name="DP covariance"),)
        if self.teacher is not None:
            beside += (GaussianMechanism(self.teacher.noise_multiplier, name="DP teacher", steps=self.teacher.steps),)
        return (*self.before, *(round_of_means,) * (self.class_means.rounds * means_releases), *beside * means_releases, sgd)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - plans live as long as the process
    def epsilon_after(self, steps: int, means_releases: int = 1) -> float:
        """Epsilon at `delta` once the class means and `steps` steps have been spent, and what was before."""
        return accounting.epsilon_of(self.mechanisms(steps, means_releases), self.delta)

    def affordable_steps(self, means_releases: int) -> int:
        """The most charged steps that stay within the target after several releases of the class means; -1 if these alone exceed it."""

        def excess(steps: float) -> float:
            return self.epsilon_after(round(steps), means_releases) - self.target_epsilon

        if excess(self.steps) <= 0:
            return self.steps
        if excess(0) > 0:
            return -1
        last = round(brentq(excess, 0, self.steps, xtol=0.5))
        while excess(last) > 0:
            last -= 1
        while excess(last + 1) <= 0:
            last += 1
        return last

    @property
    def clipping(self) -> Literal["norm", "automatic"]:
        """How contributions are bounded by C, in the words of `privacy.clipping`."""
        return "norm" if self.clipping_stability is None else "automatic"

    @property
    def noise_deviation(self) -> float:
        """The standard deviation of the noise on each entry of the mean gradient; public."""
        return self.noise_multiplier * self.clipping_norm / (self.sampling_rate * self.expected_size)

    @property
    def sum_dtype(self) -> torch.dtype:
        """What clipped gradients are summed in: float64 where their sums are integers that must be exact."""
        return torch.float64 if self.secure_noise else torch.float32

    def draw_batch(self, key: PrivateKey, attempt: int, step: int, population: int) -> np.ndarray:
        """The step's Poisson sample: sorted indices below `population`; each unit independently with probability q."""
        if self.secure_noise:
            refuse_inexact_sums(population)
            return secure_poisson_sample(key.secure_stream("batch", attempt=attempt, step=step), population, self.sampling_rate)
        return poisson_sample(key.substream("batch", attempt=attempt, step=step), population, self.sampling_rate)

    def draw_source(self, key: PrivateKey, attempt: int, step: int, chunk: int) -> DrawSource:
        """What a chunk's sigma, noise and dropped labels are drawn from.

        One more image moves the others to other draws, which is free only because draws are independent and nobody knows them;
        so secure noise needs secure draws.
        """
        stream = key.secure_stream if self.secure_noise else key.substream
        return stream("draws", attempt=attempt, step=step, chunk=chunk)

    def clip_and_sum(self, record: PerExampleGradients, examples: int) -> dict[str, Tensor]:
        """The sum over the first `examples`, all but padding, of their gradients, already averaged over K, each scaled to a norm of at most C.

        Under secure noise the unit is a step of the noise's grid.
        """
        if self.secure_noise:
            return record.truncated_sum(self.clipping_norm, self._grid.step, examples, self.clipping_stability)
        return record.clipped_sum(self.clipping_norm, self.clipping_stability)

    def privatise(self, total: dict[str, Tensor], key: PrivateKey, attempt: int, step: int) -> dict[str, Tensor]:
        """The noisy mean gradient from the sum over the whole logical batch, float32: noise once, then a fixed divisor.

        `total` is the sum over all processes, of `sum_dtype`; every process that calls this gets the same noise.
        """
        if self.secure_noise:
            return self._privatise_exactly(total, key.secure_stream("gradient_noise", attempt=attempt, step=step))
        rng = key.substream("gradient_noise", attempt=attempt, step=step)
        scale = self.noise_multiplier * self.clipping_norm
        noisy = {}
        for name in sorted(total):
            noise = torch.from_numpy(rng.standard_normal(total[name].shape, dtype=np.float32)).to(total[name].device)
            noisy[name] = (total[name] + scale * noise) / (self.sampling_rate * self.expected_size)
        return noisy

    def _privatise_exactly(self, total: dict[str, Tensor], stream: SecureStream) -> dict[str, Tensor]:
        grid, noisy, names = self._grid, {}, sorted(total)
        sizes = [total[name].numel() for name in names]
        noise = rounded_gaussian(stream, sum(sizes), grid.exponent).split(sizes)
        for name, part in zip(names, noise, strict=True):
            if total[name].dtype != torch.float64:
                raise TypeError(f"{name}: expected a sum of integers in float64, got {total[name].dtype}")
            units = total[name] + part.view(total[name].shape).to(total[name].device)
            noisy[name] = (units * (grid.step / (self.sampling_rate * self.expected_size))).float()
        return noisy

    @property
    def _grid(self) -> Grid:
        return Grid.of(self.noise_multiplier, self.clipping_norm)
