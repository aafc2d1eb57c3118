"""The terms of a selection: how many runs on average, of which settings, with how much noise, so that the choice is paid for.

All of it is public and settled before anything runs.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from dpsyngen.cli import dump_config
from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError
from dpsyngen.field_types import plain
from dpsyngen.privacy import accounting
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.repeats import Repeats, repeated_epsilon
from dpsyngen.privacy.report import CHOICE_NOT_INCLUDED
from dpsyngen.sweep.grid import Cell
from dpsyngen.sweep.score import Score

# Calibration ends when epsilon is at most this part below its target.
_TOLERANCE = 5e-3
_LEAST_EPSILON = 1e-3  # of privacy.epsilon
_SETTLED = ("data.", "evaluation.", "privacy.epsilon", "privacy.delta", "privacy.unsafe_fixed_key", "tracking.")


@dataclass(frozen=True)
class Terms:
    """What a selection does and costs.

    Guarantee: K runs, K drawn from `repeats`, each with a key of its own and a setting drawn uniformly from `cells`, with replacement, of
    which only the one with the highest score is shown, are (epsilon, delta)-DP for adding or removing one image, of those that
    are trained on or those that a score with noise is counted on.
    """

    cells: tuple[Cell, ...]
    """The settings; each config's privacy.epsilon is what one run costs by itself."""
    plans: tuple[PrivacyPlan, ...]
    """What a run of each setting spends."""
    repeats: Repeats
    score: Score
    target_epsilon: float
    epsilon: float

    @classmethod
    def calibrate(cls, cells: Sequence[Cell], repeats: Repeats, score: Score) -> "Terms":
        """The least noise with which the selection as a whole costs at most `privacy.epsilon` of the cells, within one percent.

        Raises InputError for settings that can't be selected among, or a target that can't pay for it.
        """
        _expect_selectable(cells)
        target, delta = cells[0].config.privacy.epsilon, cells[0].config.privacy.delta

        @functools.cache
        def cost(epsilon: float) -> float:
            spent = {plan.mechanisms(plan.steps) + score.mechanisms for plan in _plans(cells, epsilon)}
            return repeated_epsilon(spent, repeats, delta)

        if (least := cost(_LEAST_EPSILON)) > target:
            raise InputError(f"privacy.epsilon: expected at least {least:.3g}, what choosing alone costs here: fewer runs or more noise on the score "
                             f"cost less; got {target:g}")  # fmt: skip
        # smallest_noise wants a falling function, so it searches the inverse of epsilon
        inverse = accounting.smallest_noise(lambda inverse: cost(max(_LEAST_EPSILON, 1 / inverse)), target, 2 / target, _TOLERANCE)
        alone = max(_LEAST_EPSILON, 1 / inverse)
        priced = tuple(replace(cell, config=_at(cell.config, alone)) for cell in cells)
        return cls(priced, _plans(cells, alone), repeats, score, target, cost(alone))

    @property
    def delta(self) -> float:
        """Of the selection, and of a run by itself."""
        return self.plans[0].delta

    @property
    def epsilon_alone(self) -> float:
        """At most what one run would cost by itself."""
        return self.cells[0].config.privacy.epsilon

    def record(self) -> dict[str, Any]:
        """What the winner's privacy.json says of the selection, ready for JSON."""
        return {
            "runs": f"a random number, {self.repeats.distribution}, drawn beforehand and never shown",
            "mean_runs": self.repeats.mean,
            "shape": None if self.repeats.distribution == "poisson" else self.repeats.shape,
            "settings": len(self.cells),
            "settings_drawn": "uniformly, with replacement",
            "fields": list(self.cells[0].values),
            "score": self.score.description,
            "epsilon_of_one_run_by_itself": self.epsilon_alone,
        }

    def identity(self) -> dict[str, Any]:
        """What has to be the same when a selection is resumed, ready for JSON."""
        digest = hashlib.sha256("\0".join(dump_config(cell.config) for cell in self.cells).encode()).hexdigest()
        values = [{field: plain(value) for field, value in cell.values.items()} for cell in self.cells]
        return self.record() | {"epsilon": self.epsilon, "delta": self.delta, "grid": values, "configs_sha256": digest}

    def report(self, run: dict[str, Any]) -> dict[str, Any]:
        """The winner's privacy.json from that of the run: the same mechanisms, the price of the whole selection."""
        score = [{"name": "score", "type": "Gaussian", "noise_multiplier": self.score.noise, "sensitivity": 1.0}] if self.score.mechanisms else []
        theorem = "Theorem 6" if self.repeats.distribution == "poisson" else "Theorem 2"
        kept: dict[str, Any] = {name: run[name] for name in ("randomness", "noise", "public_inputs") if name in run}
        return {
            "status": run["status"],
            "unit": run["unit"],
            "adjacency": run["adjacency"],
            "epsilon": self.epsilon,
            "target_epsilon": self.target_epsilon,
            "delta": self.delta,
            "accountant": f"dp-accounting, Renyi DP of repeat and select (Papernot and Steinke, arXiv 2110.03620, {theorem}); the choice of the "
            "run is in it, which privacy loss distributions can't price",
            "selection": self.record(),
            "mechanisms": [*run["mechanisms"], *score],
            **kept,
            "caveats": [
                f"the choice among {len(self.cells)} settings is in this epsilon; other choices by private results aren't",
                "privacy.epsilon in config.yaml is what one run would cost by itself, not the claim",
                "how many runs there were, how long they took and all other runs must stay secret",
                *(caveat for caveat in run["caveats"] if caveat != CHOICE_NOT_INCLUDED),
            ],
        }

    def table(self) -> Table:
        """The price, for the terminal, before anything runs."""
        table = Table(title="Selection: the best of a random number of runs, paid for", title_justify="left", show_header=False, box=None,
                      padding=(0, 2, 0, 0))  # fmt: skip
        single = _plans(self.cells, self.target_epsilon)
        rows = [
            ("settings", f"{len(self.cells)}, one drawn for each run, with replacement"),
            ("runs", f"{self.repeats.mean:g} on average, {self.repeats.distribution}; how many it were stays secret"),
            ("score", self.score.description),
            ("the winner", f"epsilon = {self.epsilon:.4g} (target {self.target_epsilon:g}) at delta = {self.delta:g}, by Renyi DP"),
            ("a run by itself", f"epsilon = {self.epsilon_alone:.4g} at delta = {self.delta:g}, by privacy loss distributions"),
            ("noise of DP-SGD", f"{_range(self.plans)}; for a single run without a choice it would be {_range(single)}"),
        ]
        if self.repeats.distribution == "poisson":
            rows.append(("no run at all", f"with probability {math.exp(-self.repeats.mean):.2g}: then there is no winner"))
        for name, value in rows:
            table.add_row(name, value)
        return table


