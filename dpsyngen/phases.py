"""The phases of a run, as data: which step is injected into the loop, for how many steps, with which optimiser settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dpsyngen.compute import Compute
from dpsyngen.config import PhaseConfig, RunConfig
from dpsyngen.data import Dataset
from dpsyngen.denoiser import Denoiser, RoutedDenoiser
from dpsyngen.errors import InputError
from dpsyngen.noise_levels import Stage, private_stage, stages
from dpsyngen.ordinary_step import OrdinaryStep, nonprivate_batches, synthetic_batches
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.private_step import PrivateStep


@dataclass(frozen=True)
class Phase:
    """One part of a run. `gradient(step)` fills `.grad` of `trained` and returns what may be logged."""

    name: Literal["synthetic", "private"]
    settings: PhaseConfig
    steps: int
    gradient: Callable[[int], dict[str, float]]
    trained: nn.Module

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, constant, linear decay to zero; the fractions are of the planned steps."""
        settings = self.settings
        rise = min(1.0, (step + 1) / max(1.0, settings.warmup * self.steps))
        fall = min(1.0, (self.steps - step) / max(1.0, settings.decay * self.steps))
        return settings.learning_rate * min(rise, max(fall, 0.0))


def expert(denoiser: Denoiser | RoutedDenoiser, stage: Stage) -> Denoiser:
    """The network that learns a stage."""
    return denoiser.expert(stage) if isinstance(denoiser, RoutedDenoiser) else denoiser


def synthetic_phase(config: RunConfig, denoiser: Denoiser | RoutedDenoiser, compute: Compute) -> Phase | None:
    """Ordinary training of the synthetic stages on programmatic images; None for variants without one."""
    experts = tuple((stage, expert(denoiser, stage)) for stage in stages(config.stages) if stage.source == "synthetic")
    if not experts:
        return None
    settings = config.synthetic
    if settings.steps is None and config.data.expected_size is None:
        raise InputError("synthetic.epochs: expected synthetic.steps instead, since data.expected_size is null")
    steps = settings.planned_steps(config.data.expected_size or 0)
    step = OrdinaryStep(experts, synthetic_batches(config), settings, config, compute, public=True)
    return Phase("synthetic", settings, steps, step, nn.ModuleList({id(e): e for _, e in experts}.values()))


def private_phase(
    config: RunConfig,
    denoiser: Denoiser | RoutedDenoiser,
    dataset: Dataset,
    plan: PrivacyPlan | None,
    ledger: Ledger,
    compute: Compute,
) -> Phase:
    """DP-SGD on the private stage, or ordinary training on private images where the plan is None."""
    stage = private_stage(config.stages)
    network = expert(denoiser, stage)
    step: Callable[[int], dict[str, float]]
    if plan is None:
        step = OrdinaryStep(((stage, network),), nonprivate_batches(dataset), config.private, config, compute, public=False)
        steps = config.private.planned_steps(config.data.expected_size or len(dataset))
    else:
        step = PrivateStep(network, stage, dataset, plan, ledger.key, ledger.journal, config, compute)
        steps = plan.end
    return Phase("private", config.private, steps, step, network)
