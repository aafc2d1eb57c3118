"""All that is measured: every denoiser's error at every noise level, where each ends, and how far apart the noised images are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig
from dpsyngen.data import SyntheticImages
from dpsyngen.stages import distance
from dpsyngen.stages.chosen import options_of
from dpsyngen.stages.elbows import Elbows, Proposal, last_within
from dpsyngen.stages.gaussian import Gaussian
from dpsyngen.stages.quality import Images, errors, shifted, trained

REFERENCE = "reference"
_DRAWING = 2  # beside the purposes of `dpsyngen.stages.quality`
_MOST_ENTRIES = 2**26  # of the matrix that a covariance is fitted to
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


@dataclass(frozen=True)
class Effort:
    """How much work goes into a survey, and what counts as equally good."""

    steps: int
    batch: int
    points: int
    tolerance: float


@dataclass(frozen=True, eq=False)
class Distance:
    """Between a set of images and measured reference images, as bounds for each sigma [m]; see `dpsyngen.stages.distance`."""

    wasserstein: float
    """W2 of the two sets, by optimal assignment."""
    gelbrich: float
    """What W2 can't be below, by mean and covariance."""
    kl_upper: np.ndarray
    tv_upper: np.ndarray
    tv_lower: np.ndarray

    @classmethod
    def between(cls, rows: np.ndarray, gaussian: Gaussian, reference: np.ndarray, reference_gaussian: Gaussian, sigmas: np.ndarray) -> "Distance":
        """Of rows [n, d] and at least as many of the reference; the Gaussians should be of other images, so that half-spaces are chosen fairly."""
        others = reference[: len(rows)]
        pairs = distance.coupled_distances(rows, others)
        return cls(
            distance.wasserstein(pairs), distance.gelbrich(gaussian, reference_gaussian), distance.kl_upper(pairs, sigmas),
            distance.tv_upper(pairs, sigmas), distance.tv_lower(rows, others, gaussian.mean - reference_gaussian.mean, sigmas),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Survey:
    """Errors [m] per pixel on the measured reference images, over rising ln sigma [m]."""

    log_sigma: np.ndarray
    reference: np.ndarray
    """Of the denoiser trained on the reference."""
    families: Mapping[str, np.ndarray]
    """Of those trained on programmatic images."""
    with_known_mean: Mapping[str, np.ndarray]
    """Of the same, when they are told how far the reference's mean is from their own."""
    gaussians: Mapping[str, np.ndarray]
    """Of closed forms: `full` and `scalar` covariance of the reference, and each family's own full one by its name."""
    distances: Mapping[str, Distance]
    """Of each family to the reference, and under `reference` of the reference's two parts."""
    tolerance: float
    trained_on: int
    measured_on: int

    def excess(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """ln of each error over the reference-trained one's; [m]."""
        return {name: np.log(error / self.reference) for name, error in found.items()}

    @property
    def elbows(self) -> dict[str, Elbows]:
        """Of each family."""
        return self._elbows(self.families)

    @property
    def elbows_with_known_mean(self) -> dict[str, Elbows]:
        """Of each family when it is told the reference's mean."""
        return self._elbows(self.with_known_mean)

    @property
    def proposal(self) -> Proposal:
        """The thresholds."""
        return Proposal.of(self.elbows)

    @property
    def proposal_with_known_mean(self) -> Proposal:
        """What the thresholds would be with the reference's mean known."""
        return Proposal.of(self.elbows_with_known_mean)

    @property
    def gaussian_elbows(self) -> Elbows:
        """Where the Gaussian with the reference's mean and covariance is within tolerance, so that no network is needed."""
        return self._elbows(self.gaussians)["full"]

    @property
    def untaught_until(self) -> float | None:
        """Up to which ln sigma the reference-trained denoiser is not better, by the tolerance, than the Gaussian with one variance."""
        return last_within(self.log_sigma, np.log(self.gaussians["scalar"] / self.reference), math.log1p(self.tolerance))

    def _elbows(self, found: Mapping[str, np.ndarray]) -> dict[str, Elbows]:
        return {name: Elbows.of(self.log_sigma, excess, self.tolerance) for name, excess in self.excess(found).items()}


def survey(config: RunConfig, families: Sequence[str], images: tuple[np.ndarray, np.ndarray], effort: Effort, compute: Compute) -> Survey:
    """Train and measure; images are the reference's two parts, float32 [n, C, H, W] and [m, C, H, W]. Minutes, with a progress bar."""
    teaching, measured = images
    log_sigma = np.linspace(math.log(config.sampling.sigma_min), math.log(config.sampling.sigma_max), effort.points)
    sigmas, x0 = np.exp(log_sigma), torch.from_numpy(measured)
    rows, held_out = teaching.reshape(len(teaching), -1), measured.reshape(len(measured), -1)
    sources = {name: programmatic(config, name) for name in families}
    fitted, both = min(len(rows), _MOST_ENTRIES // rows.shape[1]), min(len(rows), len(held_out))
    gaussian = Gaussian.fit(rows[:fitted])
    gaussians = {"full": gaussian.errors_on(held_out, sigmas), "scalar": Gaussian.fit_scalar(rows).errors_on(held_out, sigmas)}
    distances = {REFERENCE: Distance.between(rows[:both], gaussian, held_out, gaussian, sigmas)}
    found, known = {}, {}
    work = effort.steps + effort.points
    with tqdm(total=work + len(families) * (work + effort.points), disable=None, dynamic_ncols=True, bar_format=_BAR) as bar:
        bar.set_description(REFERENCE)
        denoiser = trained(config, _drawn_from(teaching, config.seed), effort.steps, effort.batch, compute, bar.update)
        reference = errors(denoiser, x0, sigmas, config.seed, compute, bar.update)
        for name, source in sources.items():
            bar.set_description(name)
            denoiser = trained(config, source, effort.steps, effort.batch, compute, bar.update)
            found[name] = errors(denoiser, x0, sigmas, config.seed, compute, bar.update)
            unseen = source(effort.steps * effort.batch, fitted + both).flatten(1).numpy()
            own = Gaussian.fit(unseen[:fitted])
            apart = torch.from_numpy((own.mean - gaussian.mean).astype(np.float32)).reshape(config.data.image_shape)
            known[name] = errors(shifted(denoiser, apart.to(compute.device)), x0, sigmas, config.seed, compute, bar.update)
            gaussians[name] = own.errors_on(held_out, sigmas)
            distances[name] = Distance.between(unseen[fitted:], own, held_out, gaussian, sigmas)
    return Survey(log_sigma, reference, found, known, gaussians, distances, effort.tolerance, len(rows), len(held_out))


def programmatic(config: RunConfig, family: str) -> Images:
    """The endless sequence of a family's images. Raises InputError if there is no such family or option."""
    source = SyntheticImages(family, options_of(family, config.synthetic), config.data.image_shape, config.seed)
    return lambda first, n: source.batch(range(first, first + n))


def _drawn_from(teaching: np.ndarray, seed: int) -> Images:
    """Images [n, C, H, W] drawn with replacement, as a sequence."""
    pool = torch.from_numpy(teaching)

    def images(first: int, n: int) -> torch.Tensor:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_DRAWING, first))))
        return pool[rng.integers(len(pool), size=n)]

    return images
