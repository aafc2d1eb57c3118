"""Images in .tar files in the layout of webdataset: the files of a sample have the same name up to their first dot."""

import functools
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dpsyngen.config import DataConfig
from dpsyngen.data.arrays import UNLABELLED
from dpsyngen.data.dataset import BAR_FORMAT
from dpsyngen.data.encoded import SUFFIXES, EncodedImages
from dpsyngen.data.index import LARGEST, kept_index, sort_key, temporary_index
from dpsyngen.data.records import OpenFile, stamp
from dpsyngen.errors import InputError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_OPEN_FILES = 512  # of the 1,024 that a process may usually have
_LONGEST_LABEL = 20


def load_webdataset_train(config: DataConfig) -> EncodedImages:
    """All samples of the .tar files that config.path names, in the order of the SHA-256 of their keys."""
    return _load(config, "data.path", str(config.path))


def load_webdataset_test(config: DataConfig) -> EncodedImages | None:
    """All samples of the .tar files that config.test_path names; None without one."""
    return None if config.test_path is None else _load(config, "data.test_path", config.test_path)


class TarMembers:
    """Files in .tar files: `size` bytes at `where` of the file number `part`. Only some of those are open at a time."""

    def __init__(self, shards: list[Path]) -> None:
        self.shards = shards
        self._open = functools.lru_cache(_OPEN_FILES)(OpenFile)

    def content(self, place: np.void) -> bytes:
        """As `Container` has it."""
        return self._open(self.shards[place["part"]]).read(int(place["size"]), int(place["where"]))

    def name(self, place: np.void) -> str:
        """As `Container` has it, by the header before the file, which has the name's first 100 bytes."""
        shard = self.shards[place["part"]]
        header = self._open(shard).read(tarfile.BLOCKSIZE, int(place["where"]) - tarfile.BLOCKSIZE)
        return f"{shard}: {header[:100].partition(bytes(1))[0].decode(errors='replace')}"


def _load(config: DataConfig, field: str, path: str) -> EncodedImages:
    shards = _shards(field, path)
    container = TarMembers(shards)
    stamps = [(shard.name, stamp(shard.stat())) for shard in shards]
    if len({numbers for _, numbers in stamps}) < len(stamps):
        raise InputError(f"{field}: expected every .tar file once, got one under two names in {path}")
    digest = f"webdataset {sorted(stamps)} {config.num_classes}"
    if config.index is None:
        places, _ = temporary_index(_entries(shards, config.num_classes), container.name)
    else:
        places = kept_index(config.index, digest, lambda: _entries(shards, config.num_classes), container.name)
    if not len(places):
        raise InputError(f"{field}: expected images ({', '.join(sorted(SUFFIXES))}) in the .tar files of {path}, found none")
    names = config.class_names or tuple(map(str, range(config.num_classes)))
    return EncodedImages(names if config.num_classes else UNLABELLED, config, 0, len(places), places, container, digest)


def _shards(field: str, path: str) -> list[Path]:
    """The .tar files that a path names: with {000..123} for a range of numbers, a folder, or one file."""
    given = Path(path).expanduser()
    if given.is_dir():
        found = sorted(file for file in given.iterdir() if not file.name.startswith(".") and file.name.endswith((".tar", *_COMPRESSED)))
    else:
        found = [Path(name) for name in _expand(str(given))]
    for file in found:
        if file.name.endswith(_COMPRESSED):
            raise InputError(f"{file}: expected .tar files that are not compressed, since samples are read out of order; unpack it first")
        if not file.is_file():
            raise InputError(f"{field}: expected .tar files (their folder, or name-{{000..123}}.tar), but there is no {file}")
    if not found:
        raise InputError(f"{field}: expected a folder with .tar files, found none in {path}")
    return found


def _expand(name: str) -> list[str]:
    """name-{08..11}.tar to name-08.tar, name-09.tar, name-10.tar, name-11.tar."""
    match = _RANGE.search(name)
    if match is None:
        return [name]
    first, last = match.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [expanded for number in numbers for expanded in _expand(name[: match.start()] + number + name[match.end() :])]


def _entries(shards: list[Path], num_classes: int) -> Iterator[tuple[object, ...]]:
    """An index.ENTRY for every sample. Memory: that of one shard's samples."""
    for part, shard in enumerate(tqdm(shards, desc="reading the shards' headers", bar_format=BAR_FORMAT, disable=None)):
        images, labels = _samples(shard, num_classes)
        for key, (where, size) in images.items():
            if num_classes and key not in labels:
                raise InputError(f"{shard}: {key}: expected a file {key}.cls with its label, found none")
            yield sort_key(key), 0, 0, False, where, size, part, labels.get(key, 0)
        if without := labels.keys() - images.keys():
            raise InputError(f"{shard}: {min(without)}.cls: expected an image of that name beside it, found none")


def _samples(shard: Path, num_classes: int) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """By key where the images of one shard lie, as (offset, size), and their labels."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    file = OpenFile(shard)
    for member in _members(shard, file):
        folder, name = os.path.split(member.name)
        stem, _, extension = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not stem:
            continue  # hidden
        if f".{extension.lower()}" in SUFFIXES:
            if key in images or member.size > LARGEST:
                raise InputError(f"{shard}: {member.name}: expected one image of less than 4 GiB per sample, found more")
            images[key] = (member.offset_data, member.size)
        elif extension.lower() == "cls" and num_classes:
            if key in labels:
                raise InputError(f"{shard}: {member.name}: expected one label per sample, found two")
            labels[key] = _label(file, member, num_classes)
    return images, labels


def _members(shard: Path, file: OpenFile) -> Iterator[tarfile.TarInfo]:
    """The regular files in a .tar file; InputError if it is damaged or ends early."""
    try:
        with tarfile.open(shard, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # or they would all be kept
                if member.isreg():
                    yield member
            end = archive.offset
    except (OSError, tarfile.TarError, ValueError) as error:
        raise InputError(f"{shard}: expected a readable .tar file ({error})") from error
    if any(file.read(tarfile.BLOCKSIZE, end)):  # tarfile stops without a word where a header is damaged or missing
        raise InputError(f"{shard}: expected a readable .tar file (damaged at {end})")


def _label(file: OpenFile, member: tarfile.TarInfo, num_classes: int) -> int:
    text = file.read(min(member.size, _LONGEST_LABEL), member.offset_data).strip()
    if not (text.isdigit() and int(text) < num_classes):
        raise InputError(
            f"{file.path}: {member.name}: expected an integer from 0 to {num_classes - 1} (data.num_classes is {num_classes}), got another"
        )
    return int(text)
