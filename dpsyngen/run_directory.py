"""The files of a run: where each lies, and how lines are added and taken back."""

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dpsyngen.checkpoint import write_file, write_json
from dpsyngen.errors import InputError


@dataclass(frozen=True)
class RunDirectory:
    """runs/NAME. What may never be released lies under private/ (mode 0700), and only there."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config, enough to run it again."""
        return self.path / "config.yaml"

    @property
    def privacy(self) -> Path:
        """The guarantee."""
        return self.path / "privacy.json"

    @property
    def checkpoints(self) -> Path:
        """Weights and optimiser state to resume from."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained denoiser; there once training is finished."""
        return self.path / "model"

    @property
    def key(self) -> Path:
        """The secret key, until the run is finished."""
        return self.path / "private" / "key"

    @property
    def journal(self) -> Path:
        """What was begun on private images."""
        return self.path / "private" / "journal.jsonl"

    @property
    def is_finished(self) -> bool:
        """Whether training ran to its end."""
        return self.privacy.exists() and json.loads(self.privacy.read_text())["status"] == "finished"

    def open(self, config_text: str) -> TextIO:
        """Make the directory or find it made by the same config; hold its lock until the returned file is closed.

        Raises InputError if another config made it or another process is training in it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: expected a directory for the run, found a file")
        (self.path / "private").mkdir(parents=True, exist_ok=True)
        (self.path / "private").chmod(0o700)
        lock = (self.path / "private" / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another train.py is at work in this run directory") from None
        if not self.config.exists():
            write_file(self.config, config_text)
        elif self.config.read_text() != config_text:
            changed = next(f"{old.strip()} -> {new.strip()}" for old, new in _pairs(self.config.read_text(), config_text) if old != new)
            raise InputError(f"{self.path}: holds a run with another config ({changed}); expected the same config, or a new --run directory")
        return lock

    @property
    def metrics(self) -> Path:
        """A line of public values every few steps."""
        return self.path / "metrics.jsonl"

    @property
    def timings(self) -> Path:
        """Seconds per step. Private: a step takes the longer the more images were drawn."""
        return self.path / "private" / "timings.jsonl"

    @property
    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl, for `rewind_metrics`."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def rewind_metrics(self, size: int) -> None:
        """Take back the lines that were added after the file had `size` bytes, which a resumed run writes again."""
        if self.metrics_size > size:
            os.truncate(self.metrics, size)

    def write_privacy(self, report: dict[str, Any]) -> None:
        """Replace privacy.json."""
        write_json(self.privacy, report)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add one JSON object to a file of lines."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _pairs(old: str, new: str) -> list[tuple[str, str]]:
    """Lines side by side; the dumps of two configs differ in values, seldom in their number."""
    a, b = old.splitlines(), new.splitlines()
    length = max(len(a), len(b))
    return list(zip(a + [""] * (length - len(a)), b + [""] * (length - len(b)), strict=True))
