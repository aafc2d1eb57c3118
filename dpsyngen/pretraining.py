"""What a synthetic phase taught, kept for other runs: it costs no privacy and follows from public settings alone, so runs may share it."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

from torch import nn

from dpsyngen.checkpoint import Checkpoint, load_newest, save_checkpoint
from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig
from dpsyngen.noise_levels import stages_of
from dpsyngen.privacy.journal import code_digest


def take_up(config: RunConfig, denoiser: nn.Module, compute: Compute) -> bool:
    """Give the denoiser the weights that an equal synthetic phase has left in `synthetic.cache`; whether there were any.

    Raises InputError if they are there and damaged.
    """
    if config.synthetic.cache is None:
        return False
    place = Path(config.synthetic.cache) / _name(config, compute)
    found = load_newest(place, quiet=not compute.is_main)
    if found is None:
        return False
    parameters = dict(denoiser.named_parameters())
    for name, tensor in found.tensors.items():
        parameters[name].data.copy_(tensor)
    if compute.is_main:
        sys.stderr.write(f"synthetic phase: taken from {place}\n")
    return True


def keep(config: RunConfig, denoiser: nn.Module, compute: Compute) -> None:
    """Leave the weights after the synthetic phase in `synthetic.cache`, if there is one. Raises InputError if it can't be written."""
    if config.synthetic.cache is not None and compute.is_main:
        weights = {name: parameter.data for name, parameter in denoiser.named_parameters()}
        save_checkpoint(Path(config.synthetic.cache) / _name(config, compute), 0, Checkpoint(weights, {"run": config.name}), keep=1)


def _name(config: RunConfig, compute: Compute) -> str:
    """A name that follows from all that decides the weights: settings and code; hints have settings of programmatic images as well."""
    hints = {name: value for name, value in vars(config.hints).items() if name in ("kind", "centre") or name.startswith("synthetic_")}
    data = config.data.image_shape, config.data.num_classes
    networks = [(stage.name, stage.downsampling) for stage in config.stages.stages] if config.stages.holder == "routed" else []
    arithmetic = config.compute.precision, config.compute.chunk_size, compute.device.type
    parts = (config.seed, *data, config.network, networks, stages_of(config, "synthetic"), hints,
             replace(config.synthetic, cache=None), *arithmetic, code_digest())  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
