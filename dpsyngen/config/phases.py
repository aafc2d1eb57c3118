"""The phases of training."""

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from dpsyngen.config.checks import require, require_density

SigmaDraw = Literal["lognormal", "uniform", "weights"]


@dataclass(frozen=True)
class PhaseConfig:
    """What the phases of training have in common."""

    batch_size: int = 128
    """Images a step."""
    noise_multiplicity: int = 4
    """Draws of (sigma, noise) per image."""
    sigma_stratified: bool = False
    """Whether the sigmas of an image's K draws come one from each of K equally likely parts of the draw, instead of independently."""
    antithetic: bool = False
    """Whether an image's K draws are K / 2 pairs with the same sigma and opposite noise; K must be even."""
    steps: int | None = None
    """Steps of this phase."""
    epochs: float | None = 300
    """Or its length in epochs of data.expected_size images."""
    learning_rate: float = 4e-4
    """Adam's peak learning rate."""
    beta1: float = 0.9
    """Decay per step of Adam's average of gradients; 0 is no momentum."""
    beta2: float = 0.999
    """Decay per step of Adam's average of squared gradients."""
    warmup: float = 0.02
    """The fraction of the steps over which the learning rate rises from zero."""
    decay: float = 0.0
    """The fraction of the steps, at the end, over which the learning rate falls to zero."""
    decay_shape: Literal["linear", "cosine"] = "linear"
    """How it falls: along a straight line, or half a period of a cosine."""
    ema_decay: float = 0.999
    """Decay per step of the exponential moving average of the weights; it warms up as min(decay, (1 + t) / (10 + t))."""
    sigma_draw: SigmaDraw = "lognormal"
    """How ln sigma is drawn inside a stage: by N(p_mean, p_std^2) truncated to it; uniformly, an open end being that of sampling;
    or by the density of sigma_weights."""
    p_mean: float = -1.2
    """Mean of ln sigma before truncation to the stage, for lognormal."""
    p_std: float = 1.2
    """Standard deviation of ln sigma before truncation to the stage, for lognormal."""
    sigma_weights: tuple[tuple[float, float], ...] = ()
    """For weights: pairs [ln sigma, weight] with straight lines between them and nothing outside; no need to normalise."""

    def planned_steps(self, expected_size: int) -> int:
        """The phase's length in steps, from `steps` or from `epochs` of `expected_size` images."""
        return self.steps if self.steps is not None else round((self.epochs or 0.0) * expected_size / self.batch_size)

    def _check(self, section: str) -> None:
        require(self.batch_size >= 1, f"{section}.batch_size", "an integer >= 1", self.batch_size)
        require(self.noise_multiplicity >= 1, f"{section}.noise_multiplicity", "an integer >= 1", self.noise_multiplicity)
        require(not self.antithetic or self.noise_multiplicity % 2 == 0, f"{section}.antithetic",
                f"false, since {section}.noise_multiplicity = {self.noise_multiplicity} makes no pairs", self.antithetic)
        require((self.steps is None) != (self.epochs is None), f"{section}.steps", f"either this or {section}.epochs to be set", self.steps)
        require(self.steps is None or self.steps >= 0, f"{section}.steps", "an integer >= 0", self.steps)
        require(self.epochs is None or 0 <= self.epochs < inf, f"{section}.epochs", "a finite number >= 0", self.epochs)
        require(0 < self.learning_rate < inf, f"{section}.learning_rate", "a finite number > 0", self.learning_rate)
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{section}.{name}", "a number in [0, 1)", getattr(self, name))
        require(0 <= self.warmup and 0 <= self.decay and self.warmup + self.decay <= 1, f"{section}.warmup",
                f"warmup and decay >= 0 that sum to at most 1 (decay is {self.decay})", self.warmup)
        require(0 <= self.ema_decay < 1, f"{section}.ema_decay", "a number in [0, 1)", self.ema_decay)
        require(-inf < self.p_mean < inf, f"{section}.p_mean", "a finite number", self.p_mean)
        require(0 < self.p_std < inf, f"{section}.p_std", "a finite number > 0", self.p_std)
        if self.sigma_draw == "weights" or self.sigma_weights:
            require_density(f"{section}.sigma_weights", self.sigma_weights)


