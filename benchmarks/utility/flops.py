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
    """FLOPs of one evaluation of the denoiser's network on one image."""
    synthetic: int
    """Rows in the phases before the private one, of programmatic images and of class means: steps x batch size x K."""
    replayed: int
    """Rows of programmatic images beside private steps."""
    private: int
    """Rows of private images, as many as are expected: steps x batch size x K."""
    drawn: int
    """Evaluations of the network on one image that sampling takes."""

    @property
    def training(self) -> int:
        """FLOPs of all phases."""
        return TRAINING_PASSES * self.forward * (self.synthetic + self.replayed + self.private)

    @property
    def sampling(self) -> int:
        """FLOPs of drawing the sample set."""
        return self.forward * self.drawn


def cost_of(config: RunConfig) -> Cost:
    """Count the FLOPs of one evaluation, and the rows that the config asks for. InputError if data.expected_size isn't declared."""
    size = config.data.expected_size
    if size is None:
        raise InputError("data.expected_size: expected a number, since null counts the private images")
    private_steps = config.private_steps(size)
    replayed = private_steps * replay_batch_size(config) if config.stages.replays else 0
    synthetic = config.synthetic.planned_steps(size) * _rows(config.synthetic) if config.uses_synthetic else 0
    return Cost(
        forward=_forward(config),
        synthetic=synthetic + config.central.planned_steps(size) * _rows(config.central),
        replayed=replayed * config.synthetic.noise_multiplicity,
        private=private_steps * _rows(config.private),
        drawn=config.sampling.num_images * _evaluations(config),
    )


def _rows(phase: PhaseConfig) -> int:
    return phase.batch_size * phase.noise_multiplicity


def _evaluations(config: RunConfig) -> int:
    """How often the network is asked to draw one image: where stages.closed_form answers for it, it isn't."""
    sampling = config.sampling
    sigmas = karras_grid(sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)[:-1]
    asked = torch.cat([sigmas, sigmas[1:]]) if sampling.sampler == "heun" else sigmas
    by_network = int((asked.log() <= (config.stages.tau2 if config.stages.closed_form else math.inf)).sum())
    return by_network * (1 if sampling.guidance in (0, 1) else 2)


def _forward(config: RunConfig) -> int:
    network = expert(build_denoiser(config), stages(config)[0].name)  # all are alike
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *config.data.image_shape), torch.full((1,), config.sampling.sigma_min), torch.zeros(1, dtype=torch.int64))
    return int(counter.get_total_flops())


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
