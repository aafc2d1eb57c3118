"""The evaluation of a synthetic dataset against real images, as one JSON-able record."""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dpsyngen.compute import Compute
from dpsyngen.config import EvaluationConfig
from dpsyngen.data import Dataset, ImageDataset
from dpsyngen.errors import InputError
from dpsyngen.evaluation.classifiers import HELD_OUT_FRACTION, apply_in_batches, train_classifier
from dpsyngen.evaluation.distances import NEIGHBOURS, frechet_distance, precision_recall
from dpsyngen.evaluation.features import FeatureExtractor, build_extractor

MIN_IMAGES = 10
MANIFOLD_IMAGES = 3000
"""At most this many images of either kind enter precision and recall, whose cost grows with the square."""
NOT_PRIVATE = "computed against private images: not covered by the privacy guarantee; not part of a release"
PUBLIC = "computed against images that data.public declares public"
ALONE = Compute(torch.device("cpu"))


def evaluate(
    images: np.ndarray,
    labels: np.ndarray,
    real_train: Dataset | None,
    real_reference: ImageDataset,
    config: EvaluationConfig,
    seed: int,
    *,
    public: bool = False,
    compute: Compute = ALONE,
    extractor: FeatureExtractor | None = None,
) -> dict[str, Any]:
    """Measure synthetic images against real ones. A function of its arguments alone, up to the rounding of the device.

    Processes share the trainings of classifiers and the extraction of features; every one must call this and gets the whole record, which
    is the same on any number of them, to the bit where devices and threads are equal.

    Args:
        images: Synthetic, uint8 [N, H, W, C]; at least 10.
        labels: Integers [N] in [0, number of classes).
        real_train: Real training images, for the feature network when FID doesn't compare Inception's features.
        real_reference: Real images that the metrics compare with; they are never trained on, and choose nothing.
        config: Which metrics, and how.
        seed: Of splits, initialisation and subsets.
        public: Whether the real images are declared public.
        compute: Where, and with which other processes.
        extractor: What `build_extractor` makes of these arguments, where it is there already; else it is made.
    Returns:
        "metrics": by name (cas_logistic_regression, cas_mlp, cas_cnn, fid, precision, recall) a record with value, protocol,
        reference, seed, private and details of its own; accuracies, precision and recall are in [0, 1]. "skipped": by name why
        a metric is missing. "images", "reference_images", "class_names", "seed", "private".
    Raises:
        InputError: images or labels don't fit the real ones, there are too few, or the features can't be had.
    """
    synthetic = _check(images, labels, real_reference)
    common = {"reference": f"{len(real_reference)} real {config.reference.replace('_', '-')} images", "seed": seed,
              "private": PUBLIC if public else NOT_PRIVATE}
    if config.features != "none" and extractor is None:
        extractor = build_extractor(config.features, real_train, seed, compute)
    metrics: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    if len(real_reference.class_names) > 1:
        outcomes = _train_classifiers(synthetic, real_reference, config, seed, compute)
        metrics |= {f"cas_{kind}": _accuracy_score(kind, outcomes[kind], synthetic, config) for kind in config.classifiers}
    else:
        skipped["cas"] = "the images have no labels, so there is nothing to classify"
    if extractor is not None:
        metrics |= _compare_features(extractor, synthetic, real_train, real_reference, config, seed)
    else:
        skipped["fid"] = "evaluation.features is none"
    return {
        "metrics": {name: record | common for name, record in metrics.items()},
        "skipped": skipped,
        "images": len(synthetic),
        "reference_images": len(real_reference),
        "class_names": list(real_reference.class_names),
        "seed": seed,
        "private": common["private"],
    }


def _check(images: np.ndarray, labels: np.ndarray, real: ImageDataset) -> ImageDataset:
    """The synthetic images as a dataset with the real ones' classes, if they have their shape."""
    channels, height, width = real.images.shape[1:]
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels):
        expected = f"uint8 [N, {height}, {width}, {channels}] like the real ones"
        raise InputError(f"synthetic images: expected {expected}, got {images.dtype} {list(images.shape)}")
    if len(images) < MIN_IMAGES:
        raise InputError(f"synthetic images: expected at least {MIN_IMAGES}, got {len(images)}")
    if len(real) < MIN_IMAGES:
        raise InputError(f"real images: expected at least {MIN_IMAGES} to compare with, got {len(real)}")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"synthetic labels: expected one integer for each of {len(images)} images, got {labels.dtype} {list(labels.shape)}")
    classes = len(real.class_names)
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"synthetic labels: expected 0 to {classes - 1} like the real ones, got {labels.min()} to {labels.max()}")
    return ImageDataset(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.astype(np.int64), real.class_names)


