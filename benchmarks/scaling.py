"""Images a second of the private phase on one process and on several, one thread each.

    python benchmarks/scaling.py [--processes 1 2 4] [--precision float32 bf16] [--repeats 25] [--config FILE] [--private.batch_size 1024 ...]

A step is all that training does between two images of the bar: batch, draws, per-example gradients, clipped sum, the sum over processes,
noise, Adam, the moving average, the journal. Each number of processes is a group that `accelerate launch` starts, on a CPU by gloo. The
groups live side by side and take turns: the same steps of the same batches, one group at a time while the others sleep, so whatever else
the machine does meets all alike. The speedup is the median over turns of the rate over the one-process group's in the same turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed import TCPStore

from dpsyngen.cli import OneLineParser, read_config, run_script
from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig
from dpsyngen.data import load_train
from dpsyngen.denoiser import build_denoiser
from dpsyngen.noise_levels import stages_of
from dpsyngen.phases import expert
from dpsyngen.privacy.journal import Journal
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.private_step import PrivateStep
from dpsyngen.privacy.randomness import PrivateKey
from dpsyngen.progress import moving_average

DEMO = Path(__file__).parents[1] / "configs" / "mnist" / "dp_syngen.yaml"
WARM_UP = 2  # steps before anything is timed
PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class TimedCompute(Compute):
    """Knows how long its process waited for the others before a sum, and how long sums took once all were there."""

    clock: dict[str, float] = field(default_factory=lambda: {"waiting": 0.0, "communication": 0.0})

    def sum_over_processes(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the original."""
        began = time.perf_counter()
        self.wait()
        met = time.perf_counter()
        sums = super().sum_over_processes(tensors)
        self.clock["waiting"] += met - began
        self.clock["communication"] += time.perf_counter() - met
        return sums


class Trainer:
    """The private phase's steps, one call each."""

    def __init__(self, config: RunConfig, compute: Compute, folder: Path) -> None:
        torch.manual_seed(0)
        dataset, (stage,) = load_train(config.data), stages_of(config, "private")
        self.denoiser, self.compute = build_denoiser(config).to(compute.device), compute
        if self.denoiser.hinted:
            self.denoiser.set_class_means(torch.zeros(config.data.num_classes, *config.data.image_shape))
        plan = PrivacyPlan.with_noise(config, config.data.expected_size or len(dataset), 1.0)
        journal = Journal(folder / f"{config.compute.precision}-{compute.processes}.jsonl", writable=compute.is_main)
        journal.open_attempt("benchmark", 0)
        key = PrivateKey.fixed("00" * 32)  # the same batches for all groups
        self.step = PrivateStep(expert(self.denoiser, stage.name), stage.sigma_draw, dataset, plan, key, journal, config, compute)
        self.optimizer = torch.optim.Adam(self.step.denoiser.parameters(), lr=1e-4)
        self.average = moving_average(self.denoiser, config.private.ema_decay)

    def __call__(self, step: int) -> None:
        """As `run_phase` does it."""
        self.step(step)
        self.optimizer.step()
        self.average.update_parameters(self.denoiser)
        self.compute.largest_over_processes(0)


def work(port: int, folder: Path, precisions: list[str], config_of: partial[RunConfig]) -> None:
    """One process of a group: do the turns that the benchmark asks for through the store, and report their times."""
    store = TCPStore("localhost", port, is_master=False, timeout=PATIENCE)
    configs = {precision: config_of([f"--compute.precision={precision}"]) for precision in precisions}
    started = {precision: Compute.start(config.compute) for precision, config in configs.items()}
    computes = {name: TimedCompute(c.device, c.rank, c.processes, c.bf16) for name, c in started.items()}
    trainers = {precision: Trainer(config, computes[precision], folder) for precision, config in configs.items()}
    compute, turn = computes[precisions[0]], 0
    while (job := json.loads(store.get(f"{compute.processes}/{turn}"))) is not None:
        clock = computes[job["precision"]].clock
        before = dict(clock)
        compute.wait()
        began = time.perf_counter()
        for step in range(job["first"], job["last"]):
            trainers[job["precision"]](step)
        compute.wait()
        times = {name: clock[name] - before[name] for name in clock} | {"seconds": time.perf_counter() - began}
        store.set(f"{compute.processes}/{turn}/{compute.rank}", json.dumps(times))
        turn += 1


