"""Time and memory of one private step, by this package and by the other ways to compute it, against the ordinary step.

    python benchmarks/private_step.py [--device cpu] [--backbones lean] [--copies 8] [--precision bf16] [--markdown]
    python benchmarks/private_step.py --layers        which layers the time goes to
    python benchmarks/private_step.py --secure        what secure noise adds to a whole logical step

A private step is forward, backward, per-example gradients averaged over K draws, clipped sum; without the optimiser. The ordinary
step is forward and backward of the mean loss over the same rows. Before anything is timed, every method's clipped sum is compared
with this package's. Each turn of a method follows one of the ordinary step, so whatever else the machine does meets both alike; the
ratio is the median over those pairs. Memory is measured in calls of its own.
"""

import argparse
import dataclasses
import gc
import itertools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from backbones import describe
from competitors import METHODS, NOISY, Gradient, Method, Ordinary, Ours, Problem
from layers import layer_table
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dpsyngen.cli import OneLineParser, run_script
from dpsyngen.compute import Compute
from dpsyngen.config import ComputeConfig, NetworkConfig

BACKBONES = {"lean": NetworkConfig("lean", width=48, depth=1), "unet": NetworkConfig("unet", width=32, depth=2)}
COPIES = {"lean": (1, 8, 32), "unet": (1, 8)}
TOLERANCE = {"float32": 1e-4, "bf16": 1e-1}  # of the norm; bf16 keeps 8 bits, and the methods round at different places
MIN_TURN = 0.2  # seconds: a shorter step is repeated within its turn


@dataclass(frozen=True)
class Setting:
    """One row of the tables."""

    device: str
    backbone: str
    precision: Literal["float32", "bf16"]
    copies: int

    def __str__(self) -> str:
        return f"{self.device} {self.backbone} {self.precision} K={self.copies}"

    def problem(self, rows: int) -> Problem:
        """Its network and rows, with a clipping norm that clips half of the examples."""
        compute = Compute(torch.device(self.device), bf16=self.precision == "bf16")
        problem = Problem.random(BACKBONES[self.backbone], rows, self.copies, compute)
        return dataclasses.replace(problem, clipping_norm=float(Ours(problem).backward().norms().median()))


@dataclass
class Result:
    """What was found of one method in one setting; `reason` says why it can't be used there."""

    reason: str = ""
    difference: float = 0.0
    """From this package's clipped sum, relative to its norm."""
    peak: int = 0
    """Bytes at the step's peak, above weights and rows."""
    held: int = 0
    """Bytes of gradients held when backward is over."""
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


def seconds_of(step: Callable[[], Any], device: str, calls: int = 1) -> float:
    """The time of one call."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        step()
    _wait(device)
    return (time.perf_counter() - began) / calls


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory_of(method: Method) -> tuple[int, int]:
    """Peak bytes of a step above what was there before, and bytes of the gradients held when backward is over.

    The peak counts what torch's allocator hands out, workspaces of its kernels included: on CUDA its own counters, on a CPU the
    profiler's record of every allocation.
    """
    held = 0
    gc.collect()  # or what earlier steps left in cycles would be freed in this one

    def step() -> None:
        nonlocal held
        gradients = method.backward()
        held = sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(gradients)}.values())
        method.clipped_sum(gradients)

    if method.problem.compute.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before, held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(live.max(initial=0)), held


def _tensors(thing: Any) -> Iterator[Tensor]:
    """All tensors in containers and objects."""
    if isinstance(thing, Tensor):
        yield thing
    else:
        parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else getattr(thing, "__dict__", {}).values()
        yield from itertools.chain.from_iterable(map(_tensors, parts))


def exact(step: Callable[[], Gradient]) -> Gradient:
    """One call without TF32, which a GPU's convolutions otherwise use in float32."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return step()
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def difference(found: Gradient, truth: Gradient) -> float:
    """The norm of found - truth over that of truth, all parameters as one vector."""
    parts = torch.tensor([((found[name].float() - truth[name]).norm(), truth[name].norm()) for name in truth], dtype=torch.float64)
    return float(parts[:, 0].norm() / parts[:, 1].norm())


def measure(setting: Setting, kinds: dict[str, type[Method]], rows: int, repeats: int) -> dict[str, Result]:
    """Check, weigh and time the methods; the first result is the ordinary step's."""
    problem = setting.problem(rows)
    truth, ordinary = exact(Ours(problem).step), Ordinary(problem)
    ordinary.step()
    results = {"ordinary": Result()} | {name: Result() for name in kinds}
    results["ordinary"].peak, results["ordinary"].held = memory_of(ordinary)
    usable: dict[str, tuple[Method, int]] = {}
    for name, kind in kinds.items():
        result = results[name]
        try:
            method = kind(problem)
            found = exact(method.step)
            result.peak, result.held = memory_of(method)
            usable[name] = method, max(1, round(MIN_TURN / seconds_of(method.step, setting.device)))
        except Exception as error:  # whatever it was, it is what the table says
            result.reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            continue
        result.difference = 0.0 if name in NOISY else difference(found, truth)
    calls = max(1, round(MIN_TURN / seconds_of(ordinary.step, setting.device)))
    for _ in range(repeats):
        for name, (method, calls_of_method) in usable.items():
            limit = seconds_of(ordinary.step, setting.device, calls)
            results["ordinary"].seconds.append(limit)
            results[name].seconds.append(seconds_of(method.step, setting.device, calls_of_method))
            results[name].ratios.append(results[name].seconds[-1] / limit)
    return results


Found = dict[Setting, dict[str, Result]]


