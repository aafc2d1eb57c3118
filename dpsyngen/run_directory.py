"""The files of a run: where each lies, and how lines are added and taken back."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dpsyngen.errors import InputError
from dpsyngen.files import write_file, write_json, writing
from dpsyngen.strict_yaml import parse_yaml, read_yaml

MAY_CHANGE = (
    "compute.", "sampling.", "evaluation.", "tracking.",
    "data.path", "data.test_path", "data.index", "data.in_memory", "data.description", "data.public",
)  # fmt: skip
"""What a resumed run may have otherwise than before: the guarantee doesn't depend on it. The end of the name may be left open."""
KEPT = ("tracking.log_private_diagnostics_without_dp",)
"""Exceptions from MAY_CHANGE."""
PRIVACY_SETTINGS = (
    "privacy.epsilon", "privacy.delta", "privacy.clipping_norm", "data.expected_size", "private.batch_size", "private.steps", "private.epochs",
    "private.noise_multiplicity", "hints.share",
)  # fmt: skip
"""What changes the price of a run under way, so that it has to be asked for."""
CHANGED_PRIVACY_FLAG = "--resume-with-changed-privacy"


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
    def averages(self) -> Path:
        """Snapshots of averaged weights, for averages of other lengths."""
        return self.path / "averages"

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
    def candidate(self) -> Path:
        """Marks a run of a selection, of which only the winner may leave."""
        return self.path / "NOT-TO-BE-RELEASED"

    @property
    def is_finished(self) -> bool:
        """Whether training ran to its end; InputError if privacy.json is damaged."""
        if not self.privacy.is_file():
            return False
        try:
            return bool(json.loads(self.privacy.read_bytes())["status"] == "finished")
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{self.privacy}: expected the JSON that train.py wrote ({error})") from error

    def expect_config(self, config_text: str, *, resuming: bool = False, changed_privacy: bool = False) -> None:
        """Raise InputError, naming the field, if the directory holds a run of another config.

        When `resuming`, the fields of MAY_CHANGE may differ; with `changed_privacy` those of PRIVACY_SETTINGS as well.
        """
        if not self.config.exists():
            return
        old, new = (_fields(content, self.config) for content in (read_yaml(self.config, str(self.config)), parse_yaml(config_text, "config")))
        changed = [name for name in old | new if old.get(name) != new.get(name)]
        changed = [name for name in changed if not (resuming and name.startswith(MAY_CHANGE) and name not in KEPT)]
        changed = [name for name in changed if not (changed_privacy and name in PRIVACY_SETTINGS)]
        if changed:
            name = min(changed, key=lambda name: name in PRIVACY_SETTINGS)
            change = f"{name} {old.get(name)!r}, not {new.get(name)!r}"
            way_out = f"{CHANGED_PRIVACY_FLAG}, or" if resuming and name in PRIVACY_SETTINGS and not self.is_finished else "or"
            raise InputError(f"{self.path}: holds a run with another config ({change}); expected the same config, {way_out} a new --run directory")

    @contextmanager
    def open(self, config_text: str, *, changed_privacy: bool = False) -> Iterator[None]:
        """Make the directory or find it made by the same config, but for what may change; hold its lock meanwhile.

        Raises InputError if another config made it or another process is training in it.
        """
        private = self.path / "private"
        with writing(self.path):
            private.mkdir(mode=0o700, parents=True, exist_ok=True)
            private.chmod(0o700)
            lock = _private_file(private / "lock", "w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.path}: another train.py is at work in this run directory") from None
            for file in filter(Path.is_file, private.iterdir()):  # which copying the directory may have opened to others
                file.chmod(0o600)
            self.expect_config(config_text, resuming=True, changed_privacy=changed_privacy)
            if not self.config.exists() or self.config.read_text(encoding="utf-8") != config_text:
                write_file(self.config, config_text)
            yield

    @property
    def metrics(self) -> Path:
        """A line of public values every few steps."""
        return self.path / "metrics.jsonl"

    @property
    def timings(self) -> Path:
        """Seconds per step. Private: a step takes the longer the more images were drawn."""
        return self.path / "private" / "timings.jsonl"

    @property
    def previews(self) -> Path:
        """Grids of images, drawn on the way."""
        return self.path / "previews"

    @property
    def trackers(self) -> Path:
        """What trackers keep on this machine, and how far each has followed."""
        return self.path / "trackers"

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


def append_line(path: Path, line: dict[str, Any], *, private: bool = False) -> None:
    """Add one JSON object to a file of lines, which gets mode 0600 if it is `private`, and wait until it is on disk: checkpoints count on it."""
    with writing(path), _private_file(path, "a") if private else path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _private_file(path: Path, mode: str) -> IO[str]:
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))


def drop_cut_line(path: Path) -> None:
    """Take back the end of a file of lines that a crash cut short."""
    content = path.read_bytes() if path.exists() else b""
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        with writing(path):
            os.truncate(path, complete)


def _fields(content: Any, path: Path) -> dict[str, Any]:
    """A config as {dotted name: value}."""
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected the config that train.py wrote")
    fields: dict[str, Any] = {}
    for name, value in content.items():
        fields |= {f"{name}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {name: value}
    return fields
