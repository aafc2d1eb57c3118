"""A survey in one picture: errors, excess with thresholds, and how far apart the noised images are, over one axis of ln sigma."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpsyngen.files import write_file
from dpsyngen.stages.reference import Reference
from dpsyngen.stages.survey import REFERENCE, Survey

_TEXT_COLOUR, _WARNING_COLOUR, _WITHIN_COLOUR = "#444444", "#b00020", "#1d7f3b"


def save_picture(path: Path, survey: Survey, reference: Reference) -> None:
    """Write the picture of `draw` as PNG."""
    picture = io.BytesIO()
    draw(survey, reference).savefig(picture, format="png")
    write_file(path, picture.getvalue())


def draw(survey: Survey, reference: Reference) -> Figure:
    """The three panels; below them, what the reference means for privacy."""
    figure = Figure(figsize=(10, 12), dpi=110, layout="constrained")
    errors, ratios, distances = figure.subplots(3, 1, sharex=True)
    colours = _colours(list(survey.families))
    _draw_errors(errors, survey, colours)
    _draw_ratios(ratios, survey, colours)
    _draw_distances(distances, survey, colours)
    for axes in (errors, ratios, distances):
        _draw_thresholds(axes, survey)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    distances.set_xlabel("ln sigma")
    _mark_sigma(errors)
    figure.suptitle(f"Denoising {reference.name}: what programmatic images teach, against its own images", weight="bold")
    figure.supxlabel(f"{reference.statement}.", fontsize=8, color=_WARNING_COLOUR if reference.is_private else _TEXT_COLOUR, wrap=True)
    return figure


def _colours(names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    wheel = colormaps["tab10" if len(names) <= 10 else "tab20"]
    return {name: wheel(i % wheel.N) for i, name in enumerate(names)}


def _draw_errors(axes: Axes, survey: Survey, colours: dict[str, tuple[float, ...]]) -> None:
    x, worst = survey.log_sigma, survey.gaussians["scalar"]
    axes.plot(x, survey.reference / worst, color="black", linewidth=2.2, label="trained on the reference")
    for name, error in survey.families.items():
        axes.plot(x, error / worst, color=colours[name], linewidth=1.6, label=name)
        axes.plot(x, survey.gaussians[name] / worst, color=colours[name], linewidth=0.7, alpha=0.6)
    axes.plot(x, survey.gaussians["full"] / worst, color="black", linestyle="--", linewidth=1.1, label="Gaussian of the reference")
    axes.plot([], [], color=_TEXT_COLOUR, linewidth=0.7, label="Gaussian of a family")
    highest = max(float((error / worst).max()) for error in (survey.reference, *survey.families.values()))
    axes.set(yscale="log", ylabel="mean squared error / that of\na Gaussian with one variance")
    axes.set_ylim(top=1.3 * max(1.0, highest))
    _plain_ticks(axes)


def _draw_ratios(axes: Axes, survey: Survey, colours: dict[str, tuple[float, ...]]) -> None:
    x, elbows = survey.log_sigma, survey.elbows
    ratios = {name: error / survey.reference for name, error in survey.families.items()}
    bottom, top = 0.6, max(3.0, 1.5 * max(float(ratio.max()) for ratio in ratios.values()))
    axes.axhspan(bottom, 1 + survey.tolerance, color=_WITHIN_COLOUR, alpha=0.1, linewidth=0, label=f"within {100 * survey.tolerance:g} %")
    for name, ratio in ratios.items():
        axes.plot(x, ratio, color=colours[name], linewidth=1.6)
        axes.plot(x, survey.with_known_mean[name] / survey.reference, color=colours[name], linewidth=1.0, linestyle="--")
        ends = [end for end in (elbows[name].tau1, elbows[name].tau2) if end is not None]
        knees = [knee for knee in (elbows[name].knee1, elbows[name].knee2) if knee is not None]
        axes.plot(ends, np.interp(ends, x, ratio), "o", color=colours[name], markersize=6)
        axes.plot(knees, np.interp(knees, x, ratio), "x", color=colours[name], markersize=6)
    axes.plot(x, survey.gaussians["full"] / survey.reference, color="black", linestyle=(0, (4, 2)), linewidth=1.1)
    axes.plot([], [], color=_TEXT_COLOUR, linewidth=1.0, linestyle="--", label="the same, told the\nreference's mean")
    axes.plot([], [], "o", color=_TEXT_COLOUR, label="leaves the tolerance")
    axes.plot([], [], "x", color=_TEXT_COLOUR, label="knee (Kneedle)")
    axes.set(yscale="log", ylim=(bottom, top), ylabel="error / error of the denoiser\ntrained on the reference")
    _plain_ticks(axes)
    _name_thresholds(axes, survey, top)


def _draw_distances(axes: Axes, survey: Survey, colours: dict[str, tuple[float, ...]]) -> None:
    for name, found in survey.distances.items():
        colour = colours.get(name, "black")
        label = "two parts of the reference" if name == REFERENCE else None
        axes.plot(survey.log_sigma, found.tv_upper, color=colour, linewidth=1.6, label=label)
        axes.plot(survey.log_sigma, found.tv_lower, color=colour, linewidth=1.0, linestyle=":")
    axes.plot([], [], color=_TEXT_COLOUR, linewidth=1.6, label="at most")
    axes.plot([], [], color=_TEXT_COLOUR, linewidth=1.0, linestyle=":", label="at least")
    axes.set(ylim=(0, 1.02), ylabel="total variation distance of\nnoised images to the reference's")


def _draw_thresholds(axes: Axes, survey: Survey) -> None:
    for value in (survey.proposal.tau1, survey.proposal.tau2):
        if value is not None:
            axes.axvline(value, color=_WITHIN_COLOUR, linewidth=1.2, linestyle="-.")


def _name_thresholds(axes: Axes, survey: Survey, top: float) -> None:
    found = survey.proposal
    if found.tau1 is not None:
        axes.annotate(f" tau1 = {found.tau1:.2f}\n {found.cleaning_family}", (found.tau1, top), va="top", fontsize=9, color=_WITHIN_COLOUR)
    if found.tau2 is not None:
        axes.annotate(f"tau2 = {found.tau2:.2f} \n{found.coarse_family} ", (found.tau2, top), ha="right", va="top", fontsize=9, color=_WITHIN_COLOUR)


def _plain_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _mark_sigma(axes: Axes) -> None:
    above = axes.secondary_xaxis("top", functions=(lambda x: x, lambda x: x))
    low, high = axes.get_xlim()
    marks = [sigma for sigma in (0.001, 0.01, 0.1, 1, 10, 100) if low <= np.log(sigma) <= high]
    above.set_xticks(np.log(marks), [f"{sigma:g}" for sigma in marks])
    above.set_xlabel("sigma")
