"""A sample set on disk: images.npz, a picture of it (grid.png), and where it comes from (provenance.json)."""

import hashlib
import importlib.metadata
import io
import math
import platform
import zipfile
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

import dpsyngen
from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError
from dpsyngen.field_types import unconvert
from dpsyngen.files import write_file, write_json, writing

GRID_COLUMNS = 10
GRID_ROWS = 20  # of classes beyond the twentieth the picture shows none; images.npz has them all
TILE_PIXELS = 64  # small images are enlarged to at least this
GAP_PIXELS = 4
GAP_COLOUR = 96  # neither black nor white, so that a tile's edge shows on either background


def sample_grid(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Arrange samples into one picture: a row per class with ten samples; one class alone fills ten rows.

    Args:
        images: uint8 [N, H, W, C], C = 1 or 3, N >= 1.
        labels: int64 [N].
    Returns:
        uint8 [rows, columns, C]. Pixels are enlarged by a whole factor without smoothing, so none is made up.
    """
    classes = np.unique(labels)
    if len(classes) == 1:
        shown = np.arange(min(len(images), GRID_COLUMNS**2))
        rows = [shown[i : i + GRID_COLUMNS] for i in range(0, len(shown), GRID_COLUMNS)]
    else:
        rows = [np.flatnonzero(labels == label)[:GRID_COLUMNS] for label in classes[:GRID_ROWS]]
    _, height, width, channels = images.shape
    scale = math.ceil(TILE_PIXELS / height)
    step_y, step_x = height * scale + GAP_PIXELS, width * scale + GAP_PIXELS
    columns = max(len(row) for row in rows)
    grid = np.full((len(rows) * step_y + GAP_PIXELS, columns * step_x + GAP_PIXELS, channels), GAP_COLOUR, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, index in enumerate(row):
            tile = images[index].repeat(scale, axis=0).repeat(scale, axis=1)
            y, x = GAP_PIXELS + r * step_y, GAP_PIXELS + c * step_x
            grid[y : y + height * scale, x : x + width * scale] = tile
    return grid


def model_sha256(model: nn.Module) -> str:
    """Hex SHA-256 of a model's parameters and buffers: name, type, shape and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def sampling_settings(config: RunConfig) -> dict[str, Any]:
    """The section `sampling` as it reads back from JSON, which has no infinities: "inf" and "-inf"."""
    return {name: _spelled(value) for name, value in unconvert(config.sampling).items()}


def _spelled(value: Any) -> Any:
    if isinstance(value, list):
        return [_spelled(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def describe_origin(config: RunConfig, model: nn.Module) -> dict[str, Any]:
    """What it takes to draw the same sample set again. Everything in it is public: settings and released weights."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "diffusers", "accelerate")}
    return {
        "run": config.name,
        "seed": config.seed,
        "sampling": sampling_settings(config),
        "num_classes": config.data.num_classes,
        "labels_checked_by_teacher": config.teacher.used,
        "precision": config.compute.precision,
        "model_sha256": model_sha256(model),
        "versions": {"dpsyngen": dpsyngen.__version__, "python": platform.python_version(), **versions},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def make_directory(directory: Path) -> None:
    """Make the directory of a sample set, so that an impossible one is known before the work; InputError if it is."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)


def write_samples(directory: Path, images: np.ndarray, labels: np.ndarray, provenance: dict[str, Any]) -> None:
    """Write images.npz, grid.png and provenance.json, each complete or absent; a set already there is replaced.

    Args:
        directory: Made where it is missing.
        images: uint8 [N, H, W, C], C = 1 or 3, N >= 1.
        labels: int64 [N]; all the same where there are no classes.
        provenance: JSON-able, from `describe_origin`. The hash of images.npz is added, which ties the two together.
    Raises:
        InputError: the directory can't be made or written, or the disk is full.
    """
    make_directory(directory)
    (directory / "provenance.json").unlink(missing_ok=True)  # it describes the images that are about to be replaced
    archive, picture = io.BytesIO(), io.BytesIO()
    np.savez_compressed(archive, images=images, labels=labels)
    Image.fromarray(sample_grid(images, labels).squeeze()).save(picture, format="PNG")
    write_file(directory / "images.npz", archive.getvalue())
    write_file(directory / "grid.png", picture.getvalue())
    digest = hashlib.sha256(archive.getvalue()).hexdigest()
    write_json(directory / "provenance.json", {**provenance, "images": {"shape": list(images.shape), "sha256": digest}})


def read_samples(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a sample set: images uint8 [N, H, W, C] with C = 1 or 3, and labels int64 [N] >= 0; N >= 1.

    Raises:
        InputError: images.npz is missing, unreadable, or holds something else.
    """
    path = directory / "images.npz"
    if not path.is_file():
        raise InputError(f"{path}: expected a sample set, as sample.py writes it, but there is no such file")
    try:
        with path.open("rb") as file:  # np.load leaves its own handle open when it fails
            archive = np.load(file, allow_pickle=False)
            images, labels = archive["images"], archive["labels"]
    except (OSError, EOFError, LookupError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: expected an .npz file with the arrays images and labels") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or images.size == 0:
        raise InputError(f"{path}: expected images uint8 [N, H, W, 1 or 3], got {images.dtype} {list(images.shape)}")
    if labels.dtype != np.int64 or labels.shape != (len(images),) or labels.min() < 0:
        raise InputError(f"{path}: expected labels int64 [{len(images)}], all >= 0, got {labels.dtype} {list(labels.shape)}")
    return images, labels
