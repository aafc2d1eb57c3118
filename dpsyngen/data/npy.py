"""Arrays of any length in images.npy and labels.npy, read from disk for every batch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpsyngen.config import DataConfig
from dpsyngen.data.arrays import UNLABELLED, expect_classes, expect_images, expect_labels, fit_images
from dpsyngen.data.dataset import Dataset, DatasetOnDisk
from dpsyngen.data.records import Records, open_npy, stamp
from dpsyngen.errors import InputError

_LABELS_PER_CHECK = 2**16


def load_npy_train(config: DataConfig) -> Dataset:
    """The arrays in the folder config.path, in their order."""
    return _load(config, "data.path", str(config.path))


def load_npy_test(config: DataConfig) -> Dataset | None:
    """The arrays in the folder config.test_path; None without one."""
    return None if config.test_path is None else _load(config, "data.test_path", config.test_path)


@dataclass(frozen=True, eq=False)
class NpyImages(DatasetOnDisk):
    """Records start to before stop of images uint8 [N, H, W] or [N, H, W, 1 or 3], and of labels if there are any."""

    images: Records
    labels: Records | None

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As the base class has it; images of another size are brought to theirs each time."""
        places = indices + self.start
        images = fit_images(self.images.read(places), self.config.channels, self.config.image_size)
        labels = np.zeros(len(places), dtype=np.int64) if self.labels is None else self.labels.read(places).reshape(len(places)).astype(np.int64)
        return images, labels

    def fingerprint(self) -> str:
        """SHA-256 of what the file system says about the files; their content may be terabytes."""
        stamps = [stamp(records.file.stat) for records in (self.images, self.labels) if records is not None]
        return hashlib.sha256(repr((stamps, self.image_shape, self.class_names, self.start, self.stop)).encode()).hexdigest()


def _load(config: DataConfig, field: str, path: str) -> NpyImages:
    folder = Path(path).expanduser()
    if not (folder / "images.npy").is_file():
        raise InputError(f"{field}: expected a folder with images.npy and labels.npy, got {path}")
    images, labels = open_npy(folder / "images.npy"), None
    expect_images(images.dtype, (len(images), *images.shape), str(images.file.path))
    if config.num_classes > 0:
        labels = open_npy(folder / "labels.npy")
        _check_labels(labels, len(images), config.num_classes)
    names = config.class_names or tuple(map(str, range(config.num_classes)))
    return NpyImages(names if config.num_classes else UNLABELLED, config, 0, len(images), images, labels)


def _check_labels(labels: Records, count: int, num_classes: int) -> None:
    where = str(labels.file.path)
    expect_labels(labels.dtype, (len(labels), *labels.shape), count, where)
    for start in range(0, count, _LABELS_PER_CHECK):
        expect_classes(labels.read(np.arange(start, min(start + _LABELS_PER_CHECK, count))), num_classes, where)
