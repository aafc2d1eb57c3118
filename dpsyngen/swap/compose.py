"""Which stages are swapped, and the denoiser that comes of it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpsyngen.config import RunConfig, StageConfig
from dpsyngen.denoiser import RoutedDenoiser
from dpsyngen.errors import InputError

_NONE = "none"
_MOST_STAGES = 6


@dataclass(frozen=True)
class Swap:
    """A choice of the stages, from the lowest noise to the highest, that come from the second run."""

    stages: tuple[str, ...]

    @property
    def name(self) -> str:
        """"none", or the names of these stages with plus signs between them; also the name of a directory."""
        return "+".join(self.stages) or _NONE


def stages_by_noise(config: RunConfig) -> tuple[StageConfig, ...]:
    """The stages from the lowest noise to the highest."""
    return tuple(sorted(config.stages.stages, key=lambda stage: stage.range))


def expect_alike(first: RunConfig, second: RunConfig, paths: tuple[Path, Path]) -> None:
    """Raise InputError, naming the field, unless both runs have a network for each of the same stages, and images of one kind."""
    for config, path in zip((first, second), paths, strict=True):
        if config.stages.holder != "routed":
            raise InputError(f"{path}: stages.holder: expected routed, a network for each stage, got {config.stages.holder}")
    for field in ("image_size", "channels", "num_classes"):
        expected, found = getattr(first.data, field), getattr(second.data, field)
        if expected != found:
            raise InputError(f"{paths[1]}: data.{field}: expected {expected} as in {paths[0]}, got {found}")
    expected, found = (_boundaries(config) for config in (first, second))
    if expected != found:
        raise InputError(f"{paths[1]}: stages: expected boundaries at ln sigma = {expected} as in {paths[0]}, got {found}")
    names = [stage.name for stage in stages_by_noise(first)]
    if _NONE in names:
        raise InputError(f"{paths[0]}: stages.custom: expected stages of other names, since {_NONE} stands for no stage")


def choices(config: RunConfig, text: str | None) -> list[Swap]:
    """The swaps that `--swaps TEXT` names, or without a text every choice of stages; those of fewer stages first.

    Raises InputError for what names no stages, and where there are too many to take every choice.
    """
    names = [stage.name for stage in stages_by_noise(config)]
    if text is None:
        if len(names) > _MOST_STAGES:
            raise InputError(f"--swaps: expected a choice, since {len(names)} stages can be swapped in {2 ** len(names)} ways")
        return [Swap(chosen) for count in range(len(names) + 1) for chosen in itertools.combinations(names, count)]
    chosen = {_parse(part.strip(), names) for part in text.split(",")}
    return sorted(chosen, key=lambda swap: (len(swap.stages), [names.index(name) for name in swap.stages]))


def compose(first: RoutedDenoiser, second: RoutedDenoiser, swap: Swap) -> RoutedDenoiser:
    """The first denoiser with the second one's networks in the stages of the swap; the networks themselves are shared.

    Both must route at the same boundaries (`expect_alike`). Stages have the first one's names.
    """
    pairs = zip(*(sorted(denoiser.stages, key=lambda stage: stage.range) for denoiser in (first, second)), strict=True)
    experts = [second.expert(theirs.name) if own.name in swap.stages else first.expert(own.name) for own, theirs in pairs]
    return RoutedDenoiser(sorted(first.stages, key=lambda stage: stage.range), experts)


def _parse(text: str, names: Sequence[str]) -> Swap:
    parts = [] if text == _NONE else [part.strip() for part in text.split("+")]
    if not set(parts) <= set(names):
        raise InputError(f"--swaps: expected {_NONE} or stages with + between them ({', '.join(names)}), separated by commas, got {text!r}")
    return Swap(tuple(name for name in names if name in parts))


def _boundaries(config: RunConfig) -> str:
    bounds = [f"{stage.range[1]:g}" for stage in stages_by_noise(config)[:-1]]
    return ", ".join(bounds) or "none"
