"""The central directory of a .zip file, member by member. `zipfile` would hold a record of each, some 600 bytes.

Format: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.12 (central directory header), 4.3.14 to 4.3.16 (end records), 4.5.3 (ZIP64 extra field).
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dpsyngen.errors import InputError

STORED, DEFLATED = 0, 8
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_MEMBER = struct.Struct("<4s6H3I5H2I")
_LONGEST_COMMENT = 2**16 - 1
_IN_EXTRA_FIELD = 2**32 - 1
_ENCRYPTED, _UTF_8 = 0x1, 0x800


@dataclass(frozen=True)
class Member:
    """One file, or with a "/" at the end of its name one folder, in a .zip file."""

    name: str
    method: int
    encrypted: bool
    size: int
    """Compressed, in bytes."""
    where: int
    """Of its local header in the file."""


def members(path: Path) -> Iterator[Member]:
    """The members in the directory's order, with the same memory however many there are. Raises InputError if it can't be read."""
    try:
        with path.open("rb") as stream:
            start, count, shift = _directory(stream)
            stream.seek(start)
            for _ in range(count):
                yield _member(stream, shift)
    except (OSError, ValueError, struct.error) as error:
        raise InputError(f"{path}: expected a readable .zip file ({error})") from error


def _directory(stream: IO[bytes]) -> tuple[int, int, int]:
    """Where the directory starts, how many members it has, and by how much offsets are too small since something precedes the file."""
    length = stream.seek(0, os.SEEK_END)
    tail_start = max(0, length - _END.size - _LONGEST_COMMENT)
    stream.seek(tail_start)
    tail = stream.read()
    found = tail.rfind(b"PK\5\6")
    if found < 0:
        raise ValueError("there is no directory at its end")
    end = tail_start + found
    *_, count, size, offset, _ = _END.unpack_from(tail, found)
    stream.seek(max(0, end - _LOCATOR_64.size))
    locator = stream.read(_LOCATOR_64.size)
    if locator.startswith(b"PK\6\7"):
        end -= _LOCATOR_64.size + _END_64.size
        stream.seek(end)
        signature, *_, count, size, offset = _END_64.unpack(stream.read(_END_64.size))
        if signature != b"PK\6\6":
            raise ValueError("its directory is damaged")
    shift = end - size - offset
    if shift < 0:
        raise ValueError("its directory is damaged")
    return offset + shift, count, shift


def _member(stream: IO[bytes], shift: int) -> Member:
    fields = _MEMBER.unpack(stream.read(_MEMBER.size))
    signature, _, _, flags, method, _, _, _, size, full_size, name_size, extra_size, comment_size, *_, where = fields
    if signature != b"PK\1\2":
        raise ValueError("its directory is damaged")
    name = stream.read(name_size).decode("utf-8" if flags & _UTF_8 else "cp437")
    extra = stream.read(extra_size)
    stream.seek(comment_size, os.SEEK_CUR)
    large = iter(_large_numbers(extra))
    _, size, where = (next(large, None) if number == _IN_EXTRA_FIELD else number for number in (full_size, size, where))
    if size is None or where is None:
        raise ValueError("its directory is damaged")
    return Member(name, method, bool(flags & _ENCRYPTED), size, where + shift)


def _large_numbers(extra: bytes) -> tuple[int, ...]:
    """What the ZIP64 extra field holds instead of numbers that don't fit: of size, compressed size and offset those that are needed."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            return struct.unpack_from(f"<{min(size, 24) // 8}Q", extra, position + 4)
        position += 4 + size
    return ()
