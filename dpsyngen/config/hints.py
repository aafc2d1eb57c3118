"""The hints: what is released of each class before DP-SGD, and what programmatic images have in its place."""

from dataclasses import dataclass
from typing import Literal

from dpsyngen.config.checks import require


@dataclass(frozen=True)
class HintsConfig:
    """DP class means as hints to the denoiser: as the preconditioning's centre and as an input channel."""

    kind: Literal["none", "class_means"] = "class_means"
    """none switches hints off."""
    prototypes: int = 1
    """Hints per class: with 1 the class mean, else the centres of so many parts of each class, found by DP k-means."""
    rounds: int = 4
    """Rounds of that k-means, the first of which finds the class means; they divide the share evenly."""
    share: float = 0.1
    """The share of the privacy budget that the means may spend, in the Gaussian-DP mu^2 scale."""
    centre: float = -1.0
    """Public constant c in [-1, 1]: images are clipped around it before they are summed."""
    radius: float = 0.7
    """Public constant: the L2 radius of the clipping around the centre, as a multiple of sqrt(C H W)."""
    count_weight: float = 0.3
    """Public constant b in (0, 1): the part of the unit sensitivity that the class counts take (a^2 + b^2 = 1)."""
    count_floor: float = 20.0
    """Public constant: noisy counts are raised to at least this."""
    covariance_rank: int = 0
    """How many main axes of a DP covariance of images around their hints are released, for stages.closed_form; 0 for none."""
    covariance_share: float = 0.1
    """The share of the privacy budget that the covariance may spend, on the same scale."""
    covariance_resolution: int = 14
    """It is of low frequencies alone, of so many along a side."""
    covariance_radius: float = 0.4
    """Public constant: the L2 radius to which an image's difference from its hint is clipped, as a multiple of sqrt(C H W)."""
    synthetic_from: Literal["image", "class"] = "image"
    """What a programmatic image's hint is made of: itself, or the mean of the other versions of its figure, which is to it what a class
    mean is to a private image. class needs the family variations."""
    synthetic_neighbours: int | None = None
    """With synthetic_from class: only so many versions, those nearest to the image, as a prototype is the mean of the nearest part of its class;
    null takes all."""
    synthetic_blur: tuple[float, float] = (0.08, 0.2)
    """Range of the blur that turns this into the hint, as a fraction of the image side."""
    synthetic_fade: tuple[float, float] = (0.4, 1.0)
    """Range of the contrast that the hint keeps."""
    synthetic_noise: tuple[float, float] = (0.0, 0.0)
    """Range of the standard deviation of noise on the hint, as DP class means have it; images are in [-1, 1]."""

    def __post_init__(self) -> None:
        require(self.prototypes >= 1, "hints.prototypes", "an integer >= 1", self.prototypes)
        require(self.rounds >= 2, "hints.rounds", "an integer >= 2", self.rounds)
        require(0 < self.share < 1, "hints.share", "a number in (0, 1)", self.share)
        require(self.covariance_rank >= 0, "hints.covariance_rank", "an integer >= 0", self.covariance_rank)
        left = 1 - self.share
        require(0 < self.covariance_share < left or self.covariance_rank == 0, "hints.covariance_share",
                f"a number > 0 that leaves something beside hints.share, below {left:g}", self.covariance_share)
        require(self.covariance_resolution >= 1, "hints.covariance_resolution", "an integer >= 1", self.covariance_resolution)
        require(self.covariance_radius > 0, "hints.covariance_radius", "a number > 0", self.covariance_radius)
        require(-1 <= self.centre <= 1, "hints.centre", "a number in [-1, 1]", self.centre)
        require(self.radius > 0, "hints.radius", "a number > 0", self.radius)
        require(0 < self.count_weight < 1, "hints.count_weight", "a number in (0, 1)", self.count_weight)
        require(self.count_floor >= 1, "hints.count_floor", "a number >= 1", self.count_floor)
        require(self.synthetic_neighbours is None or self.synthetic_neighbours >= 1, "hints.synthetic_neighbours", "an integer >= 1 or null",
                self.synthetic_neighbours)
        for name in ("synthetic_blur", "synthetic_fade", "synthetic_noise"):
            low, high = getattr(self, name)
            require(0 <= low <= high, f"hints.{name}", "two numbers, 0 <= low <= high", (low, high))

    @property
    def rounds_made(self) -> int:
        """Gaussian mechanisms that the hints take: one for class means alone."""
        return self.rounds if self.prototypes > 1 else 1
