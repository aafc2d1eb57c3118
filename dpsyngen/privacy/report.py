"""privacy.json: what is claimed, of what, and with which caveats."""

from collections.abc import Sequence
from typing import Any

from dpsyngen.config import RunConfig
from dpsyngen.privacy.continuation import Segment
from dpsyngen.privacy.journal import Spending
from dpsyngen.privacy.plan import PrivacyPlan

UNIT = "one image"
ADJACENCY = "neighbouring datasets differ by adding or removing one image"
ACCOUNTANT = "dp-accounting, privacy loss distributions, pessimistic estimate; the larger epsilon of adding and removing"

CHOICE_NOT_INCLUDED = "hyperparameters that were chosen by looking at private results cost privacy that this epsilon doesn't include"
"""A caveat of every run but the winner of a selection, which has paid for the choice (`dpsyngen.sweep.terms`)."""
SECURE_NOISE = "secure: Gaussians rounded exactly to a grid, on exact sums of integers"


CHANGED = (
    "the privacy settings were changed during the run; epsilon is that of all mechanisms together if the new settings were chosen "
    "without looking at anything that the private images had a part in (weights, samples, metrics)"
)


def privacy_report(
    plan: PrivacyPlan | None,
    spending: Spending,
    config: RunConfig,
    *,
    status: str,
    guaranteed: bool,
    earlier: Sequence[Segment] = (),
    end: Spending | None = None,
) -> dict[str, Any]:
    """The content of privacy.json; contains nothing that depends on the images.

    `spending` is under `plan`, after the segments `earlier`. In a run under way it is an upper bound of what was begun until the file is
    written again, and `end` is what will have been begun under the plan when the run is finished.
    """
    if plan is None:
        return {
            "status": status,
            "epsilon": None,
            "guarantee": "none: this run trains on the private images without any protection",
            "caveats": caveats(config, None, guaranteed=True),
        }
    before = sum(segment.spending.steps for segment in earlier)
    return {
        "status": status,
        "unit": UNIT,
        "adjacency": ADJACENCY,
        "epsilon": plan.epsilon_after(spending.steps, spending.means_releases) if guaranteed else None,
        "target_epsilon": plan.target_epsilon,
        "delta": plan.delta,
        "accountant": ACCOUNTANT,
        "mechanisms": [mechanism for segment in (*earlier, Segment(plan, spending)) for mechanism in mechanisms_of(segment)],
        "steps_begun" if end is None else "steps_begun_at_most": before + spending.steps,
        **({} if end is None else {"at_the_end": {
            "steps_begun": before + end.steps, "epsilon": plan.epsilon_after(end.steps, end.means_releases) if guaranteed else None,
        }}),
        "randomness": (
            f"256-bit key from the operating system; BLAKE2b-derived {_generator(plan)} substreams, one per (purpose, attempt, step, chunk)"
            if guaranteed
            else "privacy.unsafe_fixed_key: the noise is known, NOTHING IS GUARANTEED"
        ),
        **({"noise": SECURE_NOISE} if plan.secure_noise else {}),
        "public_inputs": {
            "expected_size": plan.expected_size, "num_classes": config.data.num_classes, "image_shape": list(config.data.image_shape),
        },
        "caveats": [*caveats(config, plan, guaranteed=guaranteed), *([CHANGED] if earlier else [])],
    }  # fmt: skip


def _generator(plan: PrivacyPlan) -> str:
    return "AES-256 counter mode" if plan.secure_noise else "Philox"


def mechanisms_of(segment: Segment) -> list[dict[str, Any]]:
    """The mechanisms of one segment that have been begun, each with its parameters."""
    plan, spending, mechanisms = segment.plan, segment.spending, []
    if plan.class_means is not None and spending.means_releases:
        means = plan.class_means
        mechanisms.append({
            "name": "DP class means", "type": "Gaussian", "releases": spending.means_releases, "rounds": means.rounds,
            "noise_multiplier": means.noise_multiplier, "prototypes": means.prototypes,
            "sensitivity": 1.0, "centre": means.centre, "radius": means.radius, "count_weight": means.count_weight, "count_floor": means.count_floor,
        })  # fmt: skip
    if plan.covariance is not None and spending.means_releases:
        covariance = plan.covariance
        mechanisms.append({
            "name": "DP covariance", "type": "Gaussian", "releases": spending.means_releases, "noise_multiplier": covariance.noise_multiplier,
            "sensitivity": 1.0, "radius": covariance.radius, "resolution": covariance.resolution, "rank": covariance.rank,
        })  # fmt: skip
    if plan.teacher is not None and spending.means_releases:
        teacher = plan.teacher
        mechanisms.append({
            "name": "DP teacher", "type": "Gaussian", "releases": spending.means_releases, "steps": teacher.steps,
            "noise_multiplier": teacher.noise_multiplier, "sensitivity": 1.0, "learning_rate": teacher.learning_rate,
        })  # fmt: skip
    if spending.steps:
        mechanisms.append({
            "name": "DP-SGD", "type": "Poisson-subsampled Gaussian", "steps": spending.steps, "noise_multiplier": plan.noise_multiplier,
            "sampling_rate": plan.sampling_rate, "expected_batch_size": plan.batch_size, "clipping_norm": plan.clipping_norm,
            "clipping": plan.clipping, **({} if plan.clipping_stability is None else {"clipping_stability": plan.clipping_stability}),
            "noise_multiplicity": plan.noise_multiplicity,
        })  # fmt: skip
    return mechanisms


def caveats(config: RunConfig, plan: PrivacyPlan | None, *, guaranteed: bool) -> list[str]:
    """What a reader must know beside the numbers."""
    found = [CHOICE_NOT_INCLUDED]
    if not guaranteed:
        found.append("a fixed key was used: nothing is guaranteed")
    if config.data.expected_size is None:
        found.append("data.expected_size was taken from the data; the guarantee treats the dataset's size as public")
    if config.data.source in ("folder", "zip") and config.data.num_classes and config.data.class_names is None:
        found.append("the class list was taken from the data; the guarantee treats it as public")
    if plan is not None and plan.delta >= 1 / plan.expected_size:
        found.append(f"delta = {plan.delta:g} is not below 1 / {plan.expected_size}: a mechanism that publishes one random image would satisfy it")
    if config.tracking.log_private_diagnostics_without_dp:
        found.append("private diagnostics were logged without protection; logs are not covered by the guarantee")
    return found
