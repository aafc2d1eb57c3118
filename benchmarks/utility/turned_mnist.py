"""MNIST whose classes look alike: each training image turned, slanted and shrunk by chance.

    python -m benchmarks.utility.turned_mnist turned.npz
    python train.py --config benchmarks/utility/turned_mnist.yaml [--teacher.share 0.1] --run runs/turned
    python sample.py --run runs/turned && python evaluate.py --run runs/turned

What helps where classes look alike can be chosen on it without a look at other private images: the last 5,000 are kept out, as on MNIST.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.ndimage import affine_transform
from tqdm import tqdm

from dpsyngen.config import DataConfig
from dpsyngen.data import load_train, to_uint8

DEGREES, SHRINKING, SLANT, SEED = 60, (0.9, 1.4), 0.25, 1


def turned(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image uint8 [28, 28] around its centre, its background black."""
    angle, scale, slant = np.deg2rad(rng.uniform(-DEGREES, DEGREES)), rng.uniform(*SHRINKING), rng.uniform(-SLANT, SLANT)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix, centre = rotation @ np.array([[1, slant], [0, 1]]) * scale, np.array([13.5, 13.5])
    return affine_transform(image.astype(np.float32), matrix, centre - matrix @ centre, order=1).clip(0, 255).astype(np.uint8)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="an .npz file of images and labels, in MNIST's order")
    file = parser.parse_args().file
    data = load_train(DataConfig(source="mnist", num_classes=10))
    images, labels = data.batch(np.arange(len(data)))
    rng = np.random.default_rng(SEED)
    shown = np.stack([turned(image, rng) for image in tqdm(to_uint8(images)[..., 0], unit="image", disable=None)])
    np.savez(file, images=shown[..., None], labels=labels.numpy())


if __name__ == "__main__":
    main()
