"""The journal: what was begun on private images, written before it begins, so that a crash never forgets spending."""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dpsyngen.errors import InputError
from dpsyngen.files import writing
from synthetic_generators import code_files

MEANS = "class_means"


@dataclass(frozen=True)
class Spending:
    """How much was begun: private steps, and releases of the class means."""

    steps: int
    means_releases: int


class Journal:
    """Lines of JSON in runs/NAME/private/journal.jsonl, mode 0600, each on disk before the work it announces.

    A line {"attempt": a, "fingerprint": f, "weights": w, "plan": {...}} opens an attempt on the weights of digest w under a plan (null where
    nothing is guaranteed), {"attempt": a, "step": t} announces step t (or the class means). Announcing again what the same attempt announced
    is a replay with the same draws and costs nothing, which holds only while the fingerprint is unchanged, and on the weights that the draws
    met before. Otherwise a new attempt opens: its draws are fresh, and the steps begun since the checkpoint were paid for in vain.

    `ahead` is called with what will have been begun under the current plan, before a line that adds to it is written.
    Raises InputError for a file that isn't a journal.
    """

    def __init__(self, path: Path, *, writable: bool = True) -> None:
        self.path = path
        self.writable = writable
        self.attempt = -1
        self.fingerprint = ""
        self.weights: str | None = None
        """Digest of the weights that the last attempt began on; None where an earlier version wrote its line."""
        self.ahead: Callable[[Spending], None] = lambda coming: None
        self.segments: list[tuple[dict[str, Any] | None, Spending]] = []
        """The plans in their order, each as its attempts' lines have it, and what was begun under it; replays counted once."""
        self._begun: set[tuple[int, int | str]] = set()
        try:
            for entry in _complete_lines(path, repair=writable):
                self._apply(entry)
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path}: expected the journal of this run's private steps; without it nobody knows what was spent") from error

    @property
    def plan(self) -> dict[str, Any] | None:
        """What the last attempt's line says of its plan."""
        return self.segments[-1][0] if self.segments else None

    def open_attempt(self, fingerprint: str, weights: str, *, computed_by: int | None = None, plan: dict[str, Any] | None = None) -> None:
        """Go on with the last attempt if fingerprint and plan are these and its own weights are at hand, else open the next.

        `weights` is a digest of the weights at hand, and of all else that the next step starts from; `computed_by` is the attempt whose
        checkpoint they are, None if they come from before the first. They are the last attempt's own if it has computed them, or began on them.
        On all others the same draws would meet other weights, and the difference of the two results is free of noise.
        `plan` is what is to be known of the plan to price it, ready for JSON; the last attempt's if None.
        """
        plan = self.plan if plan is None else plan
        own = computed_by == self.attempt or weights == self.weights
        if self.fingerprint != fingerprint or plan != self.plan or not own:
            self._write({"attempt": self.attempt + 1, "fingerprint": fingerprint, "weights": weights, "plan": plan})

    def begin(self, what: int | str) -> None:
        """Announce a step number or MEANS; returns once the announcement is on disk."""
        if not self.has_begun(what):
            self.ahead(_added(self.segments[-1][1], what))
            self._write({"attempt": self.attempt, "step": what})

    def has_begun(self, what: int | str) -> bool:
        """Whether this attempt announced it before, so that beginning it again is a replay."""
        return (self.attempt, what) in self._begun

    @property
    def spending(self) -> Spending:
        """Everything that was begun under any plan, replays counted once."""
        return Spending(sum(spent.steps for _, spent in self.segments), sum(spent.means_releases for _, spent in self.segments))

    def begun_since(self, step: int) -> int:
        """How many steps of this attempt from `step` on were begun, which a resume from there can replay free."""
        return sum(1 for attempt, what in self._begun if attempt == self.attempt and isinstance(what, int) and what >= step)

    def _apply(self, entry: dict[str, Any]) -> None:
        if "fingerprint" in entry:
            self.attempt, self.fingerprint, self.weights = entry["attempt"], entry["fingerprint"], entry.get("weights")
            if not self.segments or entry["plan"] != self.plan:
                self.segments.append((entry["plan"], Spending(0, 0)))
        elif (entry["attempt"], entry["step"]) not in self._begun:
            self._begun.add((entry["attempt"], entry["step"]))
            plan, spent = self.segments.pop()
            self.segments.append((plan, _added(spent, entry["step"])))

    def _write(self, entry: dict[str, Any]) -> None:
        if self.writable:
            with writing(self.path), os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._apply(entry)


def _added(spent: Spending, what: int | str) -> Spending:
    return Spending(spent.steps, spent.means_releases + 1) if what == MEANS else Spending(spent.steps + 1, spent.means_releases)


def _complete_lines(path: Path, *, repair: bool) -> list[dict[str, Any]]:
    """The journal's entries. A line cut short by a crash announced work that had not begun; `repair` takes it out of the file."""
    if not path.exists():
        return []
    text = path.read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    if len(complete) < len(text) and repair:
        os.truncate(path, len(complete))
    return [json.loads(line) for line in complete.splitlines()]


def fingerprint(data: str, config: str, device: torch.device, processes: int) -> str:
    """A hash of all that makes a replayed step the same computation: data, config, code, device kind, process count."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()} {torch.get_num_threads()}"
    parts = [data, config, code_digest(), kind, str(processes)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def code_digest() -> str:
    """A hash of the code: this package's, that of programmatic images, which may be replayed in private steps, and the libraries' versions."""
    code = hashlib.sha256()
    for file in (*sorted(Path(__file__).parents[1].rglob("*.py")), *code_files()):
        code.update(file.read_bytes())
    versions = [f"{package} {version(package)}" for package in ("torch", "numpy", "scipy", "diffusers")]
    return "\n".join([code.hexdigest(), *versions])
