"""What a synthetic dataset is worth: classification accuracy score, FID, precision and recall."""

from dpsyngen.evaluation.classifiers import build_classifier, train_classifier
from dpsyngen.evaluation.distances import frechet_distance, precision_recall
from dpsyngen.evaluation.features import FeatureExtractor, build_extractor
from dpsyngen.evaluation.metrics import evaluate
from dpsyngen.evaluation.report import metric_label, metric_text, metrics_table, save_picture

__all__ = [
    "FeatureExtractor",
    "build_classifier",
    "build_extractor",
    "evaluate",
    "frechet_distance",
    "metric_label",
    "metric_text",
    "metrics_table",
    "precision_recall",
    "save_picture",
    "train_classifier",
]
