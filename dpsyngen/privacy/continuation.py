"""Which plan a run goes on with: its own, or one for other privacy settings that counts what was spent under the old ones."""

import math
from dataclasses import dataclass

from dpsyngen.checkpoint import load_newest
from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError
from dpsyngen.privacy.accounting import Mechanism, SubsampledGaussianMechanism
from dpsyngen.privacy.journal import Journal, Spending
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.run_directory import CHANGED_PRIVACY_FLAG, RunDirectory

_SETTINGS = {
    "target_epsilon": "privacy.epsilon", "delta": "privacy.delta", "clipping_norm": "privacy.clipping_norm",
    "expected_size": "data.expected_size", "batch_size": "private.batch_size", "end": "private.steps",
    "noise_multiplicity": "private.noise_multiplicity",
}  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """A part of a run that had one plan, and what was begun under it. `plan.before` is what the segments before it began."""

    plan: PrivacyPlan
    spending: Spending

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """All that had touched private images at the segment's end, from the run's beginning."""
        begun = self.plan.mechanisms(self.spending.steps, self.spending.means_releases)
        return tuple(one for one in begun if not (isinstance(one, SubsampledGaussianMechanism) and one.steps == 0))


def segments_of(journal: Journal) -> tuple[Segment, ...]:
    """The parts of a private run, from its journal alone; InputError if that doesn't say under which plans the steps were begun."""
    segments: list[Segment] = []
    for record, spending in journal.segments:
        try:
            plan = PrivacyPlan.from_record(record or {}, segments[-1].mechanisms if segments else ())
        except (TypeError, LookupError) as error:
            raise InputError(f"{journal.path}: expected the plan of each attempt; without it nobody knows what was spent") from error
        segments.append(Segment(plan, spending))
    return tuple(segments)


def plan_for(config: RunConfig, expected_size: int, run: RunDirectory, *, changed_privacy: bool) -> PrivacyPlan:
    """The plan that a run begins or goes on with; writes nothing.

    A run that has touched private images keeps the plan in its journal, whose noise is drawn already. If the privacy settings aren't
    those of that plan, InputError; with `changed_privacy` a plan for what is left to do, calibrated so that all together stays
    within the new target, and InputError if nothing is left of it.
    """
    segments = segments_of(Journal(run.journal, writable=False))
    if not segments:
        return PrivacyPlan.calibrate(config, expected_size)
    old, new = segments[-1].plan, PrivacyPlan.with_noise(config, expected_size, 0.0)
    changes = _changes(old, new)
    if not changes:
        return old
    if not changed_privacy:
        raise InputError(f"{run.path}: was begun with another {changes[0]}; expected the same, or {CHANGED_PRIVACY_FLAG}")
    newest = load_newest(run.checkpoints, quiet=True)
    position = {} if newest is None else newest.state
    reached = position["step"] if position.get("phase") == "private" else 0
    return new.continuing(segments[-1].mechanisms, reached, has_class_means=bool(position.get("has_class_means", False)))


def _changes(old: PrivacyPlan, new: PrivacyPlan) -> list[str]:
    """The settings that differ, each with both values. The share of class means that were released under an earlier plan is settled."""
    changes = [
        f"{setting} ({getattr(old, name)!r}, not {getattr(new, name)!r})"
        for name, setting in _SETTINGS.items()
        if getattr(old, name) != getattr(new, name)
    ]
    if not changes and old.class_means is not None and new.class_means is not None:
        shares = [means.noise_multiplier / means.rounds**0.5 for means in (old.class_means, new.class_means)]
        if not math.isclose(*shares, rel_tol=1e-6):
            changes.append("hints.share")
    return changes
