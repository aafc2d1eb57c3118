"""The idx format of MNIST and Fashion-MNIST: a magic number, big-endian sizes, then the bytes."""

import gzip
import lzma
import math
import struct
import zlib
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np

from dpsyngen.errors import InputError

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path | Traversable) -> np.ndarray:
    """Read a file of unsigned bytes, raw or compressed as .gz or .xz; uint8, as many dimensions as the file says.

    Raises InputError naming the file when it can't be read, is damaged, or is another kind of file.
    """
    try:
        data = path.read_bytes()
        if path.name.endswith(".gz"):
            data = gzip.decompress(data)
        elif path.name.endswith(".xz"):
            data = lzma.decompress(data)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: expected a readable idx file ({error})") from error
    return parse_idx(data, str(path))


def parse_idx(data: bytes, where: str) -> np.ndarray:
    """The array in the bytes of an uncompressed idx file; `where` names it in errors."""
    if len(data) < 4 or data[:3] != bytes([0, 0, _UNSIGNED_BYTE]):
        raise InputError(f"{where}: expected an idx file of unsigned bytes")
    header = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:header]) if len(data) >= header else ()
    if len(data) != header + math.prod(shape):
        raise InputError(f"{where}: expected an idx file as long as its header says, got {len(data)} bytes")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape).copy()
