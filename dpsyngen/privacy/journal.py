"""The journal: what was begun on private images, written before it begins, so that a crash never forgets spending."""

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dpsyngen.errors import InputError
from dpsyngen.files import writing

MEANS = "class_means"
BEFORE_MEANS = -1
"""Where a run stands, counted in private steps, that hasn't released its class means yet."""


@dataclass(frozen=True)
class Spending:
    """What the journal says was begun: private steps over all attempts, and releases of the class means."""

    steps: int
    means_releases: int


class Journal:
    """Lines of JSON in runs/NAME/private/journal.jsonl, mode 0600, each on disk before the work it announces.

    A line {"attempt": a, "fingerprint": f, "from": t} opens an attempt at step t, {"attempt": a, "step": t} announces step t (or
    the class means). Announcing again what the same attempt announced is a replay with the same draws and costs nothing, which holds
    only while the fingerprint is unchanged, and from no earlier than where the attempt began. Otherwise a new attempt opens: its draws
    are fresh, and the steps begun since the checkpoint were paid for in vain.

    Raises InputError for a file that isn't a journal.
    """

    def __init__(self, path: Path, *, writable: bool = True) -> None:
        self.path = path
        self.writable = writable
        self.attempt = -1
        self.fingerprint = ""
        self.start = BEFORE_MEANS
        self._begun: set[tuple[int, int | str]] = set()
        try:
            for entry in _complete_lines(path):
                self._apply(entry)
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path}: expected the journal of this run's private steps; without it nobody knows what was spent") from error

    def open_attempt(self, fingerprint: str, reached: int) -> None:
        """Go on with the last attempt if its fingerprint is this one and its own weights are at hand, else open the next.

        Weights of a step before the attempt's start are another attempt's: from there the same draws would meet other weights.
        """
        if self.fingerprint != fingerprint or reached < self.start:
            self._write({"attempt": self.attempt + 1, "fingerprint": fingerprint, "from": reached})

    def begin(self, what: int | str) -> None:
        """Announce a step number or MEANS; returns once the announcement is on disk."""
        if not self.has_begun(what):
            self._write({"attempt": self.attempt, "step": what})

    def has_begun(self, what: int | str) -> bool:
        """Whether this attempt announced it before, so that beginning it again is a replay."""
        return (self.attempt, what) in self._begun

    @property
    def spending(self) -> Spending:
        """Everything that was begun, replays counted once."""
        means = sum(1 for _, what in self._begun if what == MEANS)
        return Spending(steps=len(self._begun) - means, means_releases=means)

    def begun_since(self, step: int) -> int:
        """How many steps of this attempt from `step` on were begun, which a resume from there can replay free."""
        return sum(1 for attempt, what in self._begun if attempt == self.attempt and isinstance(what, int) and what >= step)

    def _apply(self, entry: dict[str, Any]) -> None:
        if "fingerprint" in entry:
            self.attempt, self.fingerprint, self.start = entry["attempt"], entry["fingerprint"], entry["from"]
        else:
            self._begun.add((entry["attempt"], entry["step"]))

    def _write(self, entry: dict[str, Any]) -> None:
        if self.writable:
            with writing(self.path), os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._apply(entry)


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The journal's entries; a line cut short by a crash announced work that had not begun, and is dropped from the file."""
    if not path.exists():
        return []
    text = path.read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    if len(complete) < len(text):
        os.truncate(path, len(complete))
    return [json.loads(line) for line in complete.splitlines()]


def fingerprint(data: str, config: str, device: torch.device, processes: int) -> str:
    """A hash of all that makes a replayed step the same computation: data, config, code, device kind, process count."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()} {torch.get_num_threads()}"
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    versions = [f"{package} {version(package)}" for package in ("torch", "numpy", "scipy", "diffusers")]
    parts = [data, config, code.hexdigest(), *versions, kind, str(processes)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
