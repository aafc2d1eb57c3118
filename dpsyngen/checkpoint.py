"""Checkpoints: safetensors and JSON in a directory that is complete or absent."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSORS, _STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors and a JSON-able state."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write_file(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a whole file beside `path`, then rename: readers see the old content or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise


def write_json(path: Path, content: Any, mode: int = 0o644) -> None:
    """`write_file` of indented JSON."""
    write_file(path, json.dumps(content, indent=2) + "\n", mode)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """`write_file` of safetensors."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # safetensors wraps the system's error in its own
            free = shutil.disk_usage(path.parent).free
            raise OSError(28 if "No space" in str(error) or free == 0 else 5, str(error), str(path)) from error
        error.filename = error.filename or str(path)
        raise


def save_checkpoint(directory: Path, number: int, checkpoint: Checkpoint, keep: int) -> None:
    """Add checkpoint `number` (a count that grows over the run) to the directory, and drop all but the newest `keep`."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{number:09d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        save_tensors(partial / _TENSORS, checkpoint.tensors)
        write_json(partial / _STATE, checkpoint.state)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    final = directory / f"{number:09d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in _complete(directory)[:-keep]:
        shutil.rmtree(old)


def load_newest(directory: Path, device: torch.device) -> Checkpoint | None:
    """The newest checkpoint, or None if there is none; one that can't be read is skipped for the one before."""
    for path in reversed(_complete(directory)):
        try:
            return Checkpoint(load_file(path / _TENSORS, device=str(device)), json.loads((path / _STATE).read_text()))
        except (SafetensorError, ValueError, FileNotFoundError):
            continue
    return None


def _complete(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("[0-9]*") if path.is_dir())