@dataclass(frozen=True)
class _Outcome:
    """What came of one training."""

    selected_epoch: int
    held_out_accuracy: float
    confusion: np.ndarray
    """Counts float64 [classes, classes]: real class by predicted class."""


def _train_classifiers(
    synthetic: ImageDataset, real: ImageDataset, config: EvaluationConfig, seed: int, compute: Compute
) -> dict[str, list[_Outcome]]:
    """Every training of every kind of classifier, dealt to the processes, which all get all outcomes."""
    classes, seeds = len(real.class_names), config.classifier_seeds
    outcomes = torch.zeros(len(config.classifiers) * seeds, 2 + classes**2, dtype=torch.float64)  # zeros for those of other processes
    mine = compute.share(len(outcomes))
    with tqdm(total=len(mine) * config.classifier_epochs, unit="epoch", leave=False, disable=None if compute.is_main else True) as bar:
        for done, index in enumerate(mine, start=1):
            kind, repetition = config.classifiers[index // seeds], index % seeds
            bar.set_description(kind)
            training_seed = int(np.random.SeedSequence((seed, repetition)).generate_state(1)[0])
            trained = train_classifier(kind, synthetic, config.classifier_epochs, training_seed, compute.device, bar.update)
            predicted = apply_in_batches(trained.model, real.images, Compute(compute.device)).argmax(1)
            counts = np.bincount(real.labels * classes + predicted, minlength=classes**2)
            outcomes[index] = torch.tensor([trained.selected_epoch, trained.held_out_accuracy, *counts], dtype=torch.float64)
            bar.update(done * config.classifier_epochs - bar.n)  # epochs that early stopping left out
    rows = compute.sum_over_processes({"outcomes": outcomes})["outcomes"].numpy()
    all_outcomes = [_Outcome(int(row[0]), float(row[1]), row[2:].reshape(classes, classes)) for row in rows]
    return {kind: all_outcomes[number * seeds : (number + 1) * seeds] for number, kind in enumerate(config.classifiers)}


def _accuracy_score(kind: str, outcomes: list[_Outcome], synthetic: ImageDataset, config: EvaluationConfig) -> dict[str, Any]:
    """Classification accuracy score (Ravuri and Vinyals, arXiv 1905.10887): train on synthetic images, test on real ones."""
    accuracies = [float(outcome.confusion.trace() / outcome.confusion.sum()) for outcome in outcomes]
    return {
        "value": statistics.fmean(accuracies),
        "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "protocol": f"accuracy on real images of {kind} classifiers trained on {len(synthetic)} synthetic images alone; mean and standard "
        f"deviation over {len(accuracies)} trainings; the best of at most {config.classifier_epochs} epochs is chosen on "
        f"{HELD_OUT_FRACTION:.0%} of the synthetic images, held out",
        "accuracies": accuracies,
        "selected_epochs": [outcome.selected_epoch for outcome in outcomes],
        "held_out_synthetic_accuracies": [outcome.held_out_accuracy for outcome in outcomes],
        "confusion_matrix": np.sum([outcome.confusion for outcome in outcomes], axis=0).astype(np.int64).tolist(),
    }


def _compare_features(
    extractor: FeatureExtractor,
    synthetic: ImageDataset,
    real_train: Dataset | None,
    real: ImageDataset,
    config: EvaluationConfig,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """FID, precision and recall on the same features, of at most evaluation.fid_images images of a kind."""
    rng = np.random.default_rng(seed)

    def extract(data: ImageDataset, name: str) -> np.ndarray:
        chosen = rng.permutation(len(data))[: config.fid_images]  # shuffled, since images from a folder come class by class
        return extractor.extract(data.images[chosen], f"features of {name} images")

    real_features, synthetic_features = extract(real, "real"), extract(synthetic, "synthetic")
    protocol = f"Fréchet distance of {len(real_features)} real and {len(synthetic_features)} synthetic images; {extractor.protocol}"
    distance = {"name": extractor.name, "value": frechet_distance(real_features, synthetic_features), "protocol": protocol, "note": extractor.note}
    if extractor.note and real_train is not None and len(real_train) >= MIN_IMAGES:  # gives a scale to numbers that aren't known from elsewhere
        distance["real_training_images"] = frechet_distance(real_features, extract(real_train.for_evaluation(), "real training"))
    compared: dict[str, dict[str, Any]] = {"fid": distance}
    size = min(len(real_features), len(synthetic_features), MANIFOLD_IMAGES)
    if size > NEIGHBOURS:
        values = precision_recall(real_features[:size], synthetic_features[:size])
        protocol = f"Kynkäänniemi et al. 2019, k = {NEIGHBOURS}, {size} real and {size} synthetic images; {extractor.protocol}"
        compared |= {name: {"value": value, "protocol": protocol} for name, value in zip(("precision", "recall"), values, strict=True)}
    return compared
