"""A survey as JSON, as a table for people, and as the line that a config takes."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table

from dpsyngen.config import RunConfig, SyntheticConfig
from dpsyngen.field_types import unconvert
from dpsyngen.stages.chosen import options_of
from dpsyngen.stages.elbows import RULE
from dpsyngen.stages.reference import Reference
from dpsyngen.stages.survey import REFERENCE, Distance, Effort, Survey

_OPTIMISER = ("learning_rate", "beta1", "beta2", "warmup", "decay", "decay_shape", "ema_decay")


def as_json(survey: Survey, config: RunConfig, reference: Reference, effort: Effort) -> dict[str, Any]:
    """stages.json: every curve, what it was measured with, and what is proposed by which rule."""
    return {
        "reference": {"name": reference.name, "private": reference.is_private, "statement": reference.statement,
                      "images_trained_on": survey.trained_on, "images_measured_on": survey.measured_on},
        "settings": {
            "seed": config.seed, "steps": effort.steps, "batch": effort.batch, "tolerance": effort.tolerance,
            "image_shape": list(config.data.image_shape), "network": unconvert(config.network), "precision": config.compute.precision,
            "optimiser": {name: getattr(config.synthetic, name) for name in _OPTIMISER},
            "family_options": {name: options_of(name, config.synthetic) for name in survey.families},
        },
        "log_sigma": survey.log_sigma.tolist(),
        "error": {"unit": "mean squared error per pixel of images in [-1, 1]", "reference": survey.reference.tolist(),
                  "families": _lists(survey.families), "families_with_known_mean": _lists(survey.with_known_mean),
                  "gaussians": _lists(survey.gaussians)},
        "excess": {"families": _lists(survey.excess(survey.families)), "families_with_known_mean": _lists(survey.excess(survey.with_known_mean)),
                   "gaussians": _lists(survey.excess(survey.gaussians))},
        "elbows": {"families": {name: asdict(found) for name, found in survey.elbows.items()},
                   "families_with_known_mean": {name: asdict(found) for name, found in survey.elbows_with_known_mean.items()},
                   "gaussian": asdict(survey.gaussian_elbows)},
        "distance": {name: _distance(found) for name, found in survey.distances.items()},
        "proposal": {**asdict(survey.proposal), "rule": RULE, "with_known_mean": asdict(survey.proposal_with_known_mean),
                     "line": config_line(survey), "custom_line": custom_line(survey, config.synthetic)},
    }  # fmt: skip


def table(survey: Survey) -> Table:
    """A row for each family: where it is as good as the reference-trained denoiser, and how far its images are."""
    title = (
        f"ln sigma up to which (tau1) and from which on (tau2) the error is within {100 * survey.tolerance:g} % of the reference-trained denoiser's"
    )
    shown = Table(title=title, title_justify="left")
    for heading in ("family", "tau1", "tau2", "tau2*", "knee 1", "knee 2", "W2"):
        shown.add_column(heading, justify="left" if heading == "family" else "right", no_wrap=True)
    for name, found in survey.elbows.items():
        thresholds = (found.tau1, found.tau2, survey.elbows_with_known_mean[name].tau2, found.knee1, found.knee2)
        shown.add_row(name, *map(_number, thresholds), f"{survey.distances[name].wasserstein:.1f}")
    closed = survey.gaussian_elbows
    shown.add_row("(Gaussian, no network)", *map(_number, (closed.tau1, closed.tau2, closed.tau2, closed.knee1, closed.knee2)),
                  f"{survey.distances[REFERENCE].wasserstein:.1f}")  # fmt: skip
    shown.caption = "* with the reference's mean known. Knees by Kneedle. W2 of images to the reference's, in the last row of its two parts."
    shown.caption_justify = "left"
    return shown


def remarks(survey: Survey) -> list[str]:
    """What the table means, a sentence each."""
    proposal, known, ends = survey.proposal, survey.proposal_with_known_mean, survey.log_sigma[[0, -1]]
    said = []
    if proposal.tau1 is None:
        said.append(f"Cleaning: no family is within tolerance at the smallest sigma (ln sigma = {ends[0]:.2f}), so nothing is proposed for tau1.")
    else:
        said.append(f"Cleaning: {proposal.cleaning_family}, up to ln sigma = {proposal.tau1:.2f}.")
    if proposal.tau2 is None:
        said.append(f"Coarse: no family is within tolerance at the largest sigma (ln sigma = {ends[1]:.2f}), so nothing is proposed for tau2.")
    else:
        said.append(f"Coarse: {proposal.coarse_family}, from ln sigma = {proposal.tau2:.2f} on.")
    if known.tau2 is not None:
        said.append(f"With the reference's mean known, {known.coarse_family} would be from ln sigma = {known.tau2:.2f} on.")
    if survey.gaussian_elbows.tau2 is not None:
        said.append(f"The Gaussian with the reference's mean and covariance is within tolerance from ln sigma = {survey.gaussian_elbows.tau2:.2f} "
                    "on: there the coarse stage needs no network.")  # fmt: skip
    if survey.untaught_until is not None:
        said.append(f"Up to ln sigma = {survey.untaught_until:.2f} the reference-trained denoiser itself does no better than shrinking by a number: "
                    "equal means equally untaught there, unless more --steps change it.")  # fmt: skip
    if proposal.covers_everything:
        said.append("The two ends meet: as far as this training went, the reference's own images teach nothing that a family doesn't.")
    return said


def config_line(survey: Survey) -> str:
    """The line for a config, in YAML; null stands for what isn't proposed, and a comment says so."""
    proposal = survey.proposal
    if proposal.covers_everything:
        return "stages: {tau1: null, tau2: null}  # the two ends meet: nothing is left between them"
    values = {"tau1": proposal.tau1, "tau2": proposal.tau2}
    missing = [name for name, value in values.items() if value is None]
    line = "stages: {" + ", ".join(f"{name}: {'null' if value is None else f'{value:.2f}'}" for name, value in values.items()) + "}"
    return f"{line}  # leave out {' and '.join(missing)}: no family is as good there" if missing else line


def custom_line(survey: Survey, config: SyntheticConfig) -> str | None:
    """The same as stages of one's own, each with its family, in YAML; None where `config_line` proposes nothing."""
    found = survey.proposal
    if found.covers_everything or (found.tau1 is None and found.tau2 is None):
        return None
    context: dict[str, Any] = {"name": "context", "source": "private"}
    context |= {} if found.tau1 is None else {"lower": found.tau1}
    context |= {} if found.tau2 is None else {"upper": found.tau2}
    stages = [context]
    for name, family, bound in (("cleaning", found.cleaning_family, {"upper": found.tau1}), ("coarse", found.coarse_family, {"lower": found.tau2})):
        if family is not None:
            options = options_of(family, config)
            stages.append({"name": name, "source": "synthetic", **bound, "family": family, **({"options": options} if options else {})})
    return "stages: " + json.dumps({"variant": "custom", "custom": stages})


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _lists(arrays: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: array.tolist() for name, array in arrays.items()}


def _distance(found: Distance) -> dict[str, Any]:
    return {"w2_assignment": found.wasserstein, "w2_gelbrich": found.gelbrich, "kl_upper": found.kl_upper.tolist(),
            "tv_upper": found.tv_upper.tolist(), "tv_lower": found.tv_lower.tolist()}  # fmt: skip
