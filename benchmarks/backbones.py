"""Training images per second of the lean backbone and of diffusers' UNet2DModel with nearly as many parameters, on this CPU.

    python benchmarks/backbones.py [--repeats 5] [--batch 128]

A training image is one row: forward, backward and its share of an Adam step, without per-example gradients. The two networks of
a pair get the same rows and take turns, so that whatever else the machine does meets both alike; the ratio is the median of
the ratios of neighbouring turns. Threads are torch's default.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from dpsyngen.cli import OneLineParser, run_script
from dpsyngen.compute import Compute
from dpsyngen.config import ComputeConfig, HintsConfig, NetworkConfig, RunConfig, StagesConfig
from dpsyngen.denoiser import Denoiser, build_denoiser
from dpsyngen.loss import Draws, denoising_loss, draw
from dpsyngen.noise_levels import stages


@dataclass(frozen=True)
class Pair:
    """Two networks of about one size; widths come in eights, so two lean ones bracket the U-Net that DPDM uses."""

    name: str
    lean: NetworkConfig
    unet: NetworkConfig


PAIRS = (
    Pair("just under DPDM's size", NetworkConfig("lean", width=80, depth=1), NetworkConfig("unet", width=32, depth=2)),
    Pair("just over DPDM's size", NetworkConfig("lean", width=88, depth=1), NetworkConfig("unet", width=32, depth=2)),
    Pair("a third of it", NetworkConfig("lean", width=48, depth=1), NetworkConfig("unet", width=16, depth=3)),
)
PRECISIONS: tuple[Literal["float32", "bf16"], ...] = ("float32", "bf16")


def config_of(network: NetworkConfig, precision: Literal["float32", "bf16"]) -> RunConfig:
    """A run on 28 x 28 grayscale images of ten classes, over the whole range of noise levels."""
    return RunConfig(
        network=network,
        stages=StagesConfig(variant="nonprivate"),
        hints=HintsConfig(kind="none"),
        compute=ComputeConfig(precision=precision, device="cpu"),
    )


def build(network: NetworkConfig) -> Denoiser:
    """The network in its preconditioning, freshly initialised."""
    denoiser = build_denoiser(config_of(network, "float32"))
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"expected one network, got {type(denoiser).__name__}")
    return denoiser


def rows(batch: int) -> tuple[Tensor, Draws]:
    """Random images float32 [batch, 1, 28, 28] in [-1, 1] and their draws: speed doesn't depend on what they show."""
    rng, config = np.random.default_rng(0), RunConfig()
    images = torch.from_numpy(rng.uniform(-1, 1, (batch, *config.data.image_shape)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(config.data.num_classes, size=batch))
    (stage,) = stages(RunConfig(stages=StagesConfig(variant="nonprivate")))
    draws = draw(rng, stage.sigma_draw, labels, config.data.image_shape, label_dropout=0.1, null_label=config.data.num_classes)
    return images, draws


def stepper(network: NetworkConfig, precision: Literal["float32", "bf16"], images: Tensor, draws: Draws) -> Callable[[], None]:
    """One training step on the same rows at each call."""
    compute, denoiser = Compute.start(config_of(network, precision).compute), build(network)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with compute.autocast():
            loss = denoising_loss(denoiser, images, draws).mean()
        loss.backward()
        optimizer.step()

    return step


def images_per_second(step: Callable[[], None], batch: int) -> float:
    """The rate of one step."""
    began = time.perf_counter()
    step()
    return batch / (time.perf_counter() - began)


def measure(pair: Pair, precision: Literal["float32", "bf16"], repeats: int, batch: int, bar: "tqdm[None]") -> list[tuple[float, float]]:
    """`repeats` pairs of rates, lean and U-Net, measured in turn after a step of each that doesn't count."""
    lean, unet = (stepper(network, precision, *rows(batch)) for network in (pair.lean, pair.unet))
    found = []
    for repeat in range(-1, repeats):
        rates = images_per_second(lean, batch), images_per_second(unet, batch)
        found += [rates] if repeat >= 0 else []
        bar.update()
    return found


def describe(network: NetworkConfig) -> str:
    """The network's name, size and number of parameters."""
    return f"{network.backbone} {network.width} x {network.depth}, {parameters(network) / 1e6:.2f} M"


def parameters(network: NetworkConfig) -> int:
    """The number of weights."""
    return sum(parameter.numel() for parameter in build(network).parameters())


def main(argv: list[str]) -> None:
    """Measure every pair in both precisions and print a table."""
    parser = OneLineParser(description="Time the two backbones against each other.",
                           formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, width=100))
    parser.add_argument("--repeats", type=int, default=5, help="turns that each network takes")
    parser.add_argument("--batch", type=int, default=128, help="rows of a step")
    options = parser.parse_args(argv)
    if min(options.repeats, options.batch) < 1:
        parser.error("--repeats and --batch: expected integers >= 1")
    table = Table(title=f"training rows per second, median of {options.repeats}: batch {options.batch}, 28 x 28 x 1, "
                        f"{torch.get_num_threads()} threads, torch {torch.__version__}", title_justify="left")
    for heading in ("pair", "precision", "lean", "U-Net", "ratio (its range)"):
        table.add_column(heading, justify="left" if heading in ("pair", "precision") else "right")
    with tqdm(total=len(PAIRS) * len(PRECISIONS) * (options.repeats + 1), desc="timing", unit="turn", disable=None) as bar:
        for pair in PAIRS:
            for precision in PRECISIONS:
                rates = measure(pair, precision, options.repeats, options.batch, bar)
                lean, unet = (statistics.median(rate) for rate in zip(*rates, strict=True))
                ratios = [a / b for a, b in rates]
                table.add_row(f"{pair.name}:\n{describe(pair.lean)}\n{describe(pair.unet)}", precision, f"{lean:.0f}", f"{unet:.0f}",
                              f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    run_script(main)
