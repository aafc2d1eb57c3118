"""What a run has spent, worked out from its journal alone, and whether privacy.json says no less."""

import json
from typing import Any

from dpsyngen.errors import InputError
from dpsyngen.privacy.accounting import epsilon_of
from dpsyngen.privacy.continuation import segments_of
from dpsyngen.privacy.journal import Journal
from dpsyngen.privacy.report import ACCOUNTANT, ADJACENCY, UNIT, mechanisms_of
from dpsyngen.run_directory import RunDirectory


def spent(run: RunDirectory) -> dict[str, Any]:
    """What was begun so far in a run under way, or in the end; ready for JSON. Writes nothing, so it may be called while a run trains.

    The steps may be ahead of the weights: what a crash took was spent all the same. `stated` is what privacy.json says.
    Raises InputError if there is no journal, if it lists nothing with a price, or if privacy.json understates it.
    """
    if not run.journal.is_file():
        raise InputError(f"{run.journal}: expected the journal of a run that has begun its private phase, but there is no such file")
    journal = Journal(run.journal, writable=False)
    stated = _stated(run)  # later than the journal, behind which it never falls
    if stated.get("mechanisms") is None:
        raise InputError(f"{run.privacy}: expected a run under differential privacy, got one without any guarantee")
    segments = segments_of(journal)
    plan, mechanisms = segments[-1].plan, segments[-1].mechanisms
    found = {
        "unit": UNIT,
        "adjacency": ADJACENCY,
        "epsilon": epsilon_of(mechanisms, plan.delta),
        "delta": plan.delta,
        "accountant": ACCOUNTANT,
        "steps_begun": journal.spending.steps,
        "mechanisms": [mechanism for segment in segments for mechanism in mechanisms_of(segment)],
        "attempts": journal.attempt + 1,
        "stated": {name: stated[name] for name in ("status", "epsilon", "steps_begun", "steps_begun_at_most") if name in stated},
    }
    _expect_no_less(run, found)
    return found


def lines_of(found: dict[str, Any]) -> list[str]:
    """What `spent` found, for people."""
    stated = found["stated"]
    lines = [f"begun, by the journal: {found['steps_begun']:,} private steps in {found['attempts']} attempts"]
    for mechanism in found["mechanisms"]:
        parameters = (f"{name.replace('_', ' ')} {value:,.6g}" for name, value in mechanism.items() if not isinstance(value, str))
        lines.append(f"  {mechanism['name']}: {', '.join(parameters)}")
    lines.append(f"spent: epsilon = {found['epsilon']:.6g} at delta = {found['delta']:g}; the unit is {found['unit']}; {found['adjacency']}")
    if stated["epsilon"] is None:
        return [*lines, "NOTHING IS GUARANTEED all the same: the run has a fixed key"]
    most = "" if stated["status"] == "finished" else "at most "
    return [*lines, f"privacy.json ({stated['status']}) says {most}{stated['epsilon']:.6g}, which covers it"]


def _stated(run: RunDirectory) -> dict[str, Any]:
    try:
        return dict(json.loads(run.privacy.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{run.privacy}: expected the JSON that train.py wrote ({error})") from error


def _expect_no_less(run: RunDirectory, found: dict[str, Any]) -> None:
    stated = found["stated"]
    steps = stated.get("steps_begun", stated.get("steps_begun_at_most", -1))
    understated = stated["epsilon"] is not None and stated["epsilon"] < found["epsilon"] * (1 - 1e-9)
    if steps < found["steps_begun"] or understated:
        raise InputError(f"{run.privacy}: states epsilon = {stated['epsilon']} for {steps} private steps, expected at least {found['epsilon']:.6g} "
                         f"for the {found['steps_begun']} that the journal lists")  # fmt: skip
