"""One row of the ladder, or all: train, sample, evaluate, and put what it came to into docs/results.md.

    python -m benchmarks.utility --list
    python -m benchmarks.utility --row dpdm [--row hints ...] [--again]
    python -m benchmarks.utility --all
    python -m benchmarks.utility --table

Run it again to resume it; a row that has run with the settings that it has now is left as it is, unless --again repeats it with a new key.
"""

import itertools
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from benchmarks.utility.page import expect_page, write_page
from benchmarks.utility.results import add_result, alone_with, read_results, result_of
from benchmarks.utility.rows import ROOT, Row, read_rows
from dpsyngen.cli import ScriptParser, run_script
from dpsyngen.errors import InputError
from dpsyngen.run_directory import RunDirectory
from dpsyngen.sweep.cells import Job, environments, locked, run_jobs

ROWS = ROOT / "benchmarks" / "utility" / "rows.yaml"
RESULTS = ROOT / "benchmarks" / "utility" / "results.jsonl"
PAGE = ROOT / "docs" / "results.md"


def main(argv: list[str]) -> None:
    """Parse, check every row, run those that are asked for, one after another."""
    parser = ScriptParser("Run rows of the ladder and write docs/results.md; run it again to resume it.")
    parser.prog = "python -m benchmarks.utility"
    parser.add_argument("--row", action="append", default=[], metavar="NAME", help="a row to run; may be repeated")
    parser.add_argument("--all", action="store_true", help="run every row")
    parser.add_argument("--list", action="store_true", help="say which rows there are, and which have run")
    parser.add_argument("--table", action="store_true", help="run nothing, write the page's table again")
    parser.add_argument("--again", action="store_true", help="repeat rows that have run: another key, another line")
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE", help="the rows (default: benchmarks/utility/rows.yaml)")
    parser.add_argument("--to", type=Path, default=Path("runs") / "utility", metavar="DIR", help="where runs go (default: runs/utility)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="a line per finished row (default: beside the rows)")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="the page with the table (default: docs/results.md)")
    options, overrides = parser.parse(argv)
    if overrides and (options.results == RESULTS or options.page == PAGE):
        raise InputError(f"{overrides[0].partition('=')[0]}: expected --results and --page beside it, since what flags set isn't the row any more")
    if sum((bool(options.row), options.all, options.list, options.table)) != 1:
        raise InputError("--row: expected either --row NAME, --all, --list or --table")
    rows = read_rows(options.rows, overrides)
    unknown = [name for name in options.row if name not in rows]
    if unknown:
        raise InputError(f"--row {unknown[0]}: expected one of {', '.join(rows)}")
    expect_page(options.page)
    done = {(result["row"], result["hash"]) for result in read_results(options.results)}
    if options.list:
        for row in rows.values():
            print(f"{row.name:24} {'has run' if (row.name, row.hash) in done else '-':8} {row.shows}")
        return
    failed = {}
    for name in dict.fromkeys(rows if options.all else options.row):
        if (name, rows[name].hash) in done and not options.again:
            print(f"{name}: has run with these settings; --again repeats it")
        else:
            failed[name] = _run(rows[name], options.to, options.results)
            _rewrite(options.page, rows, options.results)
    _rewrite(options.page, rows, options.results)
    complaints = [f"{parser.prog}: row {name} failed: {failure}\n" for name, failure in failed.items() if failure is not None]
    if complaints:
        sys.stdout.flush()
        sys.stderr.writelines(complaints)
        raise SystemExit(1)


def _run(row: Row, to: Path, results: Path) -> str | None:
    """Run what is unfinished of a row and add its result; what went wrong, if something did."""
    with locked(to / row.name):
        job = _job(row, to, results)
        print(f"{row.name}: {', '.join(job.remaining) or 'finished before'} in {job.run.path}", flush=True)
        run_jobs([job], environments(1, row.config.compute.device), after=lambda: None, silent=True)
        if job.failure is None:
            with alone_with(results):
                add_result(results, result_of(row, job))
        return job.failure


def _job(row: Row, to: Path, results: Path) -> Job:
    """The first run of the row, as it is set now, that has no result yet, begun or not."""
    counted = {result.get("run") for result in read_results(results)}
    number = next(number for number in itertools.count(1) if f"{row.name}/{row.hash}-{number}" not in counted)
    return Job(row.config, RunDirectory(to / row.name / f"{row.hash}-{number}"))


def _rewrite(page: Path, rows: Mapping[str, Row], results: Path) -> None:
    with alone_with(results):
        write_page(page, rows, read_results(results))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.argv[0] = "python -m benchmarks.utility"  # what complaints begin with
    signal.signal(signal.SIGTERM, _interrupt)  # so that the children are ended too
    run_script(main)