def table(title: str, names: Iterable[str], found: Found, cell: Callable[[Result], str], markdown: bool) -> Table:
    """One row a setting, one column a method."""
    made = Table(title=title, title_justify="left", box=box.MARKDOWN if markdown else box.HEAVY_HEAD)
    for heading in ("device", "backbone", "precision", "K"):
        made.add_column(heading)
    for name in names:
        made.add_column(name, justify="right", no_wrap=markdown)
    for setting, results in found.items():
        cells = ("n/a" if results[name].reason else cell(results[name]) for name in names)
        made.add_row(setting.device, setting.backbone, setting.precision, str(setting.copies), *cells)
    return made


def notes(found: Found) -> Iterator[str]:
    """What the tables can't hold: methods that don't apply or don't agree, and how well the others do."""
    reasons: dict[str, list[str]] = {}
    worst: dict[str, float] = {}
    for setting, results in found.items():
        for name, result in results.items():
            if result.reason:
                reasons.setdefault(f"n/a: {name}: {result.reason}", []).append(str(setting))
            elif name in METHODS and name != "ours":
                worst[setting.precision] = max(worst.get(setting.precision, 0.0), result.difference)
                if not result.difference <= TOLERANCE[setting.precision]:
                    yield f"WRONG: {name} differs from ours by {result.difference:.1e}: {setting}"
        noisy = [results[name].seconds for name in NOISY if name in results]
        if len(noisy) == 2 and all(noisy):
            pairs = [secure / plain for plain, secure in zip(*noisy, strict=True)]
            yield f"a step with secure noise over one with plain noise: {spread(pairs)}: {setting}"
    yield from (f"{reason} ({', '.join(settings)})" for reason, settings in reasons.items())
    yield from (f"largest difference between two methods' clipped sums in {precision}: {value:.1e}" for precision, value in worst.items())


def spread(values: list[float]) -> str:
    """The median and the range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[Setting]]:
    """The command line, and the settings that it asks for; InputError where it can't be used."""
    parser = OneLineParser(
        description="Time private steps against the ordinary step.",
        formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, width=100),
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to compare with the ordinary step")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES), help="networks")
    parser.add_argument("--copies", nargs="+", type=int, help="K, the rows of an example; by default 1, 8, 32 (lean), 1, 8 (unet)")
    parser.add_argument("--precision", nargs="+", choices=TOLERANCE, default=list(TOLERANCE), help="arithmetic of the network")
    parser.add_argument("--rows", type=int, default=128, help="rows of a step, B K")
    parser.add_argument("--repeats", type=int, default=3, help="turns that each method takes")
    parser.add_argument("--threads", type=int, help="threads on the CPU, torch's default if not given")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", nargs="+", choices=("cpu", "cuda"), default=devices, help="where")
    parser.add_argument("--secure", action="store_true", help="add whole logical steps of this package with plain and with secure noise")
    parser.add_argument("--layers", action="store_true", help="time the gradient rules layer by layer instead")
    parser.add_argument("--markdown", action="store_true", help="tables as in docs/performance.md")
    options = parser.parse_args(argv)
    settings = [
        Setting(device, backbone, precision, copies)
        for device in options.device for backbone in options.backbones for precision in options.precision
        for copies in options.copies or COPIES[backbone]
    ]  # fmt: skip
    if min(options.rows, options.repeats, *(setting.copies for setting in settings), options.threads or 1) < 1:
        parser.error("--rows, --repeats, --copies and --threads: expected integers >= 1")
    if any(options.rows % setting.copies for setting in settings):
        parser.error(f"--copies: expected divisors of the {options.rows} rows")
    if "cuda" in options.device and not torch.cuda.is_available():
        parser.error("--device: expected a device of this machine, got 'cuda', and there are no CUDA devices")
    return options, settings


def main(argv: list[str]) -> None:
    """Measure every setting that was asked for and print three tables: time, peak memory, memory of the gradients."""
    began = time.perf_counter()
    options, settings = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    for message in ("Full backward hook is firing", "In CPU autocast, but the target dtype"):  # Opacus' hooks, and rightly so
        warnings.filterwarnings("ignore", message=message)
    Compute.start(ComputeConfig(device="cpu"))  # for what it tells the allocator, as in a run
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler tells stderr when it starts and stops
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() and not options.markdown else 200)
    where = f"{options.rows} rows, 28 x 28 x 1, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if options.layers:
        for setting in settings:
            console.print(layer_table(setting.problem(options.rows), str(setting), options.repeats, options.markdown))
        return
    kinds = {name: METHODS[name] for name in METHODS if name in options.methods} | (NOISY if options.secure else {})
    found: Found = {}
    for setting in settings:
        found[setting] = measure(setting, kinds, options.rows, options.repeats)
        done = ", ".join(f"{name} {statistics.median(r.ratios):.2f}" for name, r in found[setting].items() if r.ratios)
        print(f"{time.perf_counter() - began:5.0f} s  {setting}: {done}", file=sys.stderr, flush=True)
    names = ["ordinary", *kinds]
    for title, cell in (
        (f"time: ordinary step in ms, private steps as multiples of it, median of {options.repeats} pairs; {where}",
         lambda r: spread(r.ratios) if r.ratios else f"{1e3 * statistics.median(r.seconds):.1f}" if r.seconds else "not timed"),
        ("peak memory of a step above weights and rows, MiB", lambda r: f"{r.peak / 2**20:.1f}"),
        ("gradients held when backward is over, MiB", lambda r: f"{r.held / 2**20:.1f}"),
    ):  # fmt: skip
        console.print(table(title, names, found, cell, options.markdown))
    console.print(*(f"{name}: {describe(BACKBONES[name])}" for name in options.backbones), *notes(found), sep="\n")
    console.print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    run_script(main)
