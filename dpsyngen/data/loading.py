"""The datasets that a configuration names: training, held-out and test images.

Nothing here logs, prints or checks anything against what the data happens to be, such as its size.
"""

from typing import Literal

from dpsyngen.config import DataConfig
from dpsyngen.data.cifar10 import load_cifar10_test, load_cifar10_train
from dpsyngen.data.dataset import Dataset, ImageDataset
from dpsyngen.data.fashion_mnist import load_fashion_mnist
from dpsyngen.data.folder import load_folder_test, load_folder_train
from dpsyngen.data.mnist import load_mnist
from dpsyngen.data.npy import load_npy_test, load_npy_train
from dpsyngen.data.npz import load_npz_test, load_npz_train
from dpsyngen.data.webdataset import load_webdataset_test, load_webdataset_train
from dpsyngen.data.zip_file import load_zip_test, load_zip_train
from dpsyngen.errors import InputError


def load_train(config: DataConfig) -> Dataset:
    """The training images without the last config.held_out ones. Raises InputError if they can't be read."""
    dataset = _load_all_train(config)
    return dataset.slice(0, len(dataset) - config.held_out)


def load_held_out(config: DataConfig) -> ImageDataset:
    """The last config.held_out training images, which `load_train` leaves out; see `Dataset.for_evaluation`.

    Raises InputError if they can't be read.
    """
    dataset = _load_all_train(config)
    return dataset.slice(len(dataset) - config.held_out, len(dataset)).for_evaluation()


def load_test(config: DataConfig) -> ImageDataset | None:
    """The real images that evaluation may use, or None when there are none; see `Dataset.for_evaluation`.

    Raises InputError if they can't be read.
    """
    _check_paths(config)
    dataset: Dataset | None
    match config.source:
        case "mnist":
            dataset = load_mnist(config, "t10k")
        case "fashion_mnist":
            dataset = load_fashion_mnist(config, "t10k")
        case "cifar10":
            dataset = load_cifar10_test(config)
        case "folder":
            dataset = load_folder_test(config)
        case "zip":
            dataset = load_zip_test(config)
        case "webdataset":
            dataset = load_webdataset_test(config)
        case "npz":
            dataset = load_npz_test(config)
        case "npy":
            dataset = load_npy_test(config)
    return None if dataset is None else _placed(dataset, config).for_evaluation()


def load_reference(config: DataConfig, reference: Literal["test", "held_out"]) -> ImageDataset:
    """The real images that evaluation.reference names; InputError if there are none."""
    images = load_held_out(config) if reference == "held_out" else load_test(config)
    if images is None:
        raise InputError(
            "data.test_path: expected real images to evaluate against, got null; or let data.held_out keep some training images out "
            "of training and set evaluation.reference to held_out"
        )
    return images


def _load_all_train(config: DataConfig) -> Dataset:
    _check_paths(config)
    dataset: Dataset
    match config.source:
        case "mnist":
            dataset = load_mnist(config, "train")
        case "fashion_mnist":
            dataset = load_fashion_mnist(config, "train")
        case "cifar10":
            dataset = load_cifar10_train(config)
        case "folder":
            dataset = load_folder_train(config)
        case "zip":
            dataset = load_zip_train(config)
        case "webdataset":
            dataset = load_webdataset_train(config)
        case "npz":
            dataset = load_npz_train(config)
        case "npy":
            dataset = load_npy_train(config)
    if config.held_out >= len(dataset):
        raise InputError(f"data.held_out: expected fewer than there are training images, got {config.held_out}")
    return _placed(dataset, config)


def _placed(dataset: Dataset, config: DataConfig) -> Dataset:
    """In memory, where the config says so; the same images in the same order either way."""
    return dataset.into_memory() if config.held_in_memory(len(dataset)) else dataset


def _check_paths(config: DataConfig) -> None:
    """Refuse paths that would be ignored."""
    if config.source == "mnist" and config.path is not None:
        raise InputError(f"data.path: expected null, since data.source mnist is embedded, got {config.path!r}")
    if config.index is not None and config.source not in ("zip", "webdataset"):
        raise InputError(f"data.index: expected null, since data.source {config.source} has no index to keep, got {config.index!r}")
    if config.source in ("mnist", "fashion_mnist", "cifar10") and config.test_path is not None:
        raise InputError(f"data.test_path: expected null, since data.source {config.source} brings its own test images, got {config.test_path!r}")
