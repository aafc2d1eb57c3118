"""Sets of image files that are decoded where they are asked for, by a pool of threads."""

import functools
import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from dpsyngen.data.arrays import fit_image
from dpsyngen.data.dataset import DatasetOnDisk
from dpsyngen.data.records import Records
from dpsyngen.errors import InputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_IMAGES_PER_TASK = 4


class Container(Protocol):
    """What holds the image files: a folder, a .zip, .tar files. Threads read from it at once."""

    def content(self, place: np.void) -> bytes:
        """The bytes of the image file at an index.PLACE."""

    def name(self, place: np.void) -> str:
        """What to call it in errors."""


@dataclass(frozen=True, eq=False)
class EncodedImages(DatasetOnDisk):
    """The images at the places start to before stop of an index. Memory: what the container takes, and none per image."""

    places: Records
    container: Container
    digest: str
    """Changes when the files do."""

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As the base class has it. Pillow and file reads release the interpreter's lock, so threads work side by side."""
        places = self.places.read(indices + self.start)
        images = np.empty((len(places), *self.image_shape), dtype=np.uint8)

        def read_task(first: int) -> None:
            for i in range(first, min(first + _IMAGES_PER_TASK, len(places))):
                images[i] = self._decode(places[i])

        for _ in _workers().map(read_task, range(0, len(places), _IMAGES_PER_TASK)):
            pass  # raises what a task raised; the tasks that haven't begun are cancelled then
        return images, places["label"].astype(np.int64)

    def fingerprint(self) -> str:
        """SHA-256 of the names, sizes, times and numbers of the files, not of their content, which may be terabytes."""
        parts = (self.digest, self.image_shape, self.class_names, self.start, self.stop)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _decode(self, place: np.void) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(self.container.content(place))) as image:
                return fit_image(image, self.config.channels, self.config.image_size)
        except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{self.container.name(place)}: expected a readable image ({reason})") from error


@functools.cache
def _workers() -> ThreadPoolExecutor:
    """One pool for all sets of this process, with a few threads more than processors, since some wait for the disk."""
    return ThreadPoolExecutor(thread_name_prefix="images")
