"""Images in one .npz file: plain (images, labels) or in the layout of medmnist (train_images, test_images, ...)."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from dpsyngen.config import DataConfig
from dpsyngen.data.arrays import dataset_from_arrays
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.errors import InputError


def load_npz_train(config: DataConfig) -> ImageDataset:
    """All training images in config.path: train_images and train_labels, or else images and labels, in the file's order."""
    dataset = _load(config, str(config.path), ("train_", ""))
    if dataset is None:
        raise InputError(f"data.path: expected an .npz file with images or train_images, got {config.path}")
    return dataset


def load_npz_test(config: DataConfig) -> ImageDataset | None:
    """The test images in config.test_path (test_images or images), or else the test_images in config.path; None if there are none."""
    if config.test_path is None:
        return _load(config, str(config.path), ("test_",))
    dataset = _load(config, config.test_path, ("test_", ""))
    if dataset is None:
        raise InputError(f"data.test_path: expected an .npz file with images or test_images, got {config.test_path}")
    return dataset


def _load(config: DataConfig, path: str, prefixes: tuple[str, ...]) -> ImageDataset | None:
    """The images under the first prefix that the file has, or None."""
    try:
        with Path(path).expanduser().open("rb") as stream:
            arrays = np.load(stream, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("one array alone")
            prefix = next((p for p in prefixes if f"{p}images" in arrays), None)
            if prefix is None:
                return None
            images = arrays[f"{prefix}images"]
            labels = arrays.get(f"{prefix}labels")
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: expected a readable .npz file of plain arrays ({reason})") from error
    return dataset_from_arrays(images, labels, config, where=f"{path}: {prefix}images, {prefix}labels")
