"""Checkpoints: safetensors and JSON in a directory that is complete or absent."""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dpsyngen.errors import InputError
from dpsyngen.files import replacing_directory, writing
from dpsyngen.interruption import GO_ON

_TENSORS, _STATE = "tensors.safetensors", "state.json"
_UNREADABLE = (SafetensorError, LookupError, TypeError, ValueError, OSError)


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors and a JSON-able state."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of names, shapes, types and bytes of the tensors, in an order of their own, and of the state."""
        return _digest(_serialised(self.tensors), self.state)


def save_checkpoint(directory: Path, number: int, checkpoint: Checkpoint, keep: int | None) -> None:
    """Add checkpoint `number` (a count that grows over the run) to the directory, and drop all but the newest `keep`, none if that is None.

    Nothing old is dropped before the new one is whole and on disk. Raises InputError if it can't be written; nothing is left of it then.
    """
    final = _place(directory, number)
    content = _serialised(checkpoint.tensors)
    try:
        with writing(final):
            directory.mkdir(parents=True, exist_ok=True)
        with replacing_directory(final) as partial:
            (partial / _TENSORS).write_bytes(content)
            written = {"state": checkpoint.state, "sha256": _digest(content, checkpoint.state)}
            (partial / _STATE).write_text(json.dumps(written, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except InputError as error:
        raise InputError(f"{error}; what was saved before is whole: {GO_ON}") from error
    with writing(directory):
        for old in _complete(directory)[:-keep] if keep is not None else []:
            _remove(old)


def numbers(directory: Path) -> list[int]:
    """The numbers of the checkpoints in a directory, in their order."""
    return [int(path.name) for path in _complete(directory)]


def load_checkpoint(directory: Path, number: int) -> Checkpoint:
    """Checkpoint `number`, its tensors on the CPU; InputError if it can't be read, or isn't what was written."""
    path = _place(directory, number)
    try:
        return _load(path)
    except _UNREADABLE as error:
        raise InputError(f"{path}: expected what was written there ({' '.join(str(error).split())})") from error


def load_newest(directory: Path, *, quiet: bool = False) -> Checkpoint | None:
    """The newest checkpoint, its tensors on the CPU, or None if there is none.

    One that can't be read, or isn't what was written, is skipped for the one before, with a line on stderr unless `quiet`. Raises
    InputError if there are checkpoints and none can be used.
    """
    damaged: list[str] = []
    for path in reversed(_complete(directory)):
        try:
            checkpoint = _load(path)
        except _UNREADABLE as error:
            damaged.append(f"{path}: skipped, since this checkpoint can't be read ({' '.join(str(error).split())})\n")
            continue
        if not quiet:
            sys.stderr.write("".join(damaged))
        return checkpoint
    if damaged:
        raise InputError(f"{directory}: expected a checkpoint that can be read, found {len(damaged)} damaged; without the folder the run starts over")
    return None


def discard_after(directory: Path, number: int) -> None:
    """Remove all that comes after checkpoint `number`: what a crash left half written or half removed, and newer ones, which are damaged.

    They would be met by every later resume, and count among the newest that are kept.
    """
    with writing(directory):
        for path in directory.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in _complete(directory):
            if int(path.name) > number:
                _remove(path)


def _place(directory: Path, number: int) -> Path:
    return directory / f"{number:09d}"


def _load(path: Path) -> Checkpoint:
    content, written = (path / _TENSORS).read_bytes(), json.loads((path / _STATE).read_bytes())
    if written["sha256"] != _digest(content, written["state"]):
        raise ValueError("it has changed since it was written")
    return Checkpoint(load(content), written["state"])


def _serialised(tensors: dict[str, Tensor]) -> bytes:
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _digest(content: bytes, state: dict[str, Any]) -> str:
    """Of both files, so that a changed bit doesn't become other weights under the same noise."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    digest.update(content)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    """Remove a checkpoint so that no half of it is ever taken for a whole one."""
    hidden = path.with_name(f".{path.name}.dropped")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def _complete(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("[0-9]*") if path.is_dir())
