"""What swaps came to: swap.json for programs, table.md and swap.png for people."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dpsyngen.config import RunConfig
from dpsyngen.evaluation import metric_label, metric_text
from dpsyngen.field_types import unconvert
from dpsyngen.files import read_json, write_file
from dpsyngen.model_card import rounded_up
from dpsyngen.samples import GAP_COLOUR, read_samples, sampling_settings
from dpsyngen.swap.compose import Swap, stages_by_noise

_COLUMNS = 10
_GAP = 2
_COLOURS = ("#c9d8e8", "#f2b880")
_TEXT_COLOUR = "#444444"


def spending(config: RunConfig, run: Path) -> dict[str, Any]:
    """What a finished run is and spent, for swap.json: nothing that isn't in its own public files."""
    report = read_json(run / "privacy.json")
    said = {name: report[name] for name in ("epsilon", "delta", "guarantee") if name in report}
    return {"name": config.name, "sources": [stage.source for stage in stages_by_noise(config)]} | said


def together(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What both runs cost together, if they learnt from the same images: sums, by basic composition; null where nothing is guaranteed."""
    known = all(run.get("epsilon") is not None for run in runs)
    sums = {name: sum(run[name] for run in runs) if known else None for name in ("epsilon", "delta")}
    return {**sums, "says": "swapping is post-processing and spends nothing; what is drawn here has cost what both runs have cost, added up"}


def settings(config: RunConfig) -> dict[str, Any]:
    """What decides the numbers beside the networks, as JSON has it."""
    common = {"seed": config.seed, "precision": config.compute.precision, "held_out": config.data.held_out}
    return common | {"sampling": sampling_settings(config), "evaluation": unconvert(config.evaluation)}


def table(record: Mapping[str, Any]) -> str:
    """Markdown: a row for each swap, where each stage's network is from, and the metrics."""
    first, second = (record["runs"][which]["name"] for which in ("run", "with"))
    swaps, stages = record["swaps"], [stage["name"] for stage in record["stages"]]
    labels = _labels(record)
    lines = [f"# Stages of {first} swapped for those of {second}", "", _row([*stages, *labels.values()]), _row(["---"] * (len(stages) + len(labels)))]
    for swap in swaps.values():
        values = [metric_text(key, swap["metrics"][key]) if key in swap["metrics"] else "" for key in labels]
        lines.append(_row([*(second if name in swap["stages"] else first for name in stages), *values]))
    lines += ["", *(f"- Metrics: {mark}." for mark in _marks(record)), f"- Privacy: {_spent(record)}."]
    return "\n".join(lines) + "\n"


def save_picture(directory: Path, record: Mapping[str, Any]) -> None:
    """Draw swap.png: for each swap a row with where its stages are from, images drawn from the same noise, and the metrics. No real image."""
    swaps, stages, labels = record["swaps"], [stage["name"] for stage in record["stages"]], _labels(record)
    rows = [_strip(read_samples(directory / name / "samples")[0][:_COLUMNS]) for name in swaps]
    picture = np.concatenate(rows)
    step, width = rows[0].shape[0], rows[0].shape[1]
    unit = step * 1.6  # of a column of text, in pixels of the images
    left, right = unit * len(stages), unit * 1.5 * len(labels)
    scale = 0.62 / step  # inches
    figure = Figure(figsize=((left + width + right) * scale + 0.4, (len(swaps) + 1.4) * step * scale + 0.9), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for number, swap in enumerate(swaps.values()):
        middle = (number + 0.5) * step
        for column, stage in enumerate(stages):
            swapped = stage in swap["stages"]
            axes.add_patch(Rectangle((column * unit - left + 2, number * step + 2), unit - 4, step - 4, color=_COLOURS[swapped], linewidth=0))
            source = record["runs"]["with" if swapped else "run"]["sources"][column]
            axes.text((column + 0.5) * unit - left, middle, source, ha="center", va="center", fontsize=8)
        for column, key in enumerate(labels):
            text = metric_text(key, swap["metrics"][key]) if key in swap["metrics"] else "-"
            axes.text(width + (column + 0.5) * unit * 1.5, middle, text, ha="center", va="center", fontsize=9)
    heads = {(column + 0.5) * unit - left: stage for column, stage in enumerate(stages)}
    heads |= {width + (column + 0.5) * unit * 1.5: label.partition(" (")[0].replace(", ", ",\n") for column, label in enumerate(labels.values())}
    for place, text in heads.items():
        axes.text(place, -0.15 * step, text, ha="center", va="bottom", fontsize=9, weight="bold")
    axes.set(xlim=(-left - 2, width + right), ylim=(len(swaps) * step, -step))
    axes.set_axis_off()
    first, second = (record["runs"][which]["name"] for which in ("run", "with"))
    figure.suptitle(f"Stages of {first} (blue) and of {second} (orange), the same noise in every row", weight="bold", fontsize=11)
    notes = [*_spent(record).split("; "), *(f"metrics: {mark}" for mark in _marks(record))]
    figure.supxlabel("\n".join(notes), fontsize=7, color=_TEXT_COLOUR)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_file(directory / "swap.png", drawn.getvalue())


def swap_record(swap: Swap, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """A swap's entry in swap.json: its stages from the second run, and the metrics as evaluation.json has them, without long details."""
    kept = ("name", "value", "std", "protocol", "reference", "seed", "private")
    metrics = {key: {name: metric[name] for name in kept if name in metric} for key, metric in evaluation["metrics"].items()}
    return {"stages": list(swap.stages), "metrics": metrics, "skipped": evaluation["skipped"]}


def _labels(record: Mapping[str, Any]) -> dict[str, str]:
    return {key: metric_label(key, metric) for swap in record["swaps"].values() for key, metric in swap["metrics"].items()}


def _marks(record: Mapping[str, Any]) -> list[str]:
    """Whether the metrics are private, as the evaluations say."""
    return list(dict.fromkeys(metric["private"] for swap in record["swaps"].values() for metric in swap["metrics"].values()))


def _spent(record: Mapping[str, Any]) -> str:
    said = []
    for run in record["runs"].values():
        guaranteed = run.get("epsilon") is not None
        price = f"epsilon = {rounded_up(run['epsilon'])} at delta = {run['delta']:g}" if guaranteed else run.get("guarantee", "nothing is guaranteed")
        said.append(f"{run['name']}: {price}")
    return "; ".join([*said, record["privacy"]["says"]])


def _strip(images: np.ndarray) -> np.ndarray:
    """A row of images with gaps: uint8 [n, H, W, C] to [H + gap, n (W + gap), C]."""
    framed = np.pad(images, ((0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=GAP_COLOUR)
    return np.concatenate(list(framed), axis=1)


def _row(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entry.replace('|', chr(92) + '|') for entry in entries)} |"
