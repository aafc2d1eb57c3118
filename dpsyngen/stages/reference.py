"""The images that a family is held against, and whether looking at them is free."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from dpsyngen.config import DataConfig
from dpsyngen.data import load_train
from dpsyngen.data.dataset import to_unit_range
from dpsyngen.errors import InputError

PRIVATE_FLAG = "--private-reference-without-dp"
EMBEDDED = ("mnist", "fashion_mnist")
MOST_TRAINING, MOST_MEASURED = 5000, 1000
_FEWEST = 20
_NOT_PRIVATE = ("NOT PRIVATE: measured on images that are not declared public, without differential privacy. No epsilon includes it, and thresholds "
                "that are chosen from it leak something of these images")  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """Where the reference images are, and what is said of them."""

    name: str
    data: DataConfig
    is_private: bool

    @classmethod
    def choose(cls, data: DataConfig, named: str, *, private_allowed: bool) -> "Reference":
        """The set that --reference names: config, mnist, fashion_mnist or a path; in the shape of `data`.

        Raises InputError for the config's own images, by whatever name, if they are not declared public and `private_allowed` doesn't say so.
        """
        chosen = data if named == "config" else _public(data, named)
        own = named == "config" or _same(chosen, data.source, data.path) or _same(chosen, data.source, data.test_path)
        private = own and not data.public
        if private and not private_allowed:
            raise InputError("--reference: expected a public set that looks like the private images (mnist, fashion_mnist or a path), since "
                             f"data.public is false; {PRIVATE_FLAG} looks at the private ones, unprotected")  # fmt: skip
        if private_allowed and not private:
            raise InputError(f"{PRIVATE_FLAG}: expected it with private images alone, got a reference that is public")
        return cls(data.source if named == "config" else named, chosen, private)

    @property
    def statement(self) -> str:
        """For people: what the result tells of whom."""
        return _NOT_PRIVATE if self.is_private else "The reference is declared public, so the result costs no privacy"

    def load(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Images to train on and others to measure on, float32 [n, C, H, W] and [m, C, H, W] in [-1, 1], drawn without replacement.

        n is half of the set, at most MOST_TRAINING; m at most MOST_MEASURED. Raises InputError if they can't be read or are too few.
        """
        try:
            dataset = load_train(self.data)
        except InputError as error:
            named = self.data.path is not None and not self.is_private
            raise InputError(str(error).replace("data.path: ", "--reference: ", 1) if named else str(error)) from error
        if len(dataset) < _FEWEST:
            raise InputError(f"--reference: expected at least {_FEWEST} images, got fewer")
        training = min(MOST_TRAINING, len(dataset) // 2)
        measured = min(MOST_MEASURED, len(dataset) - training)
        drawn = np.random.default_rng(seed).choice(len(dataset), training + measured, replace=False)
        images = to_unit_range(dataset.read(drawn)[0]).numpy()
        return images[:training], images[training:]


def _public(data: DataConfig, named: str) -> DataConfig:
    """What reads the images that --reference names, unlabelled and in the shape of `data`."""
    unlabelled = replace(data, test_path=None, index=None, num_classes=0, class_names=None, expected_size=None, held_out=0)
    match named:
        case "mnist" | "fashion_mnist":
            return replace(unlabelled, source=named, path=None)
    return replace(unlabelled, source=_source(named), path=named)


def _source(named: str) -> Literal["npy", "webdataset", "folder", "zip", "npz"]:
    path = Path(named).expanduser()
    if path.is_dir():
        return "npy" if (path / "images.npy").is_file() else "webdataset" if any(path.glob("*.tar")) else "folder"
    match path.suffix:
        case ".zip":
            return "zip"
        case ".npz":
            return "npz"
        case ".tar":
            return "webdataset"
    raise InputError(f"--reference: expected config, {', '.join(EMBEDDED)}, or a folder, .zip, .npz or .tar of public images, got {named}")


def _same(chosen: DataConfig, source: str, path: str | None) -> bool:
    """Whether a reference is what a source and its path hold: one file or folder by any of its names."""
    if chosen.path is None or path is None:
        return chosen.source == source and chosen.path == path and source in EMBEDDED
    return Path(chosen.path).expanduser().resolve() == Path(path).expanduser().resolve()
