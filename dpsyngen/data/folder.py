"""Images in a folder: one subfolder per class, or without classes wherever they lie."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from dpsyngen.config import DataConfig
from dpsyngen.data.arrays import UNLABELLED
from dpsyngen.data.encoded import SUFFIXES, EncodedImages
from dpsyngen.data.index import sort_key, stamp_of, temporary_index
from dpsyngen.data.records import OpenFile, stamp
from dpsyngen.errors import InputError


def load_folder_train(config: DataConfig) -> EncodedImages:
    """All images under config.path, in the order of the SHA-256 of each image's path below it."""
    return _load(config, "data.path", str(config.path))


def load_folder_test(config: DataConfig) -> EncodedImages | None:
    """All images under config.test_path, labelled by the class names of the training folder; None without a test_path."""
    return None if config.test_path is None else _load(config, "data.test_path", config.test_path)


class FolderFiles:
    """Image files below `root`. Their paths lie in a file, `size` bytes at `where`; `part` is 0."""

    def __init__(self, root: Path, paths: OpenFile) -> None:
        self.root, self.paths = root, paths

    def content(self, place: np.void) -> bytes:
        """As `Container` has it."""
        return self._path(place).read_bytes()

    def name(self, place: np.void) -> str:
        """As `Container` has it."""
        return str(self._path(place))

    def _path(self, place: np.void) -> Path:
        return self.root / os.fsdecode(self.paths.read(int(place["size"]), int(place["where"])))


def _load(config: DataConfig, field: str, path: str) -> EncodedImages:
    root = _existing_folder(field, path)
    names = UNLABELLED if config.num_classes == 0 else _class_names(config)
    classes = {"": 0} if config.num_classes == 0 else {name: label for label, name in enumerate(names) if _class_folder(field, root, name)}
    descriptor, list_of_paths = tempfile.mkstemp()
    with os.fdopen(descriptor, "wb") as paths:
        container = FolderFiles(root, OpenFile(Path(list_of_paths), remove=True))
        with tqdm(_entries(root, classes, paths), desc="finding images", bar_format="{desc}: {elapsed}", disable=None) as entries:
            places, digest = temporary_index(entries, container.name)
    if not len(places):
        raise InputError(f"{field}: expected images ({', '.join(sorted(SUFFIXES))}) in {root}, found none")
    return EncodedImages(names, config, 0, len(places), places, container, digest)


def _entries(root: Path, classes: dict[str, int], paths: IO[bytes]) -> Iterator[tuple[object, ...]]:
    """An index.ENTRY for every image in the classes' subfolders; their paths go to `paths`."""
    where = 0
    for folder, label in classes.items():
        for path, status, linked in _image_files(os.path.join(root, folder), folder, linked=(root / folder).is_symlink()):  # noqa: PTH118 - fast
            name = os.fsencode(path)
            paths.write(name)
            yield sort_key(path), stamp_of(stamp(status)), stamp_of((status.st_dev, status.st_ino)), linked, where, len(name), 0, label
            where += len(name)
    paths.flush()


def _image_files(folder: str, path: str, *, linked: bool) -> Iterator[tuple[str, os.stat_result, bool]]:
    """Path below the root, state and whether it may have other names, of each image in a folder and those below; hidden ones are left out."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                below = f"{path}/{entry.name}" if path else entry.name
                if entry.is_dir(follow_symlinks=False):
                    yield from _image_files(entry.path, below, linked=linked)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():  # noqa: PTH122 - fast
                    status = entry.stat()
                    yield below, status, linked or status.st_nlink > 1 or entry.is_symlink()
    except OSError as error:
        raise InputError(f"{error.filename or folder}: expected a folder that can be read ({error.strerror})") from error


def _existing_folder(field: str, path: str) -> Path:
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"{field}: expected a folder of images, got {path}")
    return root


def _class_names(config: DataConfig) -> tuple[str, ...]:
    """The declared classes, or else the sorted names of the training folder's subfolders."""
    if config.class_names is not None:
        expect_class_names(config.class_names)
        return config.class_names
    root = _existing_folder("data.path", str(config.path))
    names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    expect_number_of_classes(names, config, root)
    return names


def expect_class_names(names: tuple[str, ...]) -> None:
    """Raise InputError unless these can be names of different subfolders: an image that is read twice would count twice."""
    plain = all(name not in ("", ".", "..") and Path(name).name == name for name in names)
    if not plain or len(set(names)) != len(names):
        raise InputError(f"data.class_names: expected the names of different subfolders, got {list(names)}")


def expect_number_of_classes(names: tuple[str, ...], config: DataConfig, root: Path) -> None:
    """Raise InputError unless there are as many subfolders as data.num_classes says."""
    if len(names) != config.num_classes:
        raise InputError(f"data.num_classes: expected {len(names)}, the number of subfolders (one per class) in {root}, got {config.num_classes}")


def _class_folder(field: str, root: Path, name: str) -> Path:
    if not (root / name).is_dir():
        raise InputError(f"{field}: expected a subfolder {name!r} with the images of that class in {root}, found none")
    return root / name
