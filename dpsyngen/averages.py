"""Averages of a run's weights of any length, when training is over: python -m dpsyngen.averages --run runs/NAME --length 0.03 [--to DIR].

They are made of the snapshots that `private.ema_snapshots` has kept (Karras et al., arXiv 2312.02696, section 3.2). What comes out is a directory
like a run's, for sample.py, evaluate.py and python -m dpsyngen.release.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpsyngen.checkpoint import load_checkpoint, numbers
from dpsyngen.cli import CONFIG_FILE, OneLineParser, dump_config, load_run_config, run_script
from dpsyngen.denoiser import Denoiser, RoutedDenoiser
from dpsyngen.errors import InputError
from dpsyngen.files import read_json, replacing_directory, write_file, write_json, writing
from dpsyngen.power_average import LONGEST, SHORTEST, TRACKED, combination, gamma_of
from dpsyngen.run_directory import RunDirectory
from dpsyngen.saved_model import load_trained, write_model
from dpsyngen.snapshots import tensor_name

LARGEST_MISMATCH = 0.2
"""Of the norm of a profile, what may be missing from the one that is made of snapshots."""
CAVEAT = (
    "the weights are a moving average of length {length:g} (sigma_rel), chosen when training was over; if it was chosen by a metric on private "
    "images, or by comparing samples with them, that cost privacy that this epsilon doesn't include"
)


def main(argv: list[str]) -> None:
    """Parse, average, say how near it came."""
    parser = OneLineParser(
        prog="python -m dpsyngen.averages", allow_abbrev=False,
        description="Average the weights of a finished run over another length of training than it did, from the snapshots that "
        "private.ema_snapshots has kept. Averaging spends no privacy, however many averages are made; choosing among them by a metric on private "
        "images, or by comparing samples with them, does, and epsilon leaves that out.",
    )  # fmt: skip
    parser.add_argument("--run", type=Path, required=True, help="the run's directory; it stays as it is")
    parser.add_argument("--length", type=float, required=True, metavar="FLOAT",
                        help="sigma_rel, the standard deviation of the average's profile as a fraction of the private phase; e.g. 0.03")  # fmt: skip
    parser.add_argument("--to", type=Path, metavar="DIR", help="where the averaged run goes; must not exist yet, or be empty "
                        "(default: RUN-average-LENGTH)")  # fmt: skip
    options = parser.parse_args(argv)
    to = options.to or options.run.resolve().with_name(f"{options.run.resolve().name}-average-{options.length:g}")
    mismatch = average(options.run, options.length, to)
    print(f"{to}: {options.run} with weights averaged over length {options.length:g}; {100 * mismatch:.2g} % of the profile is missing")


def average(run: Path, length: float, to: Path) -> float:
    """Write the finished run `run` with its weights averaged over `length` (sigma_rel) into the new directory `to`, complete or absent.

    It gets the run's config.yaml under another name, its privacy.json with one more caveat, model/, and average.json with how it was made.
    Returns how much of the profile is missing, relative to its norm. Iterates that fluctuate independently around a common mean make the result
    differ from the average tracked while training by that fraction of its own fluctuation.
    Raises InputError: a length that the snapshots can't give; snapshots that are missing or damaged; the run isn't finished; `to` is taken.
    """
    if not SHORTEST <= length <= LONGEST:
        raise InputError(f"--length: expected a fraction of the private phase in [{SHORTEST:g}, {LONGEST:g}], got {length:g}")
    files, config, to = RunDirectory(run), load_run_config(run), to.resolve()
    if files.candidate.exists():
        raise InputError(f"{run}: expected a run of its own or the winner of a selection, got one of the runs that it is chosen from")
    denoiser = load_trained(run, config, torch.device("cpu"))
    steps = _steps(files)
    ends, gammas = np.repeat(np.array(steps, dtype=np.float64), len(TRACKED)), np.tile([gamma_of(tracked) for tracked in TRACKED], len(steps))
    coefficients, mismatch = combination(ends, gammas, steps[-1], gamma_of(length))
    if mismatch > LARGEST_MISMATCH:
        reach = [each for each in np.arange(0.005, LONGEST, 0.005) if combination(ends, gammas, steps[-1], gamma_of(each))[1] <= LARGEST_MISMATCH]
        raise InputError(f"--length: expected one that {len(steps)} snapshots can give, {min(reach):.3f} to {max(reach):.3f}, got {length:g}")
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise InputError(f"{to}: expected a directory that doesn't exist yet, or is empty")
    _set_weights(denoiser, files, steps, coefficients.reshape(len(steps), len(TRACKED)))
    report = read_json(files.privacy)
    report["caveats"] = [*report.get("caveats", []), CAVEAT.format(length=length)]
    config = replace(config, name=f"{config.name}-average-{length:g}")
    with writing(to):
        to.parent.mkdir(parents=True, exist_ok=True)
    with replacing_directory(to) as partial:
        write_file(partial / CONFIG_FILE, dump_config(config))
        write_json(partial / "average.json", _record(run, length, steps, coefficients, mismatch))
        write_model(partial / files.model.name, config, denoiser, report)
        write_json(partial / files.privacy.name, report)
    return mismatch


def _steps(files: RunDirectory) -> list[int]:
    """After which steps there are snapshots; InputError unless the last one of the run is among them."""
    steps = numbers(files.averages)
    if not steps:
        raise InputError(f"{files.averages}: expected snapshots, but there are none; train with private.ema_snapshots, e.g. 16")
    try:
        last = json.loads(files.metrics.read_text(encoding="utf-8").splitlines()[-1])["step"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{files.metrics}: expected the lines that train.py wrote ({error})") from error
    if steps[-1] != last:
        raise InputError(f"{files.averages}: expected a snapshot of step {last}, the run's last, got step {steps[-1]}")
    return steps


def _set_weights(denoiser: Denoiser | RoutedDenoiser, files: RunDirectory, steps: list[int], coefficients: np.ndarray) -> None:
    """Give the denoiser's parameters the sums over snapshots, by coefficients float64 [steps, TRACKED], of what these hold; in float64."""
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in denoiser.named_parameters()}
    for step, row in zip(steps, coefficients, strict=True):
        tensors = load_checkpoint(files.averages, step).tensors
        for name, total in sums.items():
            for sigma_rel, coefficient in zip(TRACKED, row, strict=True):
                tensor = tensors.get(tensor_name(sigma_rel, name))
                if tensor is None or tensor.shape != total.shape:
                    raise InputError(f"{files.averages}: expected snapshots of this run's network; that of step {step} has others' {name}")
                total.add_(tensor.double(), alpha=float(coefficient))
    for name, parameter in denoiser.named_parameters():
        parameter.data.copy_(sums[name])


def _record(run: Path, length: float, steps: list[int], coefficients: np.ndarray, mismatch: float) -> dict[str, Any]:
    """What average.json says of how the weights came about."""
    parts = [(step, sigma_rel) for step in steps for sigma_rel in TRACKED]
    return {
        "run": run.resolve().name, "length": length, "gamma": gamma_of(length), "step": steps[-1], "mismatch": mismatch,
        "combination": [{"step": step, "length": sigma_rel, "coefficient": float(coefficient)}
                        for (step, sigma_rel), coefficient in zip(parts, coefficients, strict=True)],
    }  # fmt: skip


if __name__ == "__main__":
    sys.argv[0] = "python -m dpsyngen.averages"  # what complaints begin with
    run_script(main)
