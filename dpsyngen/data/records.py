"""Arrays on disk, read where they are asked for, with the same memory whatever their length."""

import itertools
import os
import weakref
from pathlib import Path

import numpy as np

from dpsyngen.errors import InputError

_MOST_BYTES_PER_READ = 2**24


class OpenFile:
    """A file that stays open as long as this object lives; threads may read from it at once, since nobody moves a position.

    Reading beats mapping here. Mapped pages count as this process's memory once they were touched, all of them after one pass; and
    where a mapped file is cut or its disk fails, the process dies without a word instead of raising OSError.
    """

    def __init__(self, path: Path, *, remove: bool = False) -> None:
        """Raises InputError if the file can't be read. `remove` takes away its name at once, so that it vanishes with this object."""
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{path}: expected a file that can be read ({error.strerror})") from error
        weakref.finalize(self, os.close, self._descriptor)
        if remove:
            path.unlink()

    @property
    def stat(self) -> os.stat_result:
        """What the file system says about the open file."""
        return os.fstat(self._descriptor)

    def read(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`; InputError if the file has fewer or can't be read."""
        parts, wanted = [], size
        try:
            while wanted > 0 and (part := os.pread(self._descriptor, wanted, offset + size - wanted)):
                parts.append(part)
                wanted -= len(part)
        except OSError as error:
            raise InputError(f"{self.path}: expected {size} readable bytes at {offset} ({error.strerror})") from error
        if wanted > 0:
            raise InputError(f"{self.path}: expected {size} bytes at {offset}, but the file ends before")
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Records:
    """`count` arrays of one dtype and shape, one after the other in a file from `offset` on. Memory: none per record."""

    def __init__(self, file: OpenFile, offset: int, dtype: np.dtype, shape: tuple[int, ...], count: int) -> None:
        self.file, self.offset, self.dtype, self.shape, self.count = file, offset, dtype, shape, count
        self.size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize

    def __len__(self) -> int:
        return self.count

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The records at indices int [n] in [0, count), [n, *shape]; n may be 0. Neighbours are read together."""
        records = np.empty((len(indices), *self.shape), dtype=self.dtype)
        if not len(indices):
            return records
        if indices.min() < 0 or indices.max() >= self.count:
            raise IndexError(f"expected indices from 0 to {self.count - 1}")
        most = max(1, _MOST_BYTES_PER_READ // max(1, self.size))
        starts = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), len(indices)]
        for first, last in itertools.pairwise(starts):
            for start in range(first, last, most):
                stop = min(start + most, last)
                data = self.file.read((stop - start) * self.size, self.offset + int(indices[start]) * self.size)
                records[start:stop] = np.frombuffer(data, dtype=self.dtype).reshape(stop - start, *self.shape)
        return records


def open_npy(path: Path) -> Records:
    """The array of an .npy file along its first dimension. Raises InputError if it isn't one, is cut, or lies in Fortran's order."""
    file = OpenFile(path)
    try:
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read_header(stream)
            offset = stream.tell()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: expected an .npy file ({reason})") from error
    if fortran_order or dtype.hasobject or not shape:
        raise InputError(f"{path}: expected a plain array of one or more dimensions in C order, got {dtype} {list(shape)}")
    records = Records(file, offset, dtype, shape[1:], shape[0])
    if file.stat.st_size != offset + len(records) * records.size:
        raise InputError(f"{path}: expected a file as long as its header says, {offset + len(records) * records.size} bytes, got {file.stat.st_size}")
    return records


def stamp(stat: os.stat_result) -> tuple[int, ...]:
    """What changes whenever a file does. A user can set back a file's time of modification, but not that of its last change of state."""
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
