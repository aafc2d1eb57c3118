"""Files that are complete or absent: written beside their place, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpsyngen.errors import InputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a write that fails (a full disk, a place where one may not write) into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: expected a place that can be written ({error.strerror or error})") from error


def write_file(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a whole file beside `path`, then rename: readers see the old content or the new one, also after a crash.

    Raises InputError that names the file if it can't be written; nothing is left of it then.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Hand out an empty directory beside `path` to be filled, then put it in the place of `path`, which must be a directory or nothing.

    Where the body fails, or the disk is full, `path` is as it was; a crash while an old one is being removed leaves none.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for file in filter(Path.is_file, partial.rglob("*")):
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(partial, path)
            sync_directory(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """Wait until what was renamed in a directory is on disk too, so that a power cut can't undo it after something older was removed."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError if it can't be read or holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: Any, mode: int = 0o644) -> None:
    """`write_file` of indented JSON. Raises ValueError for numbers that JSON doesn't have."""
    write_file(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n", mode)
