"""Checkpoints: safetensors and JSON in a directory that is complete or absent."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dpsyngen.files import write_file, write_json, writing

_TENSORS, _STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors and a JSON-able state."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """`write_file` of safetensors."""
    write_file(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def save_checkpoint(directory: Path, number: int, checkpoint: Checkpoint, keep: int) -> None:
    """Add checkpoint `number` (a count that grows over the run) to the directory, and drop all but the newest `keep`."""
    partial, final = directory / f".{number:09d}.partial", directory / f"{number:09d}"
    with writing(final):
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            save_tensors(partial / _TENSORS, checkpoint.tensors)
            write_json(partial / _STATE, checkpoint.state)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in _complete(directory)[:-keep]:
            shutil.rmtree(old)


def load_newest(directory: Path, *, quiet: bool = False) -> Checkpoint | None:
    """The newest checkpoint, its tensors on the CPU, or None if there is none.

    One that can't be read is skipped for the one before, with a line on stderr unless `quiet`.
    """
    for path in reversed(_complete(directory)):
        try:
            return Checkpoint(load_file(path / _TENSORS), json.loads((path / _STATE).read_bytes()))
        except (SafetensorError, ValueError, OSError) as error:
            if not quiet:
                sys.stderr.write(f"{path}: skipped, since this checkpoint can't be read ({' '.join(str(error).split())})\n")
    return None


def _complete(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("[0-9]*") if path.is_dir())
