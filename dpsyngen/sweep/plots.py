"""A sweep in pictures: each metric against each axis, and a heat map where there are two axes; for named cells a row each."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dpsyngen.field_types import plain
from dpsyngen.files import write_file, writing
from dpsyngen.sweep.grid import CELL
from dpsyngen.sweep.table import NOT_INCLUDED, Row, metric_names

_TEXT_COLOUR = "#444444"
_COLOUR = "#4878a8"
_LONGEST_LABEL = 60
_MOST_LINES = 8  # beyond, lines can't be told apart; dots are drawn instead


def save_plots(directory: Path, table: Sequence[Row], fields: Sequence[str], title: str, names: Mapping[str, str]) -> list[Path]:
    """Draw plots/METRIC.png for every metric of the table; returns their paths.

    With named cells, a row for each of them in their order, with the deviation where there is one, and a colour for each combination of a grid.
    Else one panel per axis that has several values: a line for each combination of the others, or dots where there would be too many;
    two such axes also get a heat map. Rows without the metric are left out. `names` are those of metrics whose column doesn't tell.
    """
    varied = [field for field in fields if len({plain(row[field]) for row in table}) > 1 or field == CELL] or list(fields[:1])
    paths = []
    for metric in metric_names(table):
        label = names.get(metric, _label(metric))
        figure = _draw_cells(table, metric, label, varied[1:]) if varied[0] == CELL else _draw_axes(table, metric, label, varied)
        figure.suptitle(f"{title}: {label}", weight="bold")
        figure.supxlabel(f"{NOT_INCLUDED[0].upper()}{NOT_INCLUDED[1:]}.", fontsize=8, color=_TEXT_COLOUR, wrap=True)
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        paths.append(directory / "plots" / f"{metric}.png")
        with writing(paths[-1]):
            paths[-1].parent.mkdir(exist_ok=True)
        write_file(paths[-1], picture.getvalue())
    return paths


def _draw_axes(table: Sequence[Row], metric: str, label: str, varied: Sequence[str]) -> Figure:
    known, heat = [row for row in table if row.get(metric) is not None], len(varied) == 2
    panels = len(varied) + heat
    figure = Figure(figsize=(5.2 * panels, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel, field in zip(axes, varied, strict=False):
        _draw_axis(panel, known, metric, label, field, [other for other in varied if other != field], _ticks(table, field))
    if heat:
        _draw_heat_map(figure, axes[-1], known, metric, varied, [_ticks(table, field) for field in varied])
    return figure


def _draw_cells(table: Sequence[Row], metric: str, label: str, others: Sequence[str]) -> Figure:
    names, groups = list(dict.fromkeys(row[CELL] for row in table)), _groups(table, others)
    figure = Figure(figsize=(9, 1.9 + 0.24 * len(names) * max(1, min(len(groups), _MOST_LINES) / 2)), dpi=110, layout="constrained")
    axes = figure.subplots()
    deviates = any(row.get(f"{metric}_std") is not None for row in table)
    for number, (group, rows) in enumerate(groups.items()):
        known = [row for row in rows if row.get(metric) is not None]
        places = [names.index(row[CELL]) + 0.7 * ((number + 0.5) / len(groups) - 0.5) for row in known]
        deviations = [_scaled(metric, row.get(f"{metric}_std") or 0.0) for row in known] if deviates else None
        axes.errorbar([_scaled(metric, row[metric]) for row in known], places, xerr=deviations, fmt="o", capsize=3, label=group or None,
                      color=None if len(groups) <= _MOST_LINES else _COLOUR)  # fmt: skip
    axes.set_yticks(range(len(names)), [textwrap.shorten(name, _LONGEST_LABEL, placeholder=" …") for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.set_xlabel(f"{label}{'; bars: deviation over trainings of the classifier on one sample set' if deviates else ''}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if 1 < len(groups) <= _MOST_LINES:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _groups(table: Sequence[Row], fields: Sequence[str]) -> dict[str, list[Row]]:
    """The rows that have the same values of some fields, by these in words."""
    groups: dict[str, list[Row]] = {}
    for row in table:
        groups.setdefault(", ".join(f"{field.rpartition('.')[2]} = {plain(row[field])}" for field in fields), []).append(row)
    return groups


def _label(metric: str) -> str:
    return f"CAS, {metric.removeprefix('cas_').replace('_', ' ')} (%)" if metric.startswith("cas_") else metric.replace("fid", "FID")


def _scaled(metric: str, value: float) -> float:
    return 100 * value if metric.startswith("cas_") else value


def _ticks(table: Sequence[Row], field: str) -> list[Any]:
    """The values of an axis: numbers in rising order, all else in the grid's."""
    values = list({plain(row[field]): row[field] for row in table}.values())
    return sorted(values) if _numeric(values) else values


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value) for value in values)


def _draw_axis(axes: Axes, known: Sequence[Row], metric: str, label: str, field: str, others: Sequence[str], ticks: list[Any]) -> None:
    numeric = _numeric(ticks)
    groups = _groups(known, others)
    for name, group in groups.items():
        points = sorted((float(row[field]) if numeric else ticks.index(row[field]), _scaled(metric, row[metric])) for row in group)
        line = "-" if numeric and len(groups) <= _MOST_LINES else ""  # nothing lies between two categories
        axes.plot(*zip(*points, strict=True), marker="o", linestyle=line, label=name or None, color=None if len(groups) <= _MOST_LINES else _COLOUR)
    if numeric and ticks[0] > 0 and ticks[-1] >= 10 * ticks[0]:
        axes.set_xscale("log")
    places = [float(value) for value in ticks] if numeric else list(range(len(ticks)))
    if len(ticks) <= 12:
        axes.set_xticks(places, [plain(value) for value in ticks])
        axes.minorticks_off()
    axes.set(xlabel=field, ylabel=label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if others and 1 < len(groups) <= _MOST_LINES:
        axes.legend(frameon=False, fontsize=8)


def _draw_heat_map(figure: Figure, axes: Axes, known: Sequence[Row], metric: str, fields: Sequence[str], ticks: Sequence[list[Any]]) -> None:
    grid = np.full((len(ticks[0]), len(ticks[1])), np.nan)
    for row in known:
        grid[ticks[0].index(row[fields[0]]), ticks[1].index(row[fields[1]])] = _scaled(metric, row[metric])
    scale = Normalize(np.nanmin(grid), np.nanmax(grid))
    shades = ScalarMappable(scale, "viridis")
    axes.imshow(grid, cmap=shades.cmap, norm=scale, aspect="auto", origin="lower")
    for (y, x), value in np.ndenumerate(grid):
        if np.isfinite(value):
            dark = np.mean(shades.to_rgba(value)[:3]) < 0.5
            axes.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xticks(range(len(ticks[1])), [plain(value) for value in ticks[1]])
    axes.set_yticks(range(len(ticks[0])), [plain(value) for value in ticks[0]])
    axes.set(xlabel=fields[1], ylabel=fields[0])
    figure.colorbar(shades, ax=axes)
