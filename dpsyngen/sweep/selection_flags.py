"""The flags of python -m dpsyngen.sweep --select: what it chooses by, how many runs it takes, and what that costs."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from dpsyngen.errors import InputError
from dpsyngen.sweep.cells import locked
from dpsyngen.sweep.grid import Cell

_SHAPES = {"geometric": 1.0, "logarithmic": 0.0, "poisson": math.inf, "negative_binomial": None}
_MOST_RUNS, _LARGEST_SHAPE = 500.0, 100.0


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the flags to the sweep's own."""
    parser.add_argument("--select", metavar="METRIC", help="pay for the choice: run settings drawn from the grid a random number of times, and let "
                        "only the best by METRIC (cas_cnn, fid, ...) leave; privacy.epsilon is then the price of all of it")  # fmt: skip
    parser.add_argument("--runs", metavar="FLOAT", help="with --select: how many runs on average, 1 to 500")
    parser.add_argument("--runs-distribution", choices=list(_SHAPES), default="geometric", metavar="{" + ",".join(_SHAPES) + "}",
                        help="with --select: what the number of runs is drawn from")  # fmt: skip
    parser.add_argument("--runs-shape", metavar="FLOAT", help="with --select: the shape of negative_binomial, between logarithmic (0) and geometric "
                        "(1) or above")  # fmt: skip
    parser.add_argument("--score-images-are-public", action="store_true", help="with --select: declare that the test images are public, and none of "
                        "the private ones")  # fmt: skip
    parser.add_argument("--score-noise", metavar="FLOAT", help="with --select cas_...: the deviation of the noise on the number of private images "
                        "that are classified right")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="with --select: show the price and run nothing")


def expect_selection(options: argparse.Namespace) -> bool:
    """Whether the flags ask for a selection; InputError for one that asks for a part of it."""
    if options.select is not None:
        return True
    given = {"--runs": options.runs, "--runs-distribution": options.runs_distribution != "geometric" or None, "--runs-shape": options.runs_shape,
             "--score-images-are-public": options.score_images_are_public or None, "--score-noise": options.score_noise,
             "--dry-run": options.dry_run or None}  # fmt: skip
    for flag, value in given.items():
        if value is not None:
            raise InputError(f"{flag}: expected --select METRIC beside it")
    return False


def select_by_command(options: argparse.Namespace, cells: Sequence[Cell], environments: Callable[[], list[dict[str, str]]]) -> None:
    """Show the price, then select, in `--to` or sweeps/NAME-selected. Raises InputError for what can't be selected by or paid for."""
    if options.runs is None:
        raise InputError("--runs: expected the mean number of runs beside --select, got none")
    mean, noise = _number("--runs", options.runs, 1, _MOST_RUNS), None
    shape = _SHAPES[options.runs_distribution]
    if (shape is None) != (options.runs_shape is not None):
        raise InputError("--runs-shape: expected with --runs-distribution negative_binomial, and only then")
    if shape is None:
        shape = _number("--runs-shape", options.runs_shape, 0, _LARGEST_SHAPE)
    if options.score_noise is not None:
        noise = _number("--score-noise", options.score_noise, 0, math.inf)
    from rich.console import Console

    from dpsyngen.privacy.repeats import Repeats  # after the cheap checks: importing SciPy and torch takes seconds
    from dpsyngen.sweep.score import Score
    from dpsyngen.sweep.select import select
    from dpsyngen.sweep.terms import Terms

    score = Score.of(cells[0].config, options.select, noise, images_are_public=options.score_images_are_public)
    terms = Terms.calibrate(cells, Repeats(mean, shape), score)
    Console(soft_wrap=True).print(terms.table())
    if options.dry_run:
        return
    directory = options.to or Path("sweeps") / f"{cells[0].config.name}-selected"
    with locked(directory):
        winner = select(directory, terms, environments())
    if winner is None:
        print(f"{directory}: the number of runs drawn was 0, so there is no winner; drawing again would cost another epsilon")
        raise SystemExit(1)
    print(f"{winner}: the winner; only it may leave: python -m dpsyngen.release --run {winner} --to DIR")


def _number(flag: str, text: str, low: float, high: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise InputError(f"{flag}: expected a number from {low:g}{'' if math.isinf(high) else f' to {high:g}'}, got {text!r}")
    return number
