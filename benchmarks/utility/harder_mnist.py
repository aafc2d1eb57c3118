"""MNIST made harder, so that what other private images need can be chosen without a look at them.

    python -m benchmarks.utility.harder_mnist turned turned.npz
    python train.py --config benchmarks/utility/turned_mnist.yaml [--teacher.share 0.1] --run runs/turned
    python sample.py --run runs/turned && python evaluate.py --run runs/turned

`turned` turns, slants and shrinks each training image by chance, so that classes look alike. `faint` draws each digit into a patch
of any shade, a little darker than that, so that outlines say nothing and all that tells classes apart has little contrast.
Its config is faint_mnist.yaml. `mirrored` shows half of the images, by chance, as in a mirror, so that mirroring suits them:

    python -m dpsyngen.sweep --cells configs/experiments/recipe.yaml --data.source npz --data.path mirrored.npz

Images keep MNIST's order: the last 5,000 can be kept out, as on MNIST.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.ndimage import affine_transform
from tqdm import tqdm

from dpsyngen.config import DataConfig
from dpsyngen.data import load_train

SEED = 1


def turned(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image uint8 [28, 28] turned around its centre by up to 60 degrees, slanted and shrunk, on black."""
    angle, scale, slant = np.deg2rad(rng.uniform(-60, 60)), rng.uniform(0.9, 1.4), rng.uniform(-0.25, 0.25)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix, centre = rotation @ np.array([[1, slant], [0, 1]]) * scale, np.array([13.5, 13.5])
    return affine_transform(image.astype(np.float32), matrix, centre - matrix @ centre, order=1).clip(0, 255).astype(np.uint8)


def faint(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image uint8 [28, 28], its strokes 15 to 45 % darker than the patch that they are in: a superellipse on black."""
    half_height, half_width = rng.uniform(10, 14, 2)
    exponent, shade, contrast = rng.uniform(2, 6), rng.uniform(0.35, 0.95), rng.uniform(0.15, 0.45)
    y, x = np.abs(np.indices((28, 28)) - 13.5)
    radius = ((y / half_height) ** exponent + (x / half_width) ** exponent) ** (1 / exponent)
    patch = shade * np.clip((1 - radius) * 12 + 0.5, 0, 1)
    return (255 * patch * (1 - contrast * image / 255)).round().astype(np.uint8)


def mirrored(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image uint8 [28, 28], left and right exchanged with probability 1/2."""
    return image[:, ::-1] if rng.random() < 0.5 else image


HARDER = {"turned": turned, "faint": faint, "mirrored": mirrored}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=HARDER)
    parser.add_argument("file", type=Path, help="an .npz file of images and labels, in MNIST's order")
    options = parser.parse_args()
    harder, rng = HARDER[options.how], np.random.default_rng(SEED)
    data = load_train(DataConfig(source="mnist", num_classes=10))
    images, labels = data.read(np.arange(len(data)))
    shown = np.stack([harder(image, rng) for image in tqdm(images[:, 0], unit="image", disable=None)])
    np.savez(options.file, images=shown[..., None], labels=labels)


if __name__ == "__main__":
    main()
