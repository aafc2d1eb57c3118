"""How many floating-point operations a run takes.

    python -m benchmarks.utility.flops --config configs/mnist/dp_syngen.yaml [--config OVERLAY] [--private.steps 400 ...] [--rate 50]

Those of one evaluation of the denoiser on one image are counted by torch, a multiplication and an addition being two. A row of training
(image x draw) takes three times as many: one forward pass, two backward. What per-example gradients, norms, noise, Adam and
programmatic images take beside that isn't counted.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from dpsyngen.cli import ScriptParser, read_config, run_script
from dpsyngen.config import PhaseConfig, RunConfig
from dpsyngen.denoiser import build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.launcher import settled
from dpsyngen.noise_levels import karras_grid, stages
from dpsyngen.phases import expert, replay_batch_size

TRAINING_PASSES = 3
"""Forward, the gradient of the activations, the gradient of the weights."""


@dataclass(frozen=True)
class Cost:
    """What a run computes. Rows are noisy images that the denoiser is trained on."""

    forward: int
    """FLOPs of one evaluation of the denoiser's network on one image, of the largest where stages have networks for several resolutions."""
    synthetic: int
    """Rows in the phases before the private one, of programmatic images and of class means: steps x batch size x K."""
    replayed: int
    """Rows of programmatic images beside private steps."""
    private: int
    """Rows of private images, as many as are expected: steps x batch size x K."""
    drawn: int
    """Evaluations of the network on one image that sampling takes."""
    training: int
    """FLOPs of both phases."""
    sampling: int
    """FLOPs of drawing the sample set."""


def cost_of(config: RunConfig) -> Cost:
    """Count the FLOPs of one evaluation, and the rows that the config asks for. InputError if data.expected_size isn't declared."""
    size = config.data.expected_size
    if size is None:
        raise InputError("data.expected_size: expected a number, since null counts the private images")
    private_steps = config.private_steps(size)
    replayed = private_steps * replay_batch_size(config) if config.stages.replays else 0
    synthetic = config.synthetic.planned_steps(size) * _rows(config.synthetic) if config.uses_synthetic else 0
    central = config.central.planned_steps(size) * _rows(config.central)
    replayed, private = replayed * config.synthetic.noise_multiplicity, private_steps * _rows(config.private)
    forward = _forwards(config)
    public, taught = (_on_average(forward, config, is_public) for is_public in (True, False))
    asked = [config.sampling.num_images * evaluations for evaluations in _evaluations(config)]
    return Cost(
        forward=max(forward.values()), synthetic=synthetic + central, replayed=replayed, private=private, drawn=sum(asked),
        training=round(TRAINING_PASSES * (public * (synthetic + replayed) + taught * (central + private))),
        sampling=sum(forward[stage.downsampling] * count for stage, count in zip(config.stages.stages, asked, strict=True)),
    )  # fmt: skip


def _rows(phase: PhaseConfig) -> int:
    return phase.batch_size * phase.noise_multiplicity


def _on_average(forward: dict[int, int], config: RunConfig, public: bool) -> Fraction:
    """FLOPs of an evaluation for a row of the synthetic phase, or of the private one: 0 where it has no stages."""
    phase = [stage for stage in stages(config) if (stage.source == "synthetic") == public]
    weights = [Fraction(stage.weight) for stage in phase]
    return sum((weight * forward[stage.downsampling] for weight, stage in zip(weights, phase, strict=True)), Fraction()) / (sum(weights) or 1)


def _evaluations(config: RunConfig) -> list[int]:
    """How often the network of each stage is asked to draw one image, all in the first place where they have one network.

    Where stages.closed_form answers for a network, it isn't asked.
    """
    sampling = config.sampling
    sigmas = karras_grid(sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)[:-1]
    asked = torch.cat([sigmas, sigmas[1:]]) if sampling.sampler == "heun" else sigmas
    levels = asked.log()
    levels = levels[levels <= (config.stages.tau2 if config.stages.closed_form else math.inf)]
    calls = 1 if sampling.guidance in (0, 1) else 2
    ranges = [stage.range for stage in config.stages.stages]
    if config.stages.holder == "shared":
        ranges = [(-math.inf, math.inf)] + [(0.0, 0.0)] * (len(ranges) - 1)
    return [calls * int(((levels >= lower) & (levels < upper)).sum()) for lower, upper in ranges]


def _forwards(config: RunConfig) -> dict[int, int]:
    """FLOPs of one evaluation by the network's downsampling; networks of one resolution are alike."""
    denoiser, counted = build_denoiser(config), {}
    for factor, name in {stage.downsampling: stage.name for stage in config.stages.stages}.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            levels, labels = torch.full((1,), config.sampling.sigma_min), torch.zeros(1, dtype=torch.int64)
            expert(denoiser, name)(torch.zeros(1, *config.data.image_shape), levels, labels)
        counted[factor] = int(counter.get_total_flops())
    return counted


def main(argv: list[str]) -> None:
    """Print what a config costs."""
    parser = ScriptParser("Count the floating-point operations of a run.")
    parser.prog = "python -m benchmarks.utility.flops"
    parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", help="a YAML file; later ones override earlier ones")
    parser.add_argument("--rate", type=_rate, metavar="FLOAT", help="TFLOP/s that the machine is assumed to reach; gives a time")
    options, overrides = parser.parse(argv)
    cost = cost_of(settled(read_config(options.config, overrides)))
    print(f"denoiser   {cost.forward / 1e6:,.1f} MFLOP an image")
    print(f"training   {cost.training / 1e15:,.3f} PFLOP: rows {cost.synthetic:,} synthetic, {cost.replayed:,} replayed, {cost.private:,} private")
    print(f"sampling   {cost.sampling / 1e15:,.3f} PFLOP: {cost.drawn:,} evaluations")
    if options.rate is not None:
        print(f"at {options.rate:g} TFLOP/s: training {cost.training / options.rate / 6e13:,.1f} minutes, "
              f"sampling {cost.sampling / options.rate / 6e13:,.1f} minutes")  # fmt: skip


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return rate


if __name__ == "__main__":
    sys.argv[0] = "python -m benchmarks.utility.flops"  # what complaints begin with
    run_script(main)
