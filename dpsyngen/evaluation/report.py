"""An evaluation for people: a table for the terminal, and a picture."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from dpsyngen.files import write_file
from dpsyngen.samples import sample_grid

LABELS = {
    "cas_logistic_regression": "CAS, logistic regression",
    "cas_mlp": "CAS, MLP",
    "cas_cnn": "CAS, CNN",
    "precision": "precision",
    "recall": "recall",
}
MATRIX_CLASSES = 20  # beyond, a confusion matrix can't be read; accuracies by class are shown instead
_BAR_COLOUR = "#4878a8"
_TEXT_COLOUR = "#444444"


def metric_label(name: str, metric: dict[str, Any]) -> str:
    """What a metric is called, given its key and record in evaluation.json."""
    return str(metric.get("name", LABELS.get(name, name)))


def metric_text(name: str, metric: dict[str, Any]) -> str:
    """Its value for people, with the deviation that a CAS has."""
    if not name.startswith("cas_"):
        return f"{metric['value']:.2f}" if name == "fid" else f"{metric['value']:.3f}"
    deviation = "" if metric["std"] is None else f" ± {metric['std'] * 100:.1f}"
    return f"{metric['value'] * 100:.1f}{deviation} %"


def metrics_table(result: dict[str, Any]) -> Table:
    """The metrics of `evaluate`, what was left out and why, and whether the numbers are private."""
    table = Table(title=f"{result['images']} synthetic against {result['reference_images']} real images",
                  caption=f"seed {result['seed']}; {result['private']}", caption_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, metric in result["metrics"].items():
        table.add_row(metric_label(name, metric), metric_text(name, metric))
        if "real_training_images" in metric:
            table.add_row("    the same of real training images", f"{metric['real_training_images']:.2f}")
    for name, reason in result["skipped"].items():
        table.add_row(name.upper(), f"left out: {reason}")
    return table


def save_picture(result: dict[str, Any], images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Draw CAS per classifier, the confusion matrix of the last classifier (the CNN) and a few synthetic images.

    It shows no real image. Without labels there is just the grid of images.

    Args:
        result: From `evaluate`.
        images: The synthetic images, uint8 [N, H, W, C].
        labels: Theirs, integers [N].
        path: A .png file, which appears complete or not at all; InputError if it can't be written.
    """
    scores = {name: metric for name, metric in result["metrics"].items() if name.startswith("cas_")}
    figure = Figure(figsize=(15, 5.6) if scores else (6, 6.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, 3 if scores else 1, squeeze=False, width_ratios=(0.8, 1.1, 1) if scores else None)[0]
    if scores:
        _draw_scores(axes[0], scores)
        name, metric = list(scores.items())[-1]
        _draw_classes(axes[1], np.array(metric["confusion_matrix"]), result["class_names"], LABELS[name].removeprefix("CAS, "))
    grid = sample_grid(images, labels)
    axes[-1].imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
    axes[-1].set_axis_off()
    axes[-1].set_title("synthetic images" if len(np.unique(labels)) == 1 else "synthetic images, a row per class")
    others = [f"{metric_label(name, metric)}: {metric_text(name, metric)}" for name, metric in result["metrics"].items() if name not in scores]
    figure.suptitle(f"{result['images']} synthetic against {result['reference_images']} real images", weight="bold")
    separator = "    " if scores else "\n"
    figure.supxlabel("\n".join(filter(None, [separator.join(others), result["private"]])), fontsize=9, color=_TEXT_COLOUR)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_file(path, picture.getvalue())


def _draw_scores(axes: Axes, scores: dict[str, dict[str, Any]]) -> None:
    values = [metric["value"] * 100 for metric in scores.values()]
    deviations = [(metric["std"] or 0) * 100 for metric in scores.values()]
    bars = axes.bar(range(len(scores)), values, yerr=deviations, width=0.6, color=_BAR_COLOUR, ecolor="black", capsize=5)
    axes.bar_label(bars, [metric_text(name, metric) for name, metric in scores.items()], padding=4, fontsize=9)
    axes.set_xticks(range(len(scores)), [LABELS[name].removeprefix("CAS, ").replace(" ", "\n") for name in scores])
    axes.set(ylim=(0, 110), xlim=(-0.6, len(scores) - 0.4), ylabel="accuracy on real images (%)")
    axes.set_yticks(range(0, 101, 20))
    axes.set_title("trained on synthetic images alone")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_classes(axes: Axes, confusion: np.ndarray, names: list[str], classifier: str) -> None:
    """The confusion matrix in per cent of each real class, or with many classes their accuracies in falling order."""
    percent = 100 * confusion / confusion.sum(axis=1, keepdims=True).clip(min=1)
    if len(names) > MATRIX_CLASSES:
        axes.bar(range(len(names)), np.sort(percent.diagonal())[::-1], width=1.0, color=_BAR_COLOUR)
        axes.set(xlabel=f"{len(names)} classes in falling order", ylabel="accuracy on real images (%)", ylim=(0, 100))
        axes.set_title(f"accuracy by class, {classifier}")
        axes.spines[["top", "right"]].set_visible(False)
        return
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(percent):
        if value >= 0.5:
            colour = "white" if value > 55 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8 if len(names) <= 12 else 6, color=colour)
    short = [name if len(name) <= 14 else f"{name[:13]}…" for name in names]
    turned = max(map(len, short)) > 3
    axes.set_xticks(range(len(names)), short, rotation=45 if turned else 0, ha="right" if turned else "center")
    axes.set_yticks(range(len(names)), short)
    axes.tick_params(length=0, labelsize=9)
    axes.set(xlabel="predicted class", ylabel="real class")
    axes.set_title(f"% of each real class, {classifier}")
