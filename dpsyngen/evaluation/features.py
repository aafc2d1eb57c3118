"""What FID, precision and recall compare: Inception's features, or those of a small classifier trained on the real images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import trange

from dpsyngen.compute import Compute
from dpsyngen.data import Dataset
from dpsyngen.errors import InputError
from dpsyngen.evaluation.classifiers import (
    BATCH_SIZE,
    LEARNING_RATE,
    Classifier,
    apply_in_batches,
    build_classifier,
    optimiser_step,
    seeded,
)
from dpsyngen.evaluation.inception import find_weights, inception_features, load_inception

CLASSIFIER_STEPS = 300


@dataclass(frozen=True)
class FeatureExtractor:
    """A function from images to features, and what it is."""

    name: str
    """What the distance on these features is called."""
    protocol: str
    """How the features come about."""
    note: str
    """What to know about the choice; empty for the standard one."""
    extract: Callable[[np.ndarray, str | None], np.ndarray]
    """(images uint8 [N, C, H, W], description of the progress bar or None) -> float32 [N, F]."""


def build_extractor(kind: str, real_train: Dataset | None, seed: int, compute: Compute) -> FeatureExtractor:
    """The feature extractor that evaluation.features asks for.

    Args:
        kind: inception, classifier, or auto for the first of the two that can be had.
        real_train: Real images to train the classifier on; it learns their labels, or without labels to tell by how much an
            image is turned.
        seed: Of the classifier's training.
        compute: Where, and with which other processes; all get the same extractor.
    Raises:
        InputError: Inception's weights can't be had and are asked for, or the classifier is needed and there are no real
            training images.
    """
    reason = "by evaluation.features"
    if kind != "classifier":
        try:
            return _inception_extractor(compute)
        except OSError as error:
            if kind == "inception":
                raise InputError(f"evaluation.features: inception can't be had: {error}; put the file there, or choose classifier or none") from error
            reason = "since Inception's weights can't be had (evaluation.features inception says why)"
    if real_train is None:
        raise InputError(f"evaluation.features: expected none, as there are no real training images for a classifier, got {kind}")
    return _classifier_extractor(real_train, seed, compute, reason)


def _inception_extractor(compute: Compute) -> FeatureExtractor:
    inception = load_inception(_find_weights_together(compute), compute.device)
    return FeatureExtractor(
        name="FID",
        protocol="2048 features of Inception-v3 from images resized to 299 x 299, by clean-fid",
        note="",
        extract=lambda images, description: inception_features(images, inception, compute, description),
    )


def _find_weights_together(compute: Compute) -> Path:
    """`find_weights`, first on the main process, so that those beside it needn't download; OSError on all where one process fails."""
    folder, failure = Path(), None
    for turn in (True, False):
        if compute.is_main is turn:
            try:
                folder = find_weights()
            except OSError as error:
                failure = error
        if compute.largest_over_processes(int(failure is not None)):
            raise failure or OSError("another process can't have them")
    return folder


def _classifier_extractor(real_train: Dataset, seed: int, compute: Compute, reason: str) -> FeatureExtractor:
    model = train_feature_network(real_train, seed, compute.device) if compute.is_main else _network_for(real_train, compute.device).eval()
    compute.take_from_main(model.state_dict().values())
    task = "their classes" if len(real_train.class_names) > 1 else "by how much an image is turned"
    return FeatureExtractor(
        name="FID-classifier (not comparable with Inception FID)",
        protocol=f"128 penultimate features of a CNN trained for {CLASSIFIER_STEPS} steps on the real training images to tell {task}",
        note=f"a classifier's features, {reason}: comparable between image sets measured with the same real images, seed and kind of device, "
        "and not with FID by Inception",
        extract=lambda images, description: apply_in_batches(model.features, images, compute, description),
    )


def train_feature_network(data: Dataset, seed: int, device: torch.device) -> Classifier:
    """Train the CNN of `build_classifier` on real images for 300 steps of 128, and return it in evaluation mode.

    It learns the labels. Where there is just one class, it learns to tell by which multiple of 90 degrees an image was turned
    (Gidaris et al., arXiv 1803.07728), which needs no labels and gives features of shapes and their parts as well.
    """
    labelled = len(data.class_names) > 1
    with seeded(seed, device):
        model = _network_for(data, device)
        optimiser = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
        for _ in trange(CLASSIFIER_STEPS, desc="training the feature network", leave=False, disable=None):
            x, labels = data.batch(torch.randint(len(data), (BATCH_SIZE,)).numpy())
            if not labelled:
                x, labels = _turn(x)
            optimiser_step(model, optimiser, x.to(device), labels.to(device))
    return model.eval()


def _network_for(data: Dataset, device: torch.device) -> Classifier:
    """An untrained one, for the classes of the images or for four turns."""
    channels, height, width = data.image_shape
    return build_classifier("cnn", (channels, height, width), len(data.class_names) if len(data.class_names) > 1 else 4).to(device)


def _turn(x: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each image by a random multiple of 90 degrees, which becomes its label."""
    turns = torch.randint(4, (len(x),))
    return torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(x, turns, strict=True)]), turns