@dataclass
class Group:
    """Some processes that wait for turns."""

    processes: int
    store: TCPStore
    turns: int = 0

    def run(self, precision: str, first: int, last: int) -> dict[str, float]:
        """One turn: its seconds, and what of them the average process waited for others and for sums."""
        self.store.set(f"{self.processes}/{self.turns}", json.dumps({"precision": precision, "first": first, "last": last}))
        times = [json.loads(self.store.get(f"{self.processes}/{self.turns}/{rank}")) for rank in range(self.processes)]
        self.turns += 1
        return {name: statistics.fmean(each[name] for each in times) for name in times[0]}


@contextmanager
def groups_of(counts: list[int], arguments: list[str]) -> Iterator[list[Group]]:
    """A group for each number of processes, started and in the end stopped."""
    store = TCPStore("localhost", 0, is_master=True, timeout=PATIENCE)
    running = []
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            launcher = ["-m", "accelerate.commands.launch", *(["--multi_gpu"] if count > 1 else []), f"--num_processes={count}", "--num_machines=1",
                        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "--num_cpu_threads_per_process=1"]  # fmt: skip
            line = [sys.executable, *launcher, __file__, "--worker", str(store.port), folder, *arguments]
            running.append(subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"}))  # noqa: S603 - this file itself
        groups = [Group(count, store) for count in counts]
        try:
            yield groups
            for group in groups:
                store.set(f"{group.processes}/{group.turns}", "null")
            for process in running:
                process.wait(timeout=60)
        finally:
            for process in running:
                process.terminate()


def measure(groups: list[Group], precisions: list[str], steps: int, repeats: int) -> dict[tuple[str, int], list[dict[str, float]]]:
    """The turns of every group in every precision, in the order of time."""
    for group in groups:
        for precision in precisions:
            group.run(precision, 0, WARM_UP)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for repeat in range(repeats):
        first = WARM_UP + repeat * steps
        for precision in precisions:
            for group in groups:
                found.setdefault((precision, group.processes), []).append(group.run(precision, first, first + steps))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def spread(values: list[float]) -> str:
    """The median and the range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(argv: list[str]) -> None:
    """Measure and print a table; as --worker, be one of the processes that are measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = OneLineParser(
        description="Images a second of the private phase on several processes. Fields of the configuration are flags, too.",
        formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, width=100), allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--processes", nargs="+", type=int, default=[n for n in (1, 2, 4, 8, 16) if n <= max(2, cores)], help="one thread each")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bf16"), default=["float32", "bf16"], help="arithmetic of the network")
    parser.add_argument("--repeats", type=int, default=25, help="turns of each group")
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn")
    parser.add_argument("--config", type=Path, default=DEMO, help="what is trained")
    parser.add_argument("--worker", nargs=2, metavar=("PORT", "FOLDER"), help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args(argv)
    config_of = partial(_read, options.config, overrides)
    if options.worker is not None:
        work(int(options.worker[0]), Path(options.worker[1]), options.precision, config_of)
        return
    if min(options.repeats, options.steps, *options.processes) < 1 or len(set(options.processes)) < len(options.processes):
        parser.error("--processes, --repeats, --steps: expected integers >= 1, no number of processes twice")
    config, began = config_of([]), time.perf_counter()
    counts = sorted({1, *options.processes})
    with groups_of(counts, ["--precision", *options.precision, "--config", str(options.config), *overrides]) as groups:
        found = measure(groups, options.precision, options.steps, options.repeats)
    private = config.private
    table = Table(
        title=f"batch {private.batch_size}, K = {private.noise_multiplicity}, chunks of {config.compute.chunk_size}, {cores} cores, torch "
              f"{torch.__version__}; medians of {options.repeats} turns of {options.steps} steps",
        title_justify="left", box=box.MARKDOWN,
    )  # fmt: skip
    for heading in ("precision", "processes", "images/s", "times one process", "waiting for others, %", "communication, %"):
        table.add_column(heading, justify="left" if heading == "precision" else "right")
    for (precision, count), turns in found.items():
        rates = [options.steps * private.batch_size / turn["seconds"] for turn in turns]
        speedups = [one["seconds"] / turn["seconds"] for one, turn in zip(found[precision, 1], turns, strict=True)]
        shares = [f"{statistics.median(100 * turn[name] / turn['seconds'] for turn in turns):.1f}" for name in ("waiting", "communication")]
        table.add_row(precision, str(count), f"{statistics.median(rates):.0f}", spread(speedups), *shares)
    Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200).print(table)
    print(f"{time.perf_counter() - began:.0f} s in all")


def _read(config: Path, overrides: list[str], more: list[str]) -> RunConfig:
    return read_config([config], [*overrides, "--compute.device=cpu", *more])


if __name__ == "__main__":
    run_script(main)