def _range(plans: Sequence[PrivacyPlan]) -> str:
    low, high = (bound(plan.noise_multiplier for plan in plans) for bound in (min, max))
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _plans(cells: Sequence[Cell], epsilon: float) -> tuple[PrivacyPlan, ...]:
    """Each cell's plan if a run by itself may cost `epsilon`; cells that touch private images alike are calibrated once."""
    noise: dict[tuple[object, ...], float] = {}
    plans = []
    for cell in cells:
        size = cell.config.data.expected_size
        if size is None:
            raise InputError("data.expected_size: expected a number, since null counts the private images")
        config = _at(cell.config, epsilon)
        alike = (config.private.batch_size, config.private_steps(size), config.hints.kind, config.hints.share)
        if alike not in noise:
            noise[alike] = PrivacyPlan.calibrate(config, size).noise_multiplier
        plans.append(PrivacyPlan.with_noise(config, size, noise[alike]))
    return tuple(plans)


def _at(config: RunConfig, epsilon: float) -> RunConfig:
    return replace(config, privacy=replace(config.privacy, epsilon=epsilon))


def _expect_selectable(cells: Sequence[Cell]) -> None:
    """Raise InputError unless the settings differ in nothing but what may be chosen, and each is private in full."""
    for field in cells[0].values:
        if field.startswith(_SETTLED):
            raise InputError(f"--grid {field}: expected a field that training or sampling depends on, since a selection has one of these")
    for config in (cell.config for cell in cells):
        if not config.is_private:
            raise InputError("stages.variant: expected variants under differential privacy, got nonprivate, which guarantees nothing")
        if config.privacy.unsafe_fixed_key is not None:
            raise InputError("privacy.unsafe_fixed_key: expected null, since each run needs a key of its own")
        if config.tracking.log_private_diagnostics_without_dp:
            raise InputError("tracking.log_private_diagnostics_without_dp: expected false, since the winner's log leaves with it")
        if config.tracking.trackers:
            raise InputError(f"tracking.trackers: expected none, since they would count the runs, got {', '.join(config.tracking.trackers)}")
