"""CIFAR-10 (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009): the binary version, as archive or unpacked.

The version for Python is pickles, which run code when they are read; it is refused.
"""

import tarfile
import zlib
from pathlib import Path

import numpy as np

from dpsyngen.config import DataConfig
from dpsyngen.data.arrays import dataset_from_arrays
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.errors import InputError

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAINING_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("test_batch.bin",)
META_FILE = "batches.meta.txt"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"

_FOLDER = "cifar-10-batches-bin"
_PICKLES = ("cifar-10-batches-py", "data_batch_1", "batches.meta")
_RECORD = 1 + 3 * 32 * 32


def load_cifar10_train(config: DataConfig) -> ImageDataset:
    """The 50,000 training images at config.path, in the order of the five files."""
    return _load(config, TRAINING_FILES)


def load_cifar10_test(config: DataConfig) -> ImageDataset:
    """The 10,000 test images at config.path."""
    return _load(config, TEST_FILES)


def _load(config: DataConfig, names: tuple[str, ...]) -> ImageDataset:
    """The images of some files: records of a label and the 32 x 32 pixels of red, green and blue, a byte each."""
    where = str(config.path)
    files = _read_files(Path(where).expanduser(), (*names, META_FILE))
    if tuple(files[META_FILE].decode("ascii", "replace").split()) != CLASS_NAMES:
        raise InputError(f"{where}: {META_FILE}: expected the names of CIFAR-10's ten classes, a line each")
    for name in names:
        if not files[name] or len(files[name]) % _RECORD:
            raise InputError(f"{where}: {name}: expected records of {_RECORD} bytes, got {len(files[name])} bytes")
    records = np.frombuffer(b"".join(files[name] for name in names), dtype=np.uint8).reshape(-1, _RECORD)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return dataset_from_arrays(images, records[:, 0], config, where=f"cifar10: {where}", class_names=CLASS_NAMES)


def _read_files(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Each file's content, from a folder or from the archive of one."""
    try:
        return _read_folder(path, names) if path.is_dir() else _read_archive(path, names)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"data.path: expected cifar-10-binary.tar.gz ({URL}) or the folder that is in it, got {path} ({reason})") from error


def _read_folder(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    folder = path / _FOLDER if (path / _FOLDER).is_dir() else path
    _refuse_pickles(path, {file.name for file in folder.iterdir()})
    places = {name: (folder / name).stat() for name in names}
    if len({(place.st_dev, place.st_ino) for place in places.values()}) < len(names):
        raise InputError(f"data.path: expected {len(names)} files, got one under two names in {folder}, so that its images would count twice")
    return {name: (folder / name).read_bytes() for name in names}


def _read_archive(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Read in place: nothing is unpacked, and links are not followed, so that no file can stand for another."""
    with tarfile.open(path) as archive:
        members = {member.name.removeprefix("./"): member for member in archive}
        _refuse_pickles(path, {part for name in members for part in Path(name).parts})
        contents = {}
        for name in names:
            member = members.get(f"{_FOLDER}/{name}")
            stream = archive.extractfile(member) if member is not None and member.isreg() else None
            if stream is None:
                raise FileNotFoundError(f"no file {_FOLDER}/{name} in it")
            contents[name] = stream.read()
    return contents


def _refuse_pickles(path: Path, found: set[str]) -> None:
    if TRAINING_FILES[0] not in found and any(name in found for name in _PICKLES):
        raise InputError(f"data.path: expected the binary version of CIFAR-10 ({URL}), got the one for Python, {path}: no pickle is ever read")
