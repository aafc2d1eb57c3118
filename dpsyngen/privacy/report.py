"""privacy.json: what is claimed, of what, and with which caveats."""

from typing import Any

from dpsyngen.config import RunConfig
from dpsyngen.privacy.journal import Spending
from dpsyngen.privacy.plan import PrivacyPlan

UNIT = "one image"
ADJACENCY = "neighbouring datasets differ by adding or removing one image"
ACCOUNTANT = "dp-accounting, privacy loss distributions, pessimistic estimate; the larger epsilon of adding and removing"

SECURE_NOISE = "secure: Gaussians rounded exactly to a grid, on exact sums of integers"


def privacy_report(plan: PrivacyPlan | None, spending: Spending, config: RunConfig, *, status: str, guaranteed: bool) -> dict[str, Any]:
    """The content of privacy.json; contains nothing that depends on the images.

    While a run is under way epsilon is already the whole plan's, so the file never understates what was spent.
    """
    if plan is None:
        return {
            "status": status,
            "epsilon": None,
            "guarantee": "none: variant nonprivate trains on the private images without any protection",
            "caveats": caveats(config, None, guaranteed=True),
        }
    steps = spending.steps if status == "finished" else max(plan.steps, spending.steps)
    return {
        "status": status,
        "unit": UNIT,
        "adjacency": ADJACENCY,
        "epsilon": plan.epsilon_after(steps, max(1, spending.means_releases)) if guaranteed else None,
        "target_epsilon": plan.target_epsilon,
        "delta": plan.delta,
        "accountant": ACCOUNTANT,
        "mechanisms": _mechanisms(plan, steps, max(1, spending.means_releases)),
        "steps_begun": spending.steps,
        "randomness": (
            f"256-bit key from the operating system; BLAKE2b-derived {_generator(plan)} substreams, one per (purpose, attempt, step, chunk)"
            if guaranteed
            else "privacy.unsafe_fixed_key: the noise is known, NOTHING IS GUARANTEED"
        ),
        **({"noise": SECURE_NOISE} if plan.secure_noise else {}),
        "public_inputs": {
            "expected_size": plan.expected_size, "num_classes": config.data.num_classes, "image_shape": list(config.data.image_shape),
        },
        "caveats": caveats(config, plan, guaranteed=guaranteed),
    }  # fmt: skip


def _generator(plan: PrivacyPlan) -> str:
    return "AES-256 counter mode" if plan.secure_noise else "Philox"


def _mechanisms(plan: PrivacyPlan, steps: int, releases: int) -> list[dict[str, Any]]:
    mechanisms: list[dict[str, Any]] = []
    if plan.class_means is not None:
        means = plan.class_means
        mechanisms.append({
            "name": "DP class means", "type": "Gaussian", "releases": releases, "noise_multiplier": means.noise_multiplier, "sensitivity": 1.0,
            "centre": means.centre, "radius": means.radius, "count_weight": means.count_weight, "count_floor": means.count_floor,
        })  # fmt: skip
    mechanisms.append({
        "name": "DP-SGD", "type": "Poisson-subsampled Gaussian", "steps": steps, "noise_multiplier": plan.noise_multiplier,
        "sampling_rate": plan.sampling_rate, "expected_batch_size": plan.batch_size, "clipping_norm": plan.clipping_norm,
        "noise_multiplicity": plan.noise_multiplicity,
    })  # fmt: skip
    return mechanisms


def caveats(config: RunConfig, plan: PrivacyPlan | None, *, guaranteed: bool) -> list[str]:
    """What a reader must know beside the numbers."""
    found = ["hyperparameters that were chosen by looking at private results cost privacy that this epsilon doesn't include"]
    if not guaranteed:
        found.append("a fixed key was used: nothing is guaranteed")
    if config.data.expected_size is None:
        found.append("data.expected_size was taken from the data; the guarantee treats the dataset's size as public")
    if config.data.source == "folder" and config.data.num_classes and config.data.class_names is None:
        found.append("the class list was taken from the data; the guarantee treats it as public")
    if plan is not None and plan.delta >= 1 / plan.expected_size:
        found.append(f"delta = {plan.delta:g} is not below 1 / {plan.expected_size}: a mechanism that publishes one random image would satisfy it")
    if config.tracking.log_private_diagnostics_without_dp:
        found.append("private diagnostics were logged without protection; logs are not covered by the guarantee")
    return found
