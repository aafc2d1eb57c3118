"""Images in one .zip file: as in a folder, one subfolder per class, or without classes wherever they lie."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from dpsyngen.config import DataConfig
from dpsyngen.data.arrays import UNLABELLED
from dpsyngen.data.encoded import SUFFIXES, EncodedImages
from dpsyngen.data.folder import expect_class_names, expect_number_of_classes
from dpsyngen.data.index import LARGEST, kept_index, sort_key, temporary_index
from dpsyngen.data.records import OpenFile, stamp
from dpsyngen.data.zip_directory import DEFLATED, STORED, Member, members
from dpsyngen.errors import InputError

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_SIGNATURE = b"PK\x03\x04"


def load_zip_train(config: DataConfig) -> EncodedImages:
    """All images in config.path, in the order of the SHA-256 of each image's name in it; the same as its folder would give."""
    return _load(config, "data.path", str(config.path))


def load_zip_test(config: DataConfig) -> EncodedImages | None:
    """All images in config.test_path, labelled by the class names of the training file; None without a test_path."""
    return None if config.test_path is None else _load(config, "data.test_path", config.test_path)


class ZipMembers:
    """Members of one .zip file, whose local headers are at `where`; `size` bytes compressed, by deflate or not at all; `part` is 0.

    `zipfile` reads with one position for all threads.
    """

    def __init__(self, file: OpenFile) -> None:
        self.file = file

    def content(self, place: np.void) -> bytes:
        """As `Container` has it."""
        method, name_size, extra_size = self._header(place)
        start = int(place["where"]) + _LOCAL_HEADER.size + name_size + extra_size
        data = self.file.read(int(place["size"]), start)
        return data if method == STORED else zlib.decompress(data, wbits=-zlib.MAX_WBITS)

    def name(self, place: np.void) -> str:
        """As `Container` has it."""
        _, name_size, _ = self._header(place)
        return f"{self.file.path}: {self.file.read(name_size, int(place['where']) + _LOCAL_HEADER.size).decode(errors='replace')}"

    def _header(self, place: np.void) -> tuple[int, int, int]:
        """Method, and the sizes of name and extra field."""
        signature, _, _, method, *_, name_size, extra_size = _LOCAL_HEADER.unpack(self.file.read(_LOCAL_HEADER.size, int(place["where"])))
        if signature != _SIGNATURE:
            raise InputError(f"{self.file.path}: expected a member of a .zip file at {place['where']}")
        return method, name_size, extra_size


def _load(config: DataConfig, field: str, path: str) -> EncodedImages:
    file = OpenFile(_existing_file(field, path))
    container = ZipMembers(file)
    names = UNLABELLED if config.num_classes == 0 else _class_names(config)
    labels = {name: label for label, name in enumerate(names)} if config.num_classes else None
    digest = f"zip {file.path.name} {stamp(file.stat)} {labels}"
    if config.index is None:
        places, _ = temporary_index(_entries(file.path, labels), container.name)
    else:
        places = kept_index(config.index, digest, lambda: _entries(file.path, labels), container.name)
    if not len(places):
        where = f"subfolders {list(names)} of {path}" if labels else path
        raise InputError(f"{field}: expected images ({', '.join(sorted(SUFFIXES))}) in {where}, found none")
    return EncodedImages(names, config, 0, len(places), places, container, digest)


def _existing_file(field: str, path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{field}: expected a .zip file of images, got {path}")
    return file


def _visible(path: Path) -> Iterator[tuple[PurePosixPath, Member]]:
    """Path and record of each member; hidden ones, and what macOS adds, are left out."""
    for member in members(path):
        name = PurePosixPath(member.name)
        if not any(part.startswith(".") or part == "__MACOSX" for part in name.parts):
            yield name, member


def _class_names(config: DataConfig) -> tuple[str, ...]:
    """The declared classes, or else the sorted names of the training file's folders."""
    if config.class_names is not None:
        expect_class_names(config.class_names)
        return config.class_names
    path = _existing_file("data.path", str(config.path))
    names = tuple(sorted({name.parts[0] for name, member in _visible(path) if len(name.parts) > 1 or member.name.endswith("/")}))
    expect_number_of_classes(names, config, path)
    return names


def _entries(path: Path, labels: dict[str, int] | None) -> Iterator[tuple[object, ...]]:
    """An index.ENTRY for every image of the classes; InputError for one that can't be read later."""
    for name, member in _visible(path):
        if member.name.endswith("/") or name.suffix.lower() not in SUFFIXES:
            continue
        label = 0 if labels is None else labels.get(name.parts[0]) if len(name.parts) > 1 else None
        if label is None:
            continue
        if member.encrypted or member.method not in (STORED, DEFLATED) or member.size > LARGEST:
            raise InputError(f"{path}: {member.name}: expected a member that is deflated or stored, without a password, below 4 GiB")
        yield sort_key(member.name), 0, 0, False, member.where, member.size, 0, label