@dataclass(frozen=True)
class SyntheticConfig(PhaseConfig):
    """The synthetic phase: ordinary training on programmatic images, at no privacy cost."""

    family: str = "dead_leaves"
    """A family of programmatic images, see python -m synthetic_generators; or one of your own, path/to/file.py:name."""
    options: dict[str, float | int | str | bool] = field(default_factory=dict)
    """The family's own settings; those of a mixture's families by family, {dead_leaves: {weight: 2}} or {dead_leaves.weight: 2}."""
    distinct: int | None = None
    """How many different images it learns from, again and again with other noise; made once and kept in memory. null: never the same twice."""
    cache: str | None = None
    """A directory in which runs share what this phase taught: a run with the same synthetic phase begins where the first one's ended."""

    def __post_init__(self) -> None:
        self._check("synthetic")
        require(self.distinct is None or self.distinct >= 1, "synthetic.distinct", "an integer >= 1 or null", self.distinct)


@dataclass(frozen=True)
class CentralConfig(PhaseConfig):
    """The central phase, off by default: ordinary training of the private stages on the DP class means or prototypes, which are paid for as hints.

    It comes between their release and the private phase, at no further privacy cost (Gong et al., arXiv 2504.01395). Means are blurred: they
    teach nothing at small sigma.
    """

    steps: int | None = 0
    """Steps of this phase; 0 leaves it out."""
    epochs: float | None = None
    """Or its length in epochs of data.expected_size images."""
    p_mean: float = 1.0
    """Mean of ln sigma before truncation to the stage, for lognormal."""
    p_std: float = 1.0
    """Standard deviation of ln sigma before truncation to the stage, for lognormal."""
    deformation: float = 0.5
    """How far each copy of a prototype is bent, sheared, moved and thickened, in [0, 2]; at 1 as far as the family variations deforms figures."""

    def __post_init__(self) -> None:
        require(0 <= self.deformation <= 2, "central.deformation", "a number in [0, 2]", self.deformation)
        self._check("central")


@dataclass(frozen=True)
class PrivateConfig(PhaseConfig):
    """The private phase: DP-SGD with noise multiplicity (ordinary training where the stages are nonprivate)."""

    batch_size: int = 4096
    """The expected size of a Poisson batch; q = batch_size / expected_size."""
    noise_multiplicity: int = 32
    """K, the draws of (sigma, noise) per image, averaged before clipping (Dockhorn et al., section 3.2)."""
    augment_flip: bool = False
    """Whether each of an image's K draws mirrors it left to right with probability 1/2; not for digits or text."""
    augment_shift: int = 0
    """Each of an image's K draws shifts it by up to so many pixels in each direction, repeating the border; samples are shifted as well."""
    augment_hints: bool = False
    """Whether a draw's hint is mirrored and shifted with its image, so that samples, whose hints are as they are, are not."""
    learning_rate: float = 3e-4
    """Adam's peak learning rate."""
    warmup: float = 0.0
    """The fraction of the steps over which the learning rate rises from zero."""
    noise_correction: bool = False
    """Adam's second moment without the known variance of the DP noise (DP-AdamBC; Tang et al., arXiv 2312.14334). Wants another learning rate."""
    noise_floor: float = 1.0
    """For noise_correction: what is left is raised to at least this many standard errors that its estimate has under noise alone."""
    ema_snapshots: int = 0
    """Snapshots of two moving averages of the weights that are kept, evenly spaced over the phase, so that python -m dpsyngen.averages can make
    averages of other lengths when training is over; 0: none. Each takes the room of two models."""

    def __post_init__(self) -> None:
        require(0 < self.noise_floor < inf, "private.noise_floor", "a finite number > 0", self.noise_floor)
        self._check("private")
        require(self.ema_snapshots >= 0, "private.ema_snapshots", "an integer >= 0", self.ema_snapshots)
        require(self.augment_shift >= 0, "private.augment_shift", "an integer >= 0", self.augment_shift)
