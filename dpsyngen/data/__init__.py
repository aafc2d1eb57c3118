"""Private, public and programmatic image sources."""

from dpsyngen.data.dataset import Dataset, ImageDataset, to_uint8, to_unit_range
from dpsyngen.data.loading import load_held_out, load_reference, load_test, load_train
from dpsyngen.data.synthetic import SyntheticImages, deformed

__all__ = ["Dataset", "ImageDataset", "SyntheticImages", "deformed", "load_held_out", "load_reference", "load_test", "load_train",
           "to_uint8", "to_unit_range"]  # fmt: skip
