"""A run for every combination of settings: python -m dpsyngen.sweep --config FILE --grid privacy.epsilon=0.2,1,10 --grid stages.tau1=-4,-3.

Or for every cell that a file names: python -m dpsyngen.sweep --cells configs/experiments/thresholds.yaml.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dpsyngen.cli import ScriptParser, run_script
from dpsyngen.config import SOURCES_ON_DISK
from dpsyngen.errors import InputError
from dpsyngen.run_directory import RunDirectory
from dpsyngen.sweep.cells import Job, environments, expect_scripts, locked, run_jobs
from dpsyngen.sweep.grid import Axis, Cell, build_cells
from dpsyngen.sweep.selection_flags import add_selection, expect_selection, select_by_command
from dpsyngen.sweep.table import NOT_INCLUDED, names_of, notes_on, rows, write_table


def main(argv: list[str]) -> None:
    """Parse, check every combination, run what is unfinished, write table and plots."""
    parser = ScriptParser("Train, sample and evaluate a run for every combination of settings; run it again to resume it.")
    parser.prog = "python -m dpsyngen.sweep"
    parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", help="a YAML file; later ones override earlier ones")
    parser.add_argument("--grid", action="append", default=[], metavar="FIELD=VALUE,...", help="a field and the values it takes; may be repeated")
    parser.add_argument("--cells", type=Path, metavar="FILE", help="a YAML file, on top of the others, with named cells and the fields that each "
                        "sets: a run for each, and for each combination of the grid, if there is one")  # fmt: skip
    parser.add_argument("--to", type=Path, metavar="DIR", help="the sweep's directory (default: sweeps/NAME); an unfinished sweep in it is resumed")
    parser.add_argument("--parallel", metavar="INT", help="cells at the same time (default: one per CUDA device, one on a CPU)")
    add_selection(parser)
    options, overrides = parser.parse(argv)
    parallel = _positive("--parallel", options.parallel)
    if options.select is not None and options.cells is not None:
        raise InputError("--cells: expected --grid beside --select, which draws from the combinations of a grid")
    cells = build_cells(options.config, overrides, [Axis.parse(text) for text in options.grid], options.cells)
    expect_scripts()
    _expect_references(cells)
    if expect_selection(options):
        select_by_command(options, cells, lambda: environments(parallel, cells[0].config.compute.device))
        return
    directory = options.to or Path("sweeps") / cells[0].config.name
    jobs = [Job(cell.config, RunDirectory(directory / cell.name)) for cell in cells]
    for job in jobs:
        job.run.expect_config(job.config_text)
    with locked(directory):
        _sweep(directory, cells, jobs, environments(parallel, cells[0].config.compute.device))


def _sweep(directory: Path, cells: Sequence[Cell], jobs: Sequence[Job], places: Sequence[dict[str, str]]) -> None:
    title = f"Sweep of {cells[0].config.name}"

    def save() -> None:
        write_table(directory, rows(cells, jobs), title, notes_on(jobs))

    save()
    run_jobs(jobs, places, after=save)
    save()
    from dpsyngen.sweep.plots import save_plots  # after the work: Matplotlib takes a second

    save_plots(directory, rows(cells, jobs), list(cells[0].values), title, names_of(jobs))
    failed = [job for job in jobs if job.failure is not None]
    print(f"{len(jobs) - len(failed)} of {len(jobs)} cells are finished: {directory / 'table.md'} and {directory / 'plots'}")
    print(f"Mind that {NOT_INCLUDED}.")
    if failed:
        sys.stdout.flush()
        sys.stderr.writelines(f"{job.run.path}: failed: {job.failure}\n" for job in failed)
        raise SystemExit(1)


def _positive(flag: str, text: str | None) -> int | None:
    if text is not None and not (text.isdecimal() and int(text) > 0):
        raise InputError(f"{flag}: expected an integer > 0, got {text!r}")
    return None if text is None else int(text)


def _expect_references(cells: Sequence[Cell]) -> None:
    """Refuse before anything runs what evaluate.py would refuse at the end of every cell."""
    for cell in cells:
        data = cell.config.data
        if data.source in SOURCES_ON_DISK and data.test_path is None and cell.config.evaluation.reference == "test":
            raise InputError("data.test_path: expected real images to evaluate against, got null; or set data.held_out and evaluation.reference")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.argv[0] = "python -m dpsyngen.sweep"  # what complaints begin with
    signal.signal(signal.SIGTERM, _interrupt)  # so that the children are ended too
    run_script(main)
