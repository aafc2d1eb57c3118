"""What a plan costs, for programs, for the terminal and as a picture; everything in it is public."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from tqdm import tqdm

from dpsyngen.errors import InputError
from dpsyngen.files import write_file
from dpsyngen.privacy import accounting
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.report import ACCOUNTANT, ADJACENCY, UNIT

PICTURE_FORMATS = (".png", ".svg", ".pdf")
_POINTS_OF_CURVE = 32


def price(plan: PrivacyPlan, *, renyi: bool = False) -> dict[str, Any]:
    """Everything that the plan's epsilon follows from, and epsilon; ready for JSON. With `renyi` also the bound by Renyi DP."""
    mechanisms = plan.mechanisms(plan.steps)
    epsilon = plan.epsilon_after(plan.steps)
    result = {
        "unit": UNIT,
        "adjacency": ADJACENCY,
        "epsilon": epsilon,
        "target_epsilon": plan.target_epsilon,
        "delta": plan.delta,
        "accountant": ACCOUNTANT,
        "discretisation": accounting.interval_of(mechanisms),
        "gaussian_dp_mu": accounting.gaussian_mu(epsilon, plan.delta) if epsilon > 0 else 0.0,
        "expected_size": plan.expected_size,
        "sampling_rate": plan.sampling_rate,
        "expected_batch_size": plan.batch_size,
        "steps": plan.steps,
        "noise_multiplicity": plan.noise_multiplicity,
        "clipping_norm": plan.clipping_norm,
        "clipping": plan.clipping,
        "mechanisms": [
            asdict(mechanism) | {"epsilon_alone": accounting.epsilon_of((mechanism,), plan.delta)}  # type: ignore[call-overload]
            for mechanism in mechanisms
        ],
    }
    return result | ({"renyi_epsilon": accounting.renyi_epsilon_of(mechanisms, plan.delta)} if renyi else {})


def price_tables(result: dict[str, Any], title: str) -> tuple[Table, Table]:
    """What `price` returned as two tables for the terminal: the plan with its epsilon, and its mechanisms."""
    summary = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    noise = f"{result['noise_multiplicity']} (sigma, noise) pairs an image, averaged before clipping"
    for name, value in [
        ("unit", result["unit"]),
        ("adjacency", result["adjacency"]),
        ("images N", f"{result['expected_size']:,} (declared)"),
        ("sampling rate q", f"{result['sampling_rate']:.6g}, batches of {result['expected_batch_size']:,} on average"),
        ("steps", f"{result['steps']:,}"),
        ("noise multiplicity K", noise),
        ("clipping norm C", f"{result['clipping_norm']:g}" + (", automatic" if result["clipping"] == "automatic" else "")),
        ("delta", f"{result['delta']:g}"),
        ("accountant", result["accountant"]),
        ("discretisation", f"{result['discretisation']:.3g}"),
    ]:
        summary.add_row(name, value)
    mechanisms = Table(title_justify="left")
    mechanisms.add_column("mechanism")
    mechanisms.add_column("parameters")
    mechanisms.add_column("epsilon", justify="right")
    for mechanism in result["mechanisms"]:
        parameters = (f"{name.replace('_', ' ')} {value:,.6g}" for name, value in mechanism.items() if name not in ("name", "epsilon_alone"))
        mechanisms.add_row(mechanism["name"], ", ".join(parameters), f"{mechanism['epsilon_alone']:.4g}")
    mechanisms.add_section()
    mechanisms.add_row("together: the claim", f"target {result['target_epsilon']:g}", f"{result['epsilon']:.4g}", style="bold")
    if "renyi_epsilon" in result:
        mechanisms.add_row("together by Renyi DP", "for comparison only", f"{result['renyi_epsilon']:.4g}")
    mechanisms.add_row("together as Gaussian DP", "of equal epsilon and delta", f"mu = {result['gaussian_dp_mu']:.4g}")
    return summary, mechanisms


def save_curve(plan: PrivacyPlan, path: Path, title: str) -> None:
    """Draw epsilon as a function of the private steps, from none to all, with the target.

    Raises InputError if `path` can't be written or doesn't end in one of PICTURE_FORMATS.
    """
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise InputError(f"{path}: expected a name that ends in {', '.join(PICTURE_FORMATS)}")
    steps = np.unique((plan.steps * np.linspace(0, 1, _POINTS_OF_CURVE) ** 2).round().astype(int)).tolist()  # dense where it is steep
    epsilons = [plan.epsilon_after(step) for step in tqdm(steps, desc="epsilon", unit="point", delay=2, leave=False, disable=None)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Axes = figure.subplots()
    axes.plot(steps, epsilons, color="#4878a8", linewidth=2, label="spent: the claim (PLD)")
    axes.axhline(plan.target_epsilon, color="#444444", linewidth=1, linestyle="--", label=f"target: {plan.target_epsilon:g}")
    axes.set_xlim(0, max(1, plan.steps))
    axes.set_ylim(0, 1.08 * max(plan.target_epsilon, *epsilons, 0.0))
    axes.set_xlabel("private steps")
    axes.set_ylabel(f"epsilon at delta = {plan.delta:g}")
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower()[1:], dpi=150)
    write_file(path, buffer.getvalue())
