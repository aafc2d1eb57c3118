"""What the runs of a selection are compared by: a number that tells no more of private images than is paid for."""

import math
from dataclasses import dataclass
from typing import Any

from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError
from dpsyngen.privacy.accounting import GaussianMechanism, Mechanism
from dpsyngen.privacy.secure_noise import Grid

_ACCURACY = "cas_"
_FEATURES = ("fid", "precision", "recall")
_MOST_NOISE = 1e4
_ANY_NUMBER = 2**62  # of images; how many there are is not public
PUBLIC_FLAG, NOISE_FLAG = "--score-images-are-public", "--score-noise"


@dataclass(frozen=True)
class Score:
    """A metric of evaluation.json: against public images a function of the run's output alone, against private ones counted with noise.

    With `noise` it is the number of private images that classifiers trained on the synthetic ones get right, with Gaussian noise.
    One image more or less, or in the place of another, changes the number by at most 1 for each classifier that was trained.
    """

    metric: str
    """A name in evaluation.json."""
    noise: float | None
    """The noise's deviation in images; None where the images are public."""
    trainings: int
    """evaluation.classifier_seeds: the classifiers whose right answers are added up."""

    @classmethod
    def of(cls, config: RunConfig, metric: str, noise: float | None, *, images_are_public: bool) -> "Score":
        """The score by `metric` of runs that are evaluated as `config` says. Raises InputError for one that would cost what nobody pays."""
        evaluation = config.evaluation
        known = [f"{_ACCURACY}{kind}" for kind in evaluation.classifiers] if config.data.num_classes > 1 else []
        known += [] if evaluation.features == "none" else _FEATURES
        if metric not in known:
            raise InputError(f"--select: expected a metric that evaluate.py computes here ({', '.join(known)}), got {metric}")
        if noise is not None:
            if images_are_public or not metric.startswith(_ACCURACY):
                raise InputError(f"{NOISE_FLAG}: expected it with a metric {_ACCURACY}... and private images alone, got --select {metric}")
            if not 0 < noise <= _MOST_NOISE:
                raise InputError(f"{NOISE_FLAG}: expected a number > 0, at most {_MOST_NOISE:g}, got {noise:g}")
            if not config.data.held_in_memory(_ANY_NUMBER):
                # evaluation takes a part of large sets on disk, evenly spaced: one image more or less would move many of them
                raise InputError(f"data.in_memory: expected always beside {NOISE_FLAG}, got {config.data.in_memory}")
        elif images_are_public and evaluation.reference == "held_out":
            raise InputError(f"{PUBLIC_FLAG}: expected evaluation.reference test, since images of data.held_out are as private as the others")
        elif not (images_are_public or config.data.public):
            raise InputError(f"--select {metric}: expected a score that costs nothing or is paid for: {PUBLIC_FLAG} declares the test images public, "
                             f"{NOISE_FLAG} adds noise to the number of private images that are classified right")  # fmt: skip
        elif metric in _FEATURES and evaluation.features != "inception" and not config.data.public:
            raise InputError(
                f"evaluation.features: expected inception where {metric} is the score, since other features are learnt on private images"
            )
        return cls(metric, noise, evaluation.classifier_seeds)

    @property
    def description(self) -> str:
        """For people."""
        if self.noise is None:
            return f"{self.metric} against images declared public"
        return f"{self.metric}: the number of private images classified right, with Gaussian noise of deviation {self.noise:g} images"

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """What scoring one run costs beyond training it."""
        return () if self.noise is None else (GaussianMechanism(self.noise, name="score"),)

    @property
    def grid(self) -> Grid:
        """The grid that the noise is rounded to exactly, as in `dpsyngen.privacy.secure_noise`; its sensitivity is that of the sum of counts."""
        return Grid.of(self.noise or 1.0, float(self.trainings))

    def value(self, evaluation: dict[str, Any], rounded_noise: int) -> float:
        """The higher, the better: from evaluation.json, and the noise in steps of the grid, which a public score doesn't need.

        What isn't finite counts as worst, which is a function of the output like any other. InputError if the metric isn't there.
        """
        record = evaluation.get("metrics", {}).get(self.metric)
        if record is None:
            raise InputError(f"--select: expected a metric that evaluate.py computes of these images, got {self.metric}")
        if self.noise is None:
            value = -record["value"] if self.metric == "fid" else record["value"]
            return value if math.isfinite(value) else -math.inf
        right = sum(row[label] for label, row in enumerate(record["confusion_matrix"]))
        return right * math.trunc((1 - 1e-9) / self.grid.step) + rounded_noise  # cut off, so that no image counts for more
