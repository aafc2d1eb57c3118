"""What a finished row came to, as one JSON object: what it spent, saw, computed, took and is worth."""

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.utility.flops import cost_of
from benchmarks.utility.rows import ROOT, Row
from dpsyngen.errors import InputError
from dpsyngen.files import read_json, writing
from dpsyngen.run_directory import append_line
from dpsyngen.sweep.cells import Job

Result = dict[str, Any]


def result_of(row: Row, job: Job) -> Result:
    """The line for a finished run. InputError for a damaged file of it."""
    privacy, evaluation, cost = read_json(job.run.privacy), read_json(job.run.path / "evaluation.json"), cost_of(row.config)
    kept = ("value", "std", "accuracies", "name")
    return {
        "row": row.name,
        "hash": row.hash,
        "dataset": row.config.data.source,
        "epsilon": privacy["epsilon"],
        "delta": privacy.get("delta"),
        "noisy_images": {"synthetic": cost.synthetic, "replayed": cost.replayed, "private": cost.private},
        "flops": {"forward": cost.forward, "training": cost.training, "sampling": cost.sampling},
        "minutes": {script: round(seconds / 60, 3) for script, seconds in job.seconds().items()},
        "machine": machine(row.config.compute.device),
        "metrics": {
            name: {key: metric[key] for key in kept if metric.get(key) is not None} for name, metric in evaluation["metrics"].items()
        },
        "images": evaluation["images"],
        "reference": {"name": row.config.evaluation.reference, "images": evaluation["reference_images"]},
        "run": f"{job.run.path.parent.name}/{job.run.path.name}",
        "commit": _commit(),
        "settings": row.settings,
    }  # fmt: skip


def machine(device: str) -> dict[str, Any]:
    """What computes here: the GPU, if compute.device leaves one open, else the CPU's model and torch's threads."""
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device != "cpu" and torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), **found}
    return {"device": _cpu_model(), **found}


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")  # which only Linux has
    for line in information.read_text(errors="replace").splitlines() if information.is_file() else []:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return " ".join(value.split())
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside a checkout."""
    try:
        said = subprocess.run(  # noqa: S603 - fixed words
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"],  # noqa: S607
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()


def read_results(path: Path) -> list[Result]:
    """The results in a file of lines, in their order; none where there is no file. InputError for a damaged one."""
    if not path.is_file():
        return []
    results = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            result = json.loads(line)
            results.append({**result, "row": str(result["row"]), "hash": str(result["hash"])})
        except (ValueError, LookupError, TypeError):
            raise InputError(f"{path}: line {number}: expected the JSON object of a row, got something else") from None
    return results


def add_result(path: Path, result: Result) -> None:
    """Append one line."""
    append_line(path, result)


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Wait until no other process is adding to the results, and keep others waiting meanwhile."""
    with writing(path):
        descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
