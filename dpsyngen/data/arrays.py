"""From pictures of any size to the shape that the configuration declares."""

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from dpsyngen.config import DataConfig
from dpsyngen.data.dataset import BAR_FORMAT, ImageDataset
from dpsyngen.errors import InputError

UNLABELLED: tuple[str, ...] = ("image",)
"""class_names of images without labels."""


def fit_image(image: Image.Image, channels: int, size: int) -> np.ndarray:
    """Bring a picture to uint8 [channels, size, size].

    Turned upright by its EXIF orientation, transparency laid on black, converted to grayscale or RGB, cropped to the
    central square, resized with a Lanczos filter. Raises ValueError for pictures of more than 8 bits a channel, whose
    range can't be guessed.
    """
    if image.mode[0] in "IF":
        raise ValueError(f"expected at most 8 bits a channel, got mode {image.mode}")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def fit_images(images: np.ndarray, channels: int, size: int, description: str | None = None) -> np.ndarray:
    """uint8 [N, H, W] or [N, H, W, 1 or 3] to [N, channels, size, size], image by image as in `fit_image`.

    With a description there is a progress bar.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[1:] == (size, size, channels):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    fitted = np.empty((len(images), channels, size, size), dtype=np.uint8)
    for i, image in enumerate(tqdm(images, desc=description, bar_format=BAR_FORMAT, disable=None if description else True)):
        fitted[i] = fit_image(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), channels, size)
    return fitted


def dataset_from_arrays(
    images: np.ndarray, labels: np.ndarray | None, config: DataConfig, where: str, class_names: tuple[str, ...] | None = None
) -> ImageDataset:
    """Build the dataset that config declares from arrays read from `where`, which names them in errors.

    images uint8 [N, H, W] or [N, H, W, C] with C 1 or 3; labels integers [N] or [N, 1], which may be None, and are
    ignored, if num_classes is 0. class_names are those that a source fixes. Raises InputError if something doesn't fit.
    """
    expect_images(images.dtype, images.shape, where)
    if class_names is not None and config.num_classes not in (0, len(class_names)):
        raise InputError(
            f"data.num_classes: expected {len(class_names)}, or 0 to ignore the labels, since the data is {where}, got {config.num_classes}"
        )
    fitted_labels = _fit_labels(labels, len(images), config.num_classes, where)
    names = config.class_names or class_names or tuple(str(i) for i in range(config.num_classes))
    fitted_images = fit_images(images, config.channels, config.image_size, "resizing")
    return ImageDataset(fitted_images, fitted_labels, names if config.num_classes else UNLABELLED)


def _fit_labels(labels: np.ndarray | None, count: int, num_classes: int, where: str) -> np.ndarray:
    if num_classes == 0:
        return np.zeros(count, dtype=np.int64)
    if labels is None:
        raise InputError(f"{where}: expected labels, since data.num_classes is {num_classes} (0 stands for images without labels)")
    expect_labels(labels.dtype, labels.shape, count, where)
    expect_classes(labels, num_classes, where)
    return labels.reshape(count).astype(np.int64)


def expect_images(dtype: np.dtype, shape: tuple[int, ...], where: str) -> None:
    """Raise InputError unless this is uint8 [N, H, W] or [N, H, W, 1 or 3] with something in it."""
    if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
        raise InputError(f"{where}: expected images uint8 [N, H, W] or [N, H, W, 1 or 3], got {dtype} {list(shape)}")
    if 0 in shape:
        raise InputError(f"{where}: expected at least one image, got shape {list(shape)}")


def expect_labels(dtype: np.dtype, shape: tuple[int, ...], count: int, where: str) -> None:
    """Raise InputError unless this is integers [count] or [count, 1]."""
    if not np.issubdtype(dtype, np.integer) or shape not in ((count,), (count, 1)):
        raise InputError(f"{where}: expected labels to be one integer per image, got {dtype} {list(shape)} for images [{count}, ...]")


def expect_classes(labels: np.ndarray, num_classes: int, where: str) -> None:
    """Raise InputError unless the labels are from 0 to num_classes - 1."""
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(f"{where}: expected labels from 0 to {num_classes - 1} (data.num_classes is {num_classes}), got others")
