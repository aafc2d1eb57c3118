"""Images per second of every family of programmatic images, next to a plain NumPy painter, and their share of a training step.

    python benchmarks/generators.py [--repeats 7] [--families dead_leaves strokes] [--config configs/mnist/dp_syngen.yaml]

The plain painter draws dead leaves with the same statistics as the family's defaults, one image after the other, one mask over the whole
image for each leaf. All families and the painter take turns, so that whatever else the machine does meets them alike; a ratio is the
median of the ratios within a turn. A step of the config's synthetic phase is timed with its images made beforehand, in the same turns; a
share is what making a batch takes of making it and training on it. Last comes what the config itself does: its own family, with hints, kept
where `synthetic.distinct` says so; the share is that of all steps together.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dpsyngen.cli import OneLineParser, read_config, run_script
from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig
from dpsyngen.data import SyntheticImages
from dpsyngen.denoiser import build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.ordinary_step import OrdinaryStep
from dpsyngen.phases import Phase, synthetic_phase
from synthetic_generators import available

SHAPES = ((1, 28), (3, 32))


def plain_dead_leaves(rng: np.random.Generator, n: int, channels: int, image_size: int) -> np.ndarray:
    """Dead leaves as the family's defaults have them, uint8 [n, C, H, W]."""
    side = 2 * image_size
    y, x = np.mgrid[:side, :side].astype(np.float32) + 0.5
    images = np.empty((n, channels, image_size, image_size), np.uint8)
    for image in images:
        canvas = np.empty((side, side, channels), np.uint8)
        ground = rng.integers(4)
        canvas[:] = (0, 128, 255)[ground] if ground < 3 else rng.integers(256, size=channels)
        is_silhouette, shared = rng.random() < 0.25, rng.integers(256, size=channels)
        for _ in range(min(int(9 * (258 / 9) ** rng.random()), 257) - 1):
            mask = _leaf_mask(rng, x, y, side)
            canvas[mask] = shared if is_silhouette else rng.integers(256, size=channels)
        boxes = canvas.reshape(image_size, 2, image_size, 2, channels)
        image[:] = boxes.mean(axis=(1, 3), dtype=np.float32).round().transpose(2, 0, 1)
    return images


