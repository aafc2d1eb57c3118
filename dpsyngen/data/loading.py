"""The datasets that a configuration names: training, held-out and test images.

Nothing here logs, prints or checks anything against what the data happens to be, such as its size.
"""

from dpsyngen.config import DataConfig
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.fashion_mnist import load_fashion_mnist
from dpsyngen.data.folder import load_folder_test, load_folder_train
from dpsyngen.data.mnist import load_mnist
from dpsyngen.data.npz import load_npz_test, load_npz_train
from dpsyngen.errors import InputError


def load_train(config: DataConfig) -> ImageDataset:
    """The training images without the last config.held_out ones. Raises InputError if they can't be read."""
    dataset = _load_all_train(config)
    return dataset.slice(0, len(dataset) - config.held_out)


def load_held_out(config: DataConfig) -> ImageDataset:
    """The last config.held_out training images, which `load_train` leaves out. Raises InputError if they can't be read."""
    dataset = _load_all_train(config)
    return dataset.slice(len(dataset) - config.held_out, len(dataset))


def load_test(config: DataConfig) -> ImageDataset | None:
    """The real images that evaluation may use, or None when there are none. Raises InputError if they can't be read."""
    _check_paths(config)
    match config.source:
        case "mnist":
            return load_mnist(config, "t10k")
        case "fashion_mnist":
            return load_fashion_mnist(config, "t10k")
        case "folder":
            return load_folder_test(config)
        case "npz":
            return load_npz_test(config)


def _load_all_train(config: DataConfig) -> ImageDataset:
    _check_paths(config)
    match config.source:
        case "mnist":
            dataset = load_mnist(config, "train")
        case "fashion_mnist":
            dataset = load_fashion_mnist(config, "train")
        case "folder":
            dataset = load_folder_train(config)
        case "npz":
            dataset = load_npz_train(config)
    if config.held_out >= len(dataset):
        raise InputError(f"data.held_out: expected fewer than there are training images, got {config.held_out}")
    return dataset


def _check_paths(config: DataConfig) -> None:
    """Refuse paths that would be ignored."""
    if config.source == "mnist" and config.path is not None:
        raise InputError(f"data.path: expected null, since data.source mnist is embedded, got {config.path!r}")
    if config.source in ("mnist", "fashion_mnist") and config.test_path is not None:
        raise InputError(f"data.test_path: expected null, since data.source {config.source} brings its own test images, got {config.test_path!r}")
