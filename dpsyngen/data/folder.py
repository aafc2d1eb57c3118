"""Images in a folder: one subfolder per class, or without classes wherever they lie."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dpsyngen.config import DataConfig
from dpsyngen.data.arrays import BAR_FORMAT, UNLABELLED, fit_image
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.errors import InputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_IMAGES_PER_TASK = 64


def load_folder_train(config: DataConfig) -> ImageDataset:
    """All images under config.path; see `_load` for their order."""
    return _load(config, "data.path", str(config.path))


def load_folder_test(config: DataConfig) -> ImageDataset | None:
    """All images under config.test_path, labelled by the class names of the training folder; None without a test_path."""
    return None if config.test_path is None else _load(config, "data.test_path", config.test_path)


def _load(config: DataConfig, field: str, path: str) -> ImageDataset:
    """Read a folder, in the order of the SHA-256 of each image's path below it.

    That order depends on no other image, so that adding an image moves at most one across the border between training and
    held-out images; and unlike the alphabet's order, it mixes the classes, so that the last images are a fair sample.
    """
    root = _existing_folder(field, path)
    if config.num_classes == 0:
        names = UNLABELLED
        labelled = [(file, 0) for file in _image_files(root)]
    else:
        names = _class_names(config)
        labelled = [(file, label) for label, name in enumerate(names) for file in _image_files(_class_folder(field, root, name))]
    if not labelled:
        raise InputError(f"{field}: expected images ({', '.join(sorted(SUFFIXES))}) in {root}, found none")
    labelled.sort(key=lambda item: hashlib.sha256(os.fsencode(item[0].relative_to(root).as_posix())).digest())
    images = _read_images([file for file, _ in labelled], config.channels, config.image_size)
    return ImageDataset(images, np.array([label for _, label in labelled], dtype=np.int64), names)


def _existing_folder(field: str, path: str) -> Path:
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"{field}: expected a folder of images, got {path}")
    return root


def _class_names(config: DataConfig) -> tuple[str, ...]:
    """The declared classes, or else the sorted names of the training folder's subfolders."""
    if config.class_names is not None:
        names = config.class_names
        plain = all(name not in ("", ".", "..") and Path(name).name == name for name in names)
        if not plain or len(set(names)) != len(names):
            # An image that is read twice would count twice, and the guarantee be wrong.
            raise InputError(f"data.class_names: expected the names of different subfolders, got {list(names)}")
        return names
    root = _existing_folder("data.path", str(config.path))
    names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if len(names) != config.num_classes:
        raise InputError(f"data.num_classes: expected {len(names)}, the number of subfolders (one per class) in {root}, got {config.num_classes}")
    return names


def _class_folder(field: str, root: Path, name: str) -> Path:
    if not (root / name).is_dir():
        raise InputError(f"{field}: expected a subfolder {name!r} with the images of that class in {root}, found none")
    return root / name


def _image_files(folder: Path) -> list[Path]:
    """Image files in the folder and the folders below it; hidden ones are left out."""
    found = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _read_images(files: list[Path], channels: int, size: int) -> np.ndarray:
    """Decode in threads (Pillow releases the interpreter lock) into uint8 [N, channels, size, size]."""
    images = np.empty((len(files), channels, size, size), dtype=np.uint8)

    def read_task(start: int) -> None:
        for i in range(start, min(start + _IMAGES_PER_TASK, len(files))):
            images[i] = _read_image(files[i], channels, size)

    starts = range(0, len(files), _IMAGES_PER_TASK)
    executor = ThreadPoolExecutor()
    try:
        for _ in tqdm(executor.map(read_task, starts), total=len(starts), desc="reading images", bar_format=BAR_FORMAT, disable=None):
            pass
    finally:
        executor.shutdown(cancel_futures=True)  # after a bad file, don't read the rest first
    return images


def _read_image(file: Path, channels: int, size: int) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return fit_image(image, channels, size)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file}: expected a readable image ({reason})") from error
