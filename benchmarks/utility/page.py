"""The table in docs/results.md, rewritten from the results between two comments; the text around it stays."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.utility.results import Result
from benchmarks.utility.rows import Row
from dpsyngen.errors import InputError
from dpsyngen.files import write_file
from dpsyngen.model_card import rounded_up

BEGINS, ENDS = "<!-- results: begin -->", "<!-- results: end -->"
_DATASETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
_CLASSIFIERS = {"cas_logistic_regression": "LR", "cas_mlp": "MLP", "cas_cnn": "CNN"}
_COLUMNS = ("row", "dataset", "ε", "noisy images, synthetic + private", "training", "sampling", "minutes: train, sample, evaluate",
            *_CLASSIFIERS.values(), "distance", "reference", "machine")  # fmt: skip


def expect_page(path: Path) -> None:
    """Raise InputError unless the page can take a table."""
    _split(path)


def write_page(path: Path, rows: Mapping[str, Row], results: Sequence[Result]) -> None:
    """Put the table of the results between the page's comments. InputError if they aren't there."""
    before, after = _split(path)
    write_file(path, f"{before}{BEGINS}\n\n{table(rows, results)}\n{ENDS}{after}")


def table(rows: Mapping[str, Row], results: Sequence[Result]) -> str:
    """The results as Markdown: rows in their file's order, then those that it no longer has.

    Of each row the results with the settings that it ran with last; where it ran several times with these, all of them.
    """
    latest = {result["row"]: result["hash"] for result in results}
    names = [*(name for name in rows if name in latest), *(name for name in latest if name not in rows)]
    shown = [result for name in names for result in results if (result["row"], result["hash"]) == (name, latest[name])]
    if not shown:
        return "No row has run yet.\n"
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS)), *(_line(_entries(result)) for result in shown), ""]
    lines += [f"- `{name}`: {rows[name].shows}{_changed(rows[name], latest[name])}" for name in names if name in rows]
    distances = dict.fromkeys(result["metrics"]["fid"]["name"] for result in shown if "fid" in result["metrics"])
    lines += [f"- The distance is {' or '.join(distances)}."] if distances else []
    return "\n".join(lines) + "\n"


def _changed(row: Row, ran: str) -> str:
    return "" if row.hash == ran else " (the settings have changed since it ran)"


def _entries(result: Result) -> list[str]:
    seen, flops, minutes, metrics = result["noisy_images"], result["flops"], result["minutes"], result["metrics"]
    machine, reference = result["machine"], result["reference"]
    return [
        f"`{result['row']}`",
        _DATASETS.get(result["dataset"], result["dataset"]),
        "none" if result["epsilon"] is None else rounded_up(result["epsilon"]),
        f"{seen['synthetic'] + seen['replayed']:,} + {seen['private']:,}",
        f"{flops['training'] / 1e15:.3g}",
        f"{flops['sampling'] / 1e15:.3g}",
        ", ".join(f"{minutes[script]:.1f}" if script in minutes else "?" for script in ("train", "sample", "evaluate")),
        *(_accuracy(metrics.get(name)) for name in _CLASSIFIERS),
        f"{metrics['fid']['value']:.3g}" if "fid" in metrics else "",
        f"{reference['images']:,} {reference['name'].replace('_', '-')}",
        f"{machine['device']}, {machine['threads']} thread{'s' if machine['threads'] != 1 else ''}",
    ]


def _accuracy(metric: dict[str, Any] | None) -> str:
    """In percent, with the deviation over the seeds of the classifier if there are several."""
    if metric is None:
        return ""
    deviation = f" ± {100 * metric['std']:.1f}" if "std" in metric else ""
    return f"{100 * metric['value']:.1f}{deviation}"


def _split(path: Path) -> tuple[str, str]:
    """What is before the table and what is after it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a page with {BEGINS} and {ENDS} ({error})") from None
    before, begins, rest = text.partition(BEGINS)
    _, ends, after = rest.partition(ENDS)
    if not begins or not ends or BEGINS in rest or ENDS in after:
        raise InputError(f"{path}: expected {BEGINS} and {ENDS} in it, in this order, once each")
    return before, after


def _line(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entry.replace('|', chr(92) + '|') for entry in entries)} |"
