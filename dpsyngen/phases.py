"""The phases of a run, as data: which step is injected into the loop, for how many steps, with which optimiser settings."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dpsyngen.compute import Compute
from dpsyngen.config import PhaseConfig, RunConfig
from dpsyngen.data import Dataset
from dpsyngen.denoiser import Denoiser, RoutedDenoiser
from dpsyngen.errors import InputError
from dpsyngen.noise_levels import central_stages, mixture, stages_of
from dpsyngen.optimiser import NoiseCorrectedAdam, NoiseCorrection
from dpsyngen.ordinary_step import Lesson, OrdinaryStep, central_batches, nonprivate_batches, synthetic_batches
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.private_step import PrivateStep, PrivateStepsInTurn
from dpsyngen.replay import ReplayStep


@dataclass(frozen=True)
class Phase:
    """One part of a run. `gradient(step)` fills `.grad` of `trained` and returns what may be logged."""

    name: Literal["synthetic", "central", "private"]
    settings: PhaseConfig
    steps: int
    gradient: Callable[[int], dict[str, float]]
    trained: nn.Module
    correction: NoiseCorrection | None = None
    """The noise that Adam takes out of its second moment; None for plain Adam."""

    def optimizer(self) -> torch.optim.Optimizer:
        """What takes the gradients, at the peak learning rate."""
        settings, betas = self.settings, (self.settings.beta1, self.settings.beta2)
        if self.correction is None:
            return torch.optim.Adam(self.trained.parameters(), lr=settings.learning_rate, betas=betas)
        return NoiseCorrectedAdam(self.trained.parameters(), settings.learning_rate, betas, self.correction)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, constant, linear or cosine decay to zero; the fractions are of the planned steps."""
        settings = self.settings
        rise = min(1.0, (step + 1) / max(1.0, settings.warmup * self.steps))
        fall = max(0.0, min(1.0, (self.steps - step) / max(1.0, settings.decay * self.steps)))
        if settings.decay_shape == "cosine":
            fall = (1 - math.cos(math.pi * fall)) / 2
        return settings.learning_rate * min(rise, fall)


def expert(denoiser: Denoiser | RoutedDenoiser, name: str) -> Denoiser:
    """The network that learns the stage of that name."""
    return denoiser.expert(name) if isinstance(denoiser, RoutedDenoiser) else denoiser


def synthetic_phase(config: RunConfig, denoiser: Denoiser | RoutedDenoiser, compute: Compute) -> Phase | None:
    """Ordinary training of the synthetic stages on programmatic images; None for variants without one."""
    taught = stages_of(config, "synthetic")
    if not taught:
        return None
    settings = config.synthetic
    lessons = tuple(Lesson(stage, expert(denoiser, stage.name), synthetic_batches(config, stage)) for stage in taught)
    step = OrdinaryStep(lessons, settings.batch_size, settings, config, compute, public=True)
    return Phase("synthetic", settings, _steps(config, "synthetic"), step, nn.ModuleList(step.networks()))


def central_phase(config: RunConfig, denoiser: Denoiser | RoutedDenoiser, compute: Compute) -> Phase | None:
    """Ordinary training of the private stages on the hints that the denoiser has when it begins; None where the config has no such phase.

    Its draws go on in the public sequence where the synthetic phase's end.
    """
    if not config.uses_central:
        return None
    settings = config.central
    learners = [(stage, expert(denoiser, stage.name)) for stage in central_stages(config)]
    lessons = tuple(Lesson(stage, learner, central_batches(config, learner)) for stage, learner in learners)
    before = _steps(config, "synthetic") if config.uses_synthetic else 0
    step = OrdinaryStep(lessons, settings.batch_size, settings, config, compute, public=True, before=before)
    return Phase("central", settings, _steps(config, "central"), step, nn.ModuleList(step.networks()))


def private_phase(
    config: RunConfig,
    denoiser: Denoiser | RoutedDenoiser,
    dataset: Dataset,
    plan: PrivacyPlan | None,
    ledger: Ledger,
    compute: Compute,
) -> Phase:
    """DP-SGD on the private stages, or ordinary training on private images where the plan is None; without such stages no steps.

    One network learns the mixture of its stages; several networks take turns. With `stages.replay` each step replays programmatic images.
    """
    taught = stages_of(config, "private", "nonprivate")
    if not taught:
        return Phase("private", config.private, 0, lambda step: {}, denoiser)
    step: Callable[[int], dict[str, float]]
    if plan is None:
        learners = [expert(denoiser, stage.name) for stage in taught]
        lessons = tuple(Lesson(stage, learner, nonprivate_batches(dataset, learner)) for stage, learner in zip(taught, learners, strict=True))
        step = OrdinaryStep(lessons, config.private.batch_size, config.private, config, compute, public=False)
        steps, networks = config.private_steps(config.data.expected_size or len(dataset)), step.networks()
    else:
        groups = [(stage,) for stage in taught] if isinstance(denoiser, RoutedDenoiser) else [taught]
        networks, steps = [expert(denoiser, group[0].name) for group in groups], plan.end
        in_turn = tuple(
            PrivateStep(network, mixture(group), dataset, plan, ledger.key, ledger.journal, config, compute)
            for network, group in zip(networks, groups, strict=True)
        )
        step = in_turn[0] if len(in_turn) == 1 else PrivateStepsInTurn(in_turn, tuple(stage.weight for stage in taught))
    if config.stages.replays:
        step = ReplayStep(step, replayed(config, networks[0], compute), networks[0], config.stages.replay, config.privacy.clipping_norm)
    correction = None if plan is None or not config.private.noise_correction else NoiseCorrection(plan.noise_deviation, config.private.noise_floor)
    return Phase("private", config.private, steps, step, nn.ModuleList(networks), correction)


def replayed(config: RunConfig, denoiser: Denoiser, compute: Compute) -> OrdinaryStep:
    """The synthetic stages as private steps replay them: the public sequences go on where the phases before end."""
    settings, steps = config.synthetic, _steps(config, "synthetic")
    lessons = tuple(
        Lesson(stage, denoiser, synthetic_batches(config, stage), stage.replay) for stage in stages_of(config, "synthetic") if stage.replay > 0
    )
    return OrdinaryStep(
        lessons, replay_batch_size(config), settings, config, compute, public=True,
        before=steps + _steps(config, "central"), images_before=steps * settings.batch_size,
    )  # fmt: skip


def replay_batch_size(config: RunConfig) -> int:
    """Programmatic images that a private step replays."""
    return config.stages.replay_batch_size or config.synthetic.batch_size


def _steps(config: RunConfig, section: Literal["synthetic", "central"]) -> int:
    settings: PhaseConfig = getattr(config, section)
    if settings.steps is None and config.data.expected_size is None:
        raise InputError(f"{section}.epochs: expected {section}.steps instead, since data.expected_size is null")
    return settings.planned_steps(config.data.expected_size or 0)
