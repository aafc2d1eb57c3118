"""MNIST, embedded: the four idx files lie beside this module; LICENSE says whose they are."""

from importlib import resources

from dpsyngen.config import DataConfig
from dpsyngen.data.arrays import dataset_from_arrays
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.idx import read_idx

CLASS_NAMES = tuple("0123456789")


def load_mnist(config: DataConfig, prefix: str) -> ImageDataset:
    """The 60,000 training (prefix "train") or 10,000 test images ("t10k"), in the order of the original files."""
    folder = resources.files(__name__)
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.xz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.xz")
    return dataset_from_arrays(images, labels, config, where="mnist", class_names=CLASS_NAMES)
