"""What the cells of a sweep came to: a row each, as CSV for programs and Markdown for people."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpsyngen.field_types import plain
from dpsyngen.files import read_json, write_file
from dpsyngen.sweep.cells import Job
from dpsyngen.sweep.grid import CELL, Cell

NOT_INCLUDED = "choosing a setting by private results costs privacy that the runs' epsilon doesn't include"
EACH_ALONE = "epsilon is each run's own; whoever sees several runs has seen what all of them cost together"

Row = dict[str, Any]
"""The cell's name, if it has one, the grid's values by field, status, epsilon, delta, the metrics that there are, each CAS with its deviation,
and failure."""


def rows(cells: Sequence[Cell], jobs: Sequence[Job]) -> list[Row]:
    """A row for each cell, in the grid's order; None where there is no number (yet). InputError for a damaged file of a run."""
    return [_row(cell, job) for cell, job in zip(cells, jobs, strict=True)]


def metric_names(table: Sequence[Row]) -> list[str]:
    """The metrics that a row has, without deviations: cas_..., fid, precision, recall."""
    beside = {CELL, "run", "status", "epsilon", "delta", "failure"}
    names = dict.fromkeys(name for row in table for name in row)
    return [name for name in names if name not in beside and "." not in name and not name.endswith("_std") and name != "seed"]


def write_table(directory: Path, table: Sequence[Row], title: str, notes: Sequence[str]) -> None:
    """table.csv with all digits, and table.md with a few and the notes below."""
    columns = [name for name in dict.fromkeys(name for row in table for name in row) if name != "failure"] + ["failure"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if row.get(column) is None else _exact(row[column]) for column in columns] for row in table])
    write_file(directory / "table.csv", text.getvalue())
    shown = [column for column in columns if not column.endswith("_std")]
    lines = [f"# {title}", "", _markdown(shown), _markdown(["---"] * len(shown))]
    lines += [_markdown([_short(row, column) for column in shown]) for row in table]
    lines += ["", *(f"- {note[0].upper()}{note[1:]}." for note in notes)]
    write_file(directory / "table.md", "\n".join(lines) + "\n")


def names_of(jobs: Sequence[Job]) -> dict[str, str]:
    """What the evaluations call a metric where its column's name doesn't tell, as of an FID that isn't on Inception's features."""
    evaluations = [read_object(job.run.path / "evaluation.json").get("metrics", {}) for job in jobs]
    return {key: record["name"] for metrics in evaluations for key, record in metrics.items() if record.get("name", key.upper()) != key.upper()}


def notes_on(jobs: Sequence[Job]) -> list[str]:
    """What a reader must know beside the numbers, with what the evaluations say of their own privacy."""
    said = [read_object(job.run.path / "evaluation.json").get("private") for job in jobs]
    named = [f"the column {key} is {name}" for key, name in names_of(jobs).items()]
    return [NOT_INCLUDED, EACH_ALONE, *(f"metrics: {remark}" for remark in dict.fromkeys(said) if remark), *named]


def _row(cell: Cell, job: Job) -> Row:
    row: Row = {**cell.values, "run": job.run.path.name, "status": job.status}
    privacy = read_object(job.run.privacy) if job.run.is_finished else {}
    row |= {"epsilon": privacy.get("epsilon"), "delta": privacy.get("delta")}
    for name, metric in read_object(job.run.path / "evaluation.json").get("metrics", {}).items():
        row[name] = metric["value"]
        if "std" in metric:
            row[f"{name}_std"] = metric["std"]
    return row | {"failure": job.failure}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file; InputError for a damaged one."""
    return read_json(path) if path.is_file() else {}


def _exact(value: Any) -> str:
    return repr(value) if isinstance(value, float) else value if isinstance(value, str) else plain(value)


def _short(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return "null" if "." in column and column in row else ""
    if not isinstance(value, float) or "." in column:
        return plain(value)
    if column.startswith("cas_"):
        deviation = row.get(f"{column}_std")
        return f"{100 * value:.1f}{'' if deviation is None else f' ± {100 * deviation:.1f}'} %"
    return f"{value:.4g}"


def _markdown(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entry.replace('|', chr(92) + '|') for entry in entries)} |"
