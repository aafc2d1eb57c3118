"""Noise levels: the stages on ln sigma with their draws of sigma, their turns, and the grid that samplers walk down."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpsyngen.config import PhaseConfig, RunConfig, Source, StageConfig
from dpsyngen.errors import InputError
from dpsyngen.sigma_draws import Mixture, PiecewiseLinear, SigmaDraw, TruncatedNormal, Uniform, sigma_of


@dataclass(frozen=True)
class Stage:
    """A range of the noise level, the images that teach it, and how sigma is drawn inside it.

    `lower` and `upper` bound ln sigma and may be infinite; `weight` is its share of the draws of its phase, relative to the phase's other
    stages; `family` and `options` are those of its programmatic images, none for private ones; `replay` and `downsampling` are those of
    `StageConfig`.
    """

    name: str
    lower: float
    upper: float
    source: Source
    sigma_draw: SigmaDraw
    weight: float = 1.0
    family: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    replay: float = 1.0
    downsampling: int = 1


def stages(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run, in the order of `StagesConfig.stages`; InputError, naming the field, where sigma can't be drawn inside one.

    One that is pretrained is there twice under its name, first as a synthetic stage.
    """
    return tuple(
        _stage(settings, source, config, "synthetic" if source == "synthetic" else "private")
        for settings in config.stages.stages
        for source in settings.sources
    )


def stages_of(config: RunConfig, *sources: Source) -> tuple[Stage, ...]:
    """Those of some sources."""
    return tuple(stage for stage in stages(config) if stage.source in sources)


def central_stages(config: RunConfig) -> tuple[Stage, ...]:
    """The private stages as the central phase teaches them: sigma is drawn inside their ranges by the settings of `central`; errors as `stages`."""
    learnt = [settings for settings in config.stages.stages if settings.source != "synthetic"]
    return tuple(_stage(replace(one, sigma_draw=None, p_mean=None, p_std=None, sigma_weights=None), one.source, config, "central") for one in learnt)


def mixture(parts: Sequence[Stage]) -> SigmaDraw:
    """The draw of one network that learns several stages: the mixture of theirs by weight."""
    if len(parts) == 1:
        return parts[0].sigma_draw
    return Mixture(tuple(stage.sigma_draw for stage in parts), tuple(stage.weight for stage in parts))


def turns(weights: Sequence[float], numbers: np.ndarray) -> np.ndarray:
    """Whose each number of the endless sequence 0, 1, 2, ... is, as an index into the weights: int64, as int64 `numbers`.

    The first has the numbers at which a line of slope w_1 / (w_1 + w_2 + ...) reaches another integer (Bresenham), the second its share of
    the others in the same way, and so on. So any run of numbers is divided in proportion to the weights, up to about one each.
    """
    owner, left = np.full(numbers.shape, len(weights) - 1), numbers.astype(np.float64)
    for index in range(len(weights) - 1):
        share = weights[index] / sum(weights[index:])
        before = np.ceil(left * share)
        owner[(owner == len(weights) - 1) & (np.ceil((left + 1) * share) > before)] = index
        left -= before
    return owner


def _stage(settings: StageConfig, source: Source, config: RunConfig, section: str) -> Stage:
    low, high = settings.range
    drawn = _sigma_draw(settings, config, section)
    if source != "synthetic":
        return Stage(settings.name, low, high, source, drawn, settings.weight, downsampling=settings.downsampling)
    own = settings.family is not None
    family, options = (settings.family or "", settings.options) if own else (config.synthetic.family, config.synthetic.options)
    return Stage(settings.name, low, high, source, drawn, settings.weight, family, options, settings.replay, settings.downsampling)


def _sigma_draw(settings: StageConfig, config: RunConfig, section: str) -> SigmaDraw:
    """The draw of a stage by its own settings or else those of its phase, a section of the config; InputError if there is none."""
    phase: PhaseConfig = getattr(config, section)
    kind = settings.sigma_draw or phase.sigma_draw
    low, high = settings.range
    drawn: SigmaDraw
    try:
        if kind == "uniform":
            ends = math.log(config.sampling.sigma_min), math.log(config.sampling.sigma_max)
            drawn = Uniform(ends[0] if settings.lower is None else low, ends[1] if settings.upper is None else high)
        elif kind == "weights":
            drawn = PiecewiseLinear(phase.sigma_weights if settings.sigma_weights is None else settings.sigma_weights, low, high)
        else:
            mean, std = (getattr(phase if own is None else settings, name) for name, own in (("p_mean", settings.p_mean), ("p_std", settings.p_std)))
            drawn = TruncatedNormal(low, high, mean, std)
        middle = float(sigma_of(drawn, np.array([0.5])))
        if not 0 < middle < math.inf:
            raise ValueError(f"expected noise levels that float32 can hold, got ln sigma in [{low:g}, {high:g}]")
    except ValueError as error:
        custom = config.stages.variant == "custom" and section != "central"
        name = f"stages.custom: stage {settings.name}: sigma_draw" if custom else f"{section}.sigma_draw"
        raise InputError(f"{name}: {error} in stage {settings.name}, drawn by {kind}") from error
    return drawn


def karras_grid(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Noise levels from sigma_max down to sigma_min, then 0: float64 [steps + 1] (Karras et al., equation 5)."""
    if steps == 1:
        return torch.tensor([sigma_max, 0.0], dtype=torch.float64)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])
