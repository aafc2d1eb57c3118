"""What is released of the private images before the first private step, all at once: hints, the DP covariance, the teacher."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from tqdm import tqdm

from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig
from dpsyngen.data import Dataset
from dpsyngen.data.synthetic import SyntheticImages
from dpsyngen.denoiser import Denoiser, RoutedDenoiser
from dpsyngen.privacy.class_means import ClassMeansMechanism
from dpsyngen.privacy.covariance import CovarianceMechanism
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.teacher import TeacherMechanism
from dpsyngen.teacher import Directions


def release_moments(
    config: RunConfig, plan: PrivacyPlan | None, ledger: Ledger, dataset: Dataset, compute: Compute, denoiser: Denoiser | RoutedDenoiser
) -> None:
    """Spend the mechanisms beside DP-SGD and give the denoiser what they release: class means or prototypes, and what the config adds to them.

    Exact ones where the stages are nonprivate. The processes share the images.
    """
    noise, share = ledger.begin_class_means(), _Share(dataset, compute)  # the ledger refuses where the plan has no such mechanism
    size = config.data.expected_size or len(dataset)
    mechanism = ClassMeansMechanism.from_config(config, 0.0) if plan is None else plan.class_means
    means = mechanism.release(share, noise, compute.sum_over_processes)  # type: ignore[union-attr]
    denoiser.set_class_means(*(tensor.to(compute.device) for tensor in means))
    if config.hints.covariance_rank > 0:
        covariance = CovarianceMechanism.from_config(config, size, 0.0) if plan is None else plan.covariance
        modes = covariance.release(share, means, noise, compute.sum_over_processes)  # type: ignore[union-attr]
        denoiser.set_modes(*(tensor.to(compute.device) for tensor in modes))
    if denoiser.teacher is not None:
        teacher = TeacherMechanism.from_config(config, size, 0.0) if plan is None else plan.teacher
        directions, seen = seen_by_teacher(config, dataset, compute)
        weights = teacher.release(seen, noise, compute.sum_over_processes)  # type: ignore[union-attr]
        denoiser.teacher.take_over(directions, weights.to(compute.device))


def seen_by_teacher(config: RunConfig, dataset: Dataset, compute: Compute) -> tuple[Directions, Iterator[tuple[Tensor, Tensor]]]:
    """The directions along which a run's teacher looks, and what it sees: batches of features float32 [N, D] on the CPU and labels int64 [N].

    The directions are those of the programmatic images that the run's synthetic phase has, or would have. The processes share the images of
    the dataset, and how many there are isn't shown.
    """
    synthetic, teacher = config.synthetic, config.teacher
    programmatic = SyntheticImages(synthetic.family, synthetic.options, config.data.image_shape, config.seed)
    directions = Directions.of(programmatic.batch(range(teacher.images)).to(compute.device), teacher.components)
    compute.take_from_main(directions)  # an axis may point the other way on another machine
    bar = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    batches = tqdm(_Share(dataset, compute), desc="teacher", bar_format=bar, disable=None if compute.is_main else True)
    return directions, ((directions.seen(images.to(compute.device)).cpu(), labels) for images, labels in batches)


@dataclass(frozen=True)
class _Share:
    """A process's share of the images, in batches that can be gone through again and again."""

    dataset: Dataset
    compute: Compute

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for block in self._blocks:
            yield self.dataset.batch(np.arange(1000 * block, min(1000 * (block + 1), len(self.dataset))))

    @property
    def _blocks(self) -> range:
        """Numbers of blocks of 1,000 images; one for each process, though it may be empty."""
        return self.compute.share(max(self.compute.processes, -(-len(self.dataset) // 1000)))
