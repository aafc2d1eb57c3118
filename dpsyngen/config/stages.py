"""The stages: how the range of ln sigma is divided between programmatic and private images."""

import re
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from dpsyngen.config.checks import require, require_density
from dpsyngen.config.phases import SigmaDraw
from dpsyngen.errors import InputError

Variant = Literal["dpdm", "coarse", "cleaning", "coarse_cleaning", "finetune", "finetune_all", "finetune_context", "nonprivate", "custom"]
Source = Literal["synthetic", "private", "nonprivate"]


@dataclass(frozen=True)
class StageConfig:
    """A range of ln sigma, the images that teach it, and how; see docs/method.md."""

    name: str
    """Its name, of letters, digits, dashes and underscores."""
    source: Source
    """Programmatic images; private ones by DP-SGD; or private ones without any protection."""
    lower: float | None = None
    """Where the range of ln sigma begins; null is open."""
    upper: float | None = None
    """Where it ends; null is open."""
    weight: float = 1.0
    """Its share of the draws of its phase, relative to the other stages of that phase."""
    family: str | None = None
    """For synthetic or pretrained: a generator's name; null takes synthetic.family with synthetic.options."""
    options: dict[str, float | int | str | bool] = field(default_factory=dict)
    """The settings of `family`."""
    sigma_draw: SigmaDraw | None = None
    """As in the phase, whose setting null takes; the same for"""
    p_mean: float | None = None
    """this,"""
    p_std: float | None = None
    """this"""
    sigma_weights: tuple[tuple[float, float], ...] | None = None
    """and this."""
    replay: float = 1.0
    """For synthetic: a factor of its part of the gradient that stages.replay adds to private steps; with 0 it isn't replayed."""
    pretrained: bool = False
    """For private images with the routed holder: programmatic ones teach its network the same range before, in the synthetic phase, with its
    weight there."""
    downsampling: int = 1
    """Its network works on means over blocks of so many pixels squared, 2 for half the resolution. Needs the routed holder."""
    detail_std: float = 0.25
    """With downsampling: the standard deviation that is assumed of what differs within a block beyond the hint; a public constant."""

    def __post_init__(self) -> None:
        self._require(re.fullmatch(r"[A-Za-z0-9_-]{1,40}", self.name) is not None, "name", "1 to 40 letters, digits, dashes, underscores", self.name)
        low, high = self.range
        for name in ("lower", "upper"):
            self._require(abs(getattr(self, name) or 0.0) < inf, name, "a finite number, or null for an open end", getattr(self, name))
        self._require(low < high, "lower", f"a number below upper = {self.upper}", self.lower)
        self._require(0 < self.weight < inf, "weight", "a finite number > 0", self.weight)
        self._require(0 <= self.replay < inf, "replay", "a finite number >= 0", self.replay)
        self._require(self.downsampling >= 1, "downsampling", "an integer >= 1", self.downsampling)
        self._require(0 <= self.detail_std < inf, "detail_std", "a finite number >= 0", self.detail_std)
        if self.source == "synthetic":
            self._require(not self.pretrained, "pretrained", "false, since its source is synthetic", self.pretrained)
        elif not self.pretrained:
            self._require(self.family is None, "family", f"null, since its source is {self.source}", self.family)
        self._require(not self.options or self.family is not None, "options", "family beside them", self.options)
        if self.sigma_draw not in (None, "lognormal"):
            for name in ("p_mean", "p_std"):
                self._require(getattr(self, name) is None, name, f"null, since sigma_draw is {self.sigma_draw}", getattr(self, name))
        self._require(abs(self.p_mean or 0.0) < inf, "p_mean", "a finite number", self.p_mean)
        self._require(self.p_std is None or 0 < self.p_std < inf, "p_std", "a finite number > 0", self.p_std)
        if self.sigma_weights is not None:
            self._require(self.sigma_draw == "weights", "sigma_weights", "sigma_draw weights beside them", self.sigma_draw)
            require_density(f"stages.custom: stage {self.name}: sigma_weights", self.sigma_weights)

    @property
    def range(self) -> tuple[float, float]:
        """The bounds of ln sigma, infinite where open."""
        return -inf if self.lower is None else self.lower, inf if self.upper is None else self.upper

    @property
    def sources(self) -> tuple[Source, ...]:
        """The images that teach it, in their order."""
        return ("synthetic", self.source) if self.pretrained else (self.source,)

    def _require(self, condition: bool, name: str, expected: str, value: object) -> None:
        require(condition, f"stages.custom: stage {self.name}: {name}", expected, value)


