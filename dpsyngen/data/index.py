"""Where each image of a set lies, in the order of its name's SHA-256: a file, built with the same memory whatever the number of images.

That order depends on no other image, so that adding one moves at most one across the border between training and held-out images; and
unlike the alphabet's order, it mixes the classes, so that the last images are a fair sample.
"""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from dpsyngen.data.records import Records, open_npy
from dpsyngen.errors import InputError
from dpsyngen.files import writing

PLACE = np.dtype([("where", "<i8"), ("size", "<u4"), ("part", "<u4"), ("label", "<u4")])
"""One image in the index; a source says what where, size and part mean."""
ENTRY = np.dtype([("key", "S32"), ("stamp", "<u8"), ("file", "<u8"), ("linked", "?"), *((name, PLACE[name].str) for name in PLACE.names or ())])
"""One image while the index is built: SHA-256 of its name, its stamp, and which file it is, in case one has several names (`linked`)."""
LARGEST = 2**32 - 1
_ENTRIES_PER_BLOCK = 2**14
_VERSION = 1


def sort_key(name: str) -> bytes:
    """What images are sorted by: the SHA-256 of a name."""
    return hashlib.sha256(os.fsencode(name)).digest()


def in_blocks(entries: Iterable[tuple[object, ...]]) -> Iterator[np.ndarray]:
    """Tuples as arrays of ENTRY, some thousands at a time."""
    block: list[tuple[object, ...]] = []
    for entry in entries:
        block.append(entry)
        if len(block) == _ENTRIES_PER_BLOCK:
            yield np.array(block, dtype=ENTRY)
            block.clear()
    if block:
        yield np.array(block, dtype=ENTRY)


def temporary_index(entries: Iterable[tuple[object, ...]], name: Callable[[np.void], str]) -> tuple[Records, str]:
    """The sorted PLACEs in a file without a name, which vanishes with them, and a digest of keys, stamps and labels.

    `name` tells what a PLACE holds. Raises InputError, with that name, where an image is there twice, and so would count twice.
    """
    descriptor, path = tempfile.mkstemp(suffix=".npy")
    os.close(descriptor)
    try:
        digest = _write(in_blocks(entries), Path(path), name)
        return open_npy(Path(path)), digest
    finally:
        Path(path).unlink()


def kept_index(folder: str, of: str, entries: Callable[[], Iterable[tuple[object, ...]]], name: Callable[[np.void], str]) -> Records:
    """As `temporary_index`, kept in `folder` and found there the next time; `of` says all that the index is a function of.

    Processes that ask at once wait for the one that builds it.
    """
    path = Path(folder).expanduser() / f"index-{hashlib.sha256(f'{_VERSION} {of}'.encode()).hexdigest()}.npy"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = path.with_suffix(".lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            partial = path.with_suffix(".partial")
            try:
                _write(in_blocks(entries()), partial, name)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
    return open_npy(path)


def _write(blocks: Iterable[np.ndarray], path: Path, name: Callable[[np.void], str]) -> str:
    """A distribution sort: the first byte of the key says which of 256 files an entry waits in, then those are sorted one by one."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".index-") as folder:
        count, linked = 0, False
        buckets = [Path(folder) / f"{first:02x}" for first in range(256)]
        for block in blocks:
            count, linked = count + len(block), linked or bool(block["linked"].any())
            first = np.frombuffer(block["key"].tobytes(), dtype=np.uint8)[:: ENTRY["key"].itemsize]
            for number in np.unique(first):
                with writing(path), buckets[number].open("ab") as file:
                    file.write(block[first == number].tobytes())
        digest, files = hashlib.sha256(), []
        with writing(path), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            header = {"descr": np.lib.format.dtype_to_descr(PLACE), "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(out, header)
            for bucket in filter(Path.exists, buckets):
                entries = _sorted(np.fromfile(bucket, dtype=ENTRY), name)
                for field in ("key", "stamp", "label"):
                    digest.update(entries[field].tobytes())
                places = np.empty(len(entries), dtype=PLACE)
                for field in PLACE.names or ():
                    places[field] = entries[field]
                out.write(places.tobytes())
                if linked:
                    files.append(entries["file"])
    if linked:
        _refuse_links(np.concatenate(files), open_npy(path), name)
    return digest.hexdigest()


def _sorted(entries: np.ndarray, name: Callable[[np.void], str]) -> np.ndarray:
    entries = entries[np.argsort(entries["key"], kind="stable")]
    twice = np.flatnonzero(entries["key"][1:] == entries["key"][:-1])
    if len(twice):
        raise InputError(f"{name(entries[twice[0]])}: expected every image once, found two of that name")
    return entries


def _refuse_links(files: np.ndarray, places: Records, name: Callable[[np.void], str]) -> None:
    order = np.argsort(files, kind="stable")
    twice = np.flatnonzero(files[order][1:] == files[order][:-1])
    if len(twice):
        one, other = (name(place) for place in places.read(order[twice[0] : twice[0] + 2]))
        raise InputError(f"{one}: expected every image once, found the same file as {other}")


def stamp_of(numbers: tuple[int, ...]) -> int:
    """64 bits of a hash of `numbers`."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")