def _leaf_mask(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    """A circle, square, rectangle or triangle whose circle has a radius from p(r) ~ r^-3 in [0.03, 1] of the side; bool [side, side]."""
    radius = side * (0.03**-2 + rng.random() * (1 - 0.03**-2)) ** -0.5
    dx, dy = x - rng.random() * side, y - rng.random() * side
    kind = rng.integers(4)
    if kind == 0:
        return dx**2 + dy**2 <= radius**2
    turn, opening = rng.random() * 2 * np.pi, np.pi / 2 if kind == 1 else rng.random() * np.pi
    angles = np.sort(rng.random(3)) * 2 * np.pi if kind == 3 else turn + np.array([0, opening, np.pi, np.pi + opening])
    corners = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    inside = np.ones(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        inside &= (x1 - x0) * (dy - y0) >= (y1 - y0) * (dx - x0)
    return inside


def own_phase(config: RunConfig, compute: Compute) -> tuple[Phase, OrdinaryStep]:
    """The config's synthetic phase and its step; InputError if there is none."""
    phase = synthetic_phase(config, build_denoiser(config), compute)
    if phase is None or not isinstance(phase.gradient, OrdinaryStep):
        raise InputError(f"stages.variant: expected one with a synthetic phase, got {config.stages.variant}")
    return phase, phase.gradient


def training_step(config: RunConfig, compute: Compute) -> Callable[[], None]:
    """One step of the synthetic phase at each call, always on the same images."""
    phase, gradient = own_phase(config, compute)
    lessons = []
    for lesson in gradient.lessons:
        made = lesson.batches(np.arange(config.synthetic.batch_size), np.random.default_rng(0))
        lessons.append(dataclasses.replace(lesson, batches=lambda places, rng, made=made: tuple(x if x is None else x[: len(places)] for x in made)))
    gradient = dataclasses.replace(gradient, lessons=tuple(lessons))
    optimizer = torch.optim.Adam(phase.trained.parameters(), lr=1e-4)

    def step() -> None:
        gradient(0)
        optimizer.step()

    return step


def own_batches(config: RunConfig, compute: Compute) -> tuple[Callable[[], None], Callable[[], None]]:
    """Batches of the config's first synthetic stage with their hints: of images that are new, and of images that were made before."""
    _, gradient = own_phase(config, compute)
    lesson, rng, made = gradient.lessons[0], np.random.default_rng(0), 0

    def new() -> None:
        nonlocal made
        lesson.batches(np.arange(made, made + config.synthetic.batch_size), rng)
        made += config.synthetic.batch_size

    return new, lambda: lesson.batches(np.arange(config.synthetic.batch_size), rng)  # type: ignore[return-value]


def generation(name: str, channels: int, image_size: int, batch: int) -> Callable[[], None]:
    """The next batch of a family with its default options at each call, made as the synthetic phase makes it."""
    images, made = SyntheticImages(name, {}, (channels, image_size, image_size), 0), 0

    def generate() -> None:
        nonlocal made
        images.batch(range(made, made + batch))
        made += batch

    return generate


def seconds_of(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(calls: dict[str, Callable[[], object]], repeats: int, title: str) -> dict[str, list[float]]:
    """Seconds of each call in each of `repeats` turns, after one that doesn't count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in tqdm(range(-1, repeats), desc=title, unit="turn", disable=None):
        for name, call in calls.items():
            seconds = seconds_of(call)
            if repeat >= 0:
                found[name].append(seconds)
    return found


def main(argv: list[str]) -> None:
    """Measure and print two tables in Markdown."""
    parser = OneLineParser(description="Time the families of programmatic images.",
                           formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, width=100))
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--families", nargs="+", default=available(), choices=available(), help="which families")
    parser.add_argument("--config", type=Path, default=Path("configs/mnist/dp_syngen.yaml"), help="whose synthetic step and batch is taken")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error("--repeats: expected an integer >= 1")
    config = read_config([options.config])
    batch, compute, painted = config.synthetic.batch_size, Compute.start(config.compute), 8
    for channels, side in SHAPES:
        data = dataclasses.replace(config.data, source="npz", path="none", channels=channels, image_size=side)  # nothing reads it
        step = training_step(dataclasses.replace(config, data=data), compute)
        families = {name: generation(name, channels, side, batch) for name in options.families}
        plain = partial(plain_dead_leaves, np.random.default_rng(0), painted, channels, side)
        own = dict(zip(("new", "again"), own_batches(dataclasses.replace(config, data=data), compute), strict=True))
        seconds = measure({"plain": plain, "step": step} | families | own, options.repeats, f"{side} x {side} x {channels}")
        painter = [second * batch / painted for second in seconds["plain"]]
        print(f"\n{side} x {side} x {channels}, batches of {batch}, median of {options.repeats} turns, {torch.get_num_threads()} threads; "
              f"a training step of {options.config} takes {1e3 * statistics.median(seconds['step']):.0f} ms\n")
        print("| family | images/s | times the plain painter (range) | share of a step |\n|---|---:|---:|---:|")
        print(f"| plain NumPy dead leaves | {batch / statistics.median(painter):,.0f} | 1 | |")
        for name in families:
            ratios = [slow / fast for slow, fast in zip(painter, seconds[name], strict=True)]
            share = statistics.median(own / (own + train) for own, train in zip(seconds[name], seconds["step"], strict=True))
            print(f"| {name} | {batch / statistics.median(seconds[name]):,.0f} | {statistics.median(ratios):.0f} ({min(ratios):.0f} to "
                  f"{max(ratios):.0f}) | {share:.1%} |")
        seen = config.synthetic.planned_steps(config.data.expected_size or 0) * batch
        first = min(1.0, (config.synthetic.distinct or seen) / seen)
        shares = [first * new / (new + train) + (1 - first) * again / (again + train)
                  for new, again, train in zip(seconds["new"], seconds["again"], seconds["step"], strict=True)]  # fmt: skip
        print(f"\nThe config's own images and hints: {1e3 * statistics.median(seconds['new']):.1f} ms a batch where they are new, "
              f"{1e3 * statistics.median(seconds['again']):.1f} ms later; {statistics.median(shares):.1%} of all steps together")


if __name__ == "__main__":
    run_script(main)