@dataclass(frozen=True)
class StagesConfig:
    """How the range of ln sigma is divided between programmatic and private images."""

    variant: Variant = "finetune_all"
    """Which stages programmatic images teach; see docs/method.md. custom takes those of the field custom."""
    tau1: float = -3.0
    """Threshold on ln sigma between the cleaning and the context stage of the other variants."""
    tau2: float = 2.0
    """Threshold on ln sigma between the context and the coarse stage of the other variants."""
    holder: Literal["shared", "routed"] = "shared"
    """One network for all stages, or one network per stage switched by sigma while sampling."""
    custom: tuple[StageConfig, ...] = ()
    """Stages of your own, [{name: fine, source: synthetic, upper: -2, family: dead_leaves}, {name: rest, source: private, lower: -2}], with
    bounds on ln sigma that are open where left out; further entries: weight, options, replay, sigma_draw, p_mean, p_std, sigma_weights,
    pretrained, downsampling, detail_std."""
    closed_form: bool = False
    """Draw the coarse stage, ln sigma above tau2, by the closed form for Gaussians around the hints, whose covariance the
    hints must have, instead of by the network."""
    replay: float = 0.0
    """Weight of the gradient on programmatic images that each private step adds, after clipping and noise, so that what they taught stays;
    at 1 it is clipped to the norm that a private image has at most. It costs no privacy. Needs the shared holder."""
    replay_batch_size: int | None = 128
    """Programmatic images that a private step replays; null takes as many as a synthetic step."""

    def __post_init__(self) -> None:
        require(-inf < self.tau1 < self.tau2, "stages.tau1", f"a finite number below stages.tau2 = {self.tau2}", self.tau1)
        require(self.tau2 < inf, "stages.tau2", "a finite number", self.tau2)
        self._check_custom()
        if self.holder == "routed":
            refines = self.variant.startswith("finetune")
            require(not refines, "stages.holder", f"shared, since stages.variant {self.variant} refines one network", self.holder)
            _expect_tiling(self.custom)
        for stage in self.custom if self.holder == "shared" else ():
            where = f"stages.custom: stage {stage.name}"
            require(stage.downsampling == 1, f"{where}: downsampling", "1, since stages.holder is shared: all stages have one network",
                    stage.downsampling)
            require(not stage.pretrained, f"{where}: pretrained", "false, since stages.holder is shared: a synthetic stage beside it does that",
                    stage.pretrained)
        require(0 <= self.replay < inf, "stages.replay", "a finite number >= 0", self.replay)
        require(self.replay_batch_size is None or self.replay_batch_size >= 1, "stages.replay_batch_size", "an integer >= 1 or null",
                self.replay_batch_size)
        if self.replay > 0:
            require(self.holder == "shared", "stages.replay", "0, since with stages.holder routed private steps leave the synthetic stages alone",
                    self.replay)

    @property
    def replays(self) -> bool:
        """Whether private steps replay something: there may be no synthetic stage."""
        return self.replay > 0 and any(stage.source == "synthetic" and stage.replay > 0 for stage in self.stages)

    def _check_custom(self) -> None:
        if self.variant != "custom":
            require(not self.custom, "stages.custom", f"no stages, since stages.variant is {self.variant}", [stage.name for stage in self.custom])
            return
        names = [stage.name for stage in self.custom]
        require(bool(names), "stages.custom", "at least one stage, since stages.variant is custom", [])
        require(len(set(names)) == len(names), "stages.custom", "each name once", names)
        sources = {stage.source for stage in self.custom}
        require(not sources >= {"private", "nonprivate"}, "stages.custom", "private or nonprivate stages, not both", sorted(sources))

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """The stages of the variant (Choi et al., arXiv 2412.09842, section 4: cleaning | tau1 | context | tau2 | coarse), or the custom ones.

        Neighbouring stages with the same source are one. The `finetune` variants refine with private images what programmatic images
        taught, so their ranges overlap; all other variants tile the line of ln sigma, and custom ones do where they are routed.
        """
        low, high = self.tau1, self.tau2
        cleaning, coarse = StageConfig("cleaning", "synthetic", None, low), StageConfig("coarse", "synthetic", high, None)
        context = StageConfig("context", "private", low, high)
        pretraining, everything = StageConfig("pretraining", "synthetic"), StageConfig("all", "private")
        return {
            "dpdm": (everything,),
            "nonprivate": (StageConfig("all", "nonprivate"),),
            "coarse": (coarse, StageConfig("context", "private", None, high)),
            "cleaning": (cleaning, StageConfig("context", "private", low, None)),
            "coarse_cleaning": (cleaning, coarse, context),
            "finetune": (coarse, everything),
            "finetune_all": (pretraining, everything),
            "finetune_context": (pretraining, context),
            "custom": self.custom,
        }[self.variant]


def _expect_tiling(stages: tuple[StageConfig, ...]) -> None:
    """Raise InputError, telling where, if there are stages and they leave a gap or overlap."""
    reached = -inf
    for stage in sorted(stages, key=lambda stage: stage.range):
        low, high = stage.range
        if low != reached:
            wrong = f"a gap from {reached:g} to {low:g}" if low > reached else f"an overlap from {low:g} to {min(reached, high):g}"
            raise InputError(f"stages.custom: expected stages without gap or overlap, since stages.holder is routed, got {wrong}, at {stage.name}")
        reached = high
    if stages and reached < inf:
        raise InputError(f"stages.custom: expected stages without gap or overlap, since stages.holder is routed, got a gap from {reached:g} on")
