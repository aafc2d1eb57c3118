"""The configuration of a run: frozen dataclasses that check their own invariants.

A `RunConfig` says everything that decides a result. It is read from YAML by `dpsyngen.cli`, written into the run
directory, and handed down in parts; nothing else in the product reads files or flags to learn what to do.
Every check raises `InputError` with the dotted name of the field.
"""

from dataclasses import dataclass, field, replace
from math import inf
from typing import Literal

from dpsyngen.config.checks import require
from dpsyngen.config.data import AUTO_IN_MEMORY_BYTES, SOURCES_ON_DISK, SOURCES_WITH_PATH, DataConfig
from dpsyngen.config.phases import CentralConfig, PhaseConfig, PrivateConfig, SigmaDraw, SyntheticConfig
from dpsyngen.config.stages import Source, StageConfig, StagesConfig, Variant

__all__ = [
    "AUTO_IN_MEMORY_BYTES", "SOURCES_ON_DISK", "SOURCES_WITH_PATH", "CentralConfig", "ComputeConfig", "DataConfig", "EvaluationConfig",
    "HintsConfig", "NetworkConfig", "PhaseConfig", "PrivacyConfig", "PrivateConfig", "RunConfig", "SamplingConfig", "SigmaDraw", "Source",
    "StageConfig", "StagesConfig", "SyntheticConfig", "Tracker", "TrackingConfig", "Variant",
]  # fmt: skip

Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]


@dataclass(frozen=True)
class NetworkConfig:
    """The denoiser's network and its preconditioning."""

    backbone: Literal["lean", "unet"] = "lean"
    """lean: made for small machines; unet: diffusers' UNet2DModel in the size that DPDM uses."""
    width: int = 64
    """Channels of the first level; the second has twice as many."""
    depth: int = 1
    """Residual blocks per level, on the way down and on the way up."""
    parameterisation: Literal["edm", "v"] = "edm"
    """EDM's preconditioning (Karras et al., Table 1), or v-prediction (Salimans and Ho), which DPDM uses at small epsilon."""
    sigma_data: float = 0.5
    """The standard deviation that the EDM preconditioning assumes of the images (around their hint, where there is one)."""
    label_dropout: float = 0.1
    """Probability that training hides the label, for classifier-free guidance."""

    def __post_init__(self) -> None:
        require(self.width >= 8 and self.width % 8 == 0, "network.width", "a multiple of 8, at least 8", self.width)
        require(self.depth >= 1, "network.depth", "an integer >= 1", self.depth)
        require(self.sigma_data > 0, "network.sigma_data", "a number > 0", self.sigma_data)
        require(0 <= self.label_dropout < 1, "network.label_dropout", "a number in [0, 1)", self.label_dropout)


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


@dataclass(frozen=True)
class PrivacyConfig:
    """The guarantee. The unit is one image; neighbouring datasets differ by adding or removing one."""

    epsilon: float = 10.0
    """The target: the noise is calibrated so that all mechanisms together cost at most this."""
    delta: float = 1e-5
    """The delta of (epsilon, delta)-DP; keep it below 1 / expected_size."""
    clipping_norm: float = 1.0
    """C, the largest L2 norm of one image's contribution to the gradient."""
    clipping: Literal["norm", "automatic"] = "norm"
    """norm: gradients longer than C are shortened to C; automatic: each is brought near C, g C / (||g|| + clipping_stability)
    (AUTO-S; Bu et al., arXiv 2206.07136), so that C needs no tuning. The same guarantee."""
    clipping_stability: float = 0.01
    """Public constant gamma of automatic clipping: gradients much shorter than this stay short."""
    secure_noise: bool = False
    """Batches, draws and noise from a cryptographic generator, exact sums, and noise rounded exactly to a grid: holds against attacks on
    the low bits of floating-point noise. Costs some speed, nothing in accuracy."""
    unsafe_fixed_key: str | None = None
    """64 hex digits in place of the random key, for tests alone: with it nothing is guaranteed, and the report says so."""

    def __post_init__(self) -> None:
        require(1e-3 <= self.epsilon <= 100, "privacy.epsilon", "a number in [0.001, 100]", self.epsilon)
        require(0 < self.delta < 1, "privacy.delta", "a number in (0, 1)", self.delta)
        require(1e-6 <= self.clipping_norm <= 1e6, "privacy.clipping_norm", "a number in [1e-6, 1e6]", self.clipping_norm)
        require(1e-6 <= self.clipping_stability <= 1e6, "privacy.clipping_stability", "a number in [1e-6, 1e6]", self.clipping_stability)
        key = self.unsafe_fixed_key
        valid = key is None or (len(key) == 64 and all(c in "0123456789abcdef" for c in key))
        require(valid, "privacy.unsafe_fixed_key", "64 hexadecimal digits or null", "something else")


@dataclass(frozen=True)
class ComputeConfig:
    """Performance knobs; none of them touches the guarantee."""

    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Arithmetic of the network; clipping, sums, noise and weights are float32 in any case. auto takes accelerate's mixed precision,
    float32 without it, and a run keeps what it began with."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    chunk_size: int = 64
    """Images of a logical batch that are drawn from one substream; part of the result's identity."""
    chunks_at_once: int = 1
    """Chunks that a process computes together: more memory, better use of a large device. Changes nothing but rounding."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    checkpoints_kept: int = 2
    """How many of the newest checkpoints stay on disk."""

    def __post_init__(self) -> None:
        require(self.chunk_size >= 1, "compute.chunk_size", "an integer >= 1", self.chunk_size)
        require(self.chunks_at_once >= 1, "compute.chunks_at_once", "an integer >= 1", self.chunks_at_once)
        require(self.checkpoint_every >= 1, "compute.checkpoint_every", "an integer >= 1", self.checkpoint_every)
        require(self.checkpoints_kept >= 1, "compute.checkpoints_kept", "an integer >= 1", self.checkpoints_kept)
        known = self.device in ("auto", "cpu", "cuda", "mps") or self.device.removeprefix("cuda:").isdigit()
        require(known, "compute.device", "auto, cpu, cuda, cuda:N or mps", self.device)


@dataclass(frozen=True)
class SamplingConfig:
    """How the synthetic dataset is drawn from the trained denoiser; touches no private data."""

    sampler: Literal["ddim", "heun"] = "heun"
    """DDIM (Song et al.), or EDM's second-order Heun sampler with churn (Karras et al., Algorithm 2)."""
    steps: int = 18
    """Noise levels; heun evaluates the denoiser twice a step."""
    sigma_min: float = 0.002
    """The smallest noise level."""
    sigma_max: float = 80.0
    """The noise level that sampling starts from."""
    rho: float = 7.0
    """The curvature of the grid of noise levels (Karras et al., equation 5)."""
    s_churn: float = 0.0
    """Karras et al., Algorithm 2: how much fresh noise is mixed in over the whole trajectory; 0 is deterministic."""
    s_min: float = 0.0
    """Churn only at noise levels from this"""
    s_max: float = inf
    """to this."""
    s_noise: float = 1.0
    """Standard deviation of the churn's noise."""
    guidance: float = 1.0
    """Scale of classifier-free guidance: 1 is plain conditional sampling, 0 unconditional."""
    num_images: int = 10000
    """How many images; their labels are balanced and cycle through the classes."""
    batch_size: int = 500
    """Images computed together; changes nothing but rounding."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "sampling.steps", "an integer >= 1", self.steps)
        require(0 < self.sigma_min < self.sigma_max, "sampling.sigma_min", f"a number in (0, sampling.sigma_max = {self.sigma_max})", self.sigma_min)
        require(self.rho > 0, "sampling.rho", "a number > 0", self.rho)
        require(self.s_churn >= 0, "sampling.s_churn", "a number >= 0", self.s_churn)
        require(self.s_churn == 0 or self.sampler == "heun", "sampling.s_churn", "0, since only the heun sampler churns", self.s_churn)
        require(0 <= self.s_min <= self.s_max, "sampling.s_min", "a number in [0, sampling.s_max]", self.s_min)
        require(self.s_noise > 0, "sampling.s_noise", "a number > 0", self.s_noise)
        require(self.guidance >= 0, "sampling.guidance", "a number >= 0", self.guidance)
        require(self.num_images >= 1, "sampling.num_images", "an integer >= 1", self.num_images)
        require(self.batch_size >= 1, "sampling.batch_size", "an integer >= 1", self.batch_size)


@dataclass(frozen=True)
class EvaluationConfig:
    """What the synthetic dataset is measured with. Metrics against private images are not private themselves."""

    classifiers: tuple[Literal["logistic_regression", "mlp", "cnn"], ...] = ("logistic_regression", "mlp", "cnn")
    """Trained on synthetic images only, tested on real ones (CAS)."""
    classifier_seeds: int = 3
    """Classifiers trained per kind; the mean and the deviation over them are reported."""
    classifier_epochs: int = 30
    """The most epochs that a classifier trains; held-out synthetic images choose among them."""
    features: Literal["auto", "inception", "classifier", "none"] = "auto"
    """What FID compares: Inception's features by clean-fid, or those of a small classifier trained on the real training
    images; auto takes Inception's where its weights can be had; none leaves FID out."""
    fid_images: int = 10000
    """At most this many real and synthetic images enter FID."""
    reference: Literal["test", "held_out"] = "test"
    """The real images for CAS and FID: the test images, or the training images of data.held_out."""

    def __post_init__(self) -> None:
        require(self.classifier_seeds >= 1, "evaluation.classifier_seeds", "an integer >= 1", self.classifier_seeds)
        require(self.classifier_epochs >= 1, "evaluation.classifier_epochs", "an integer >= 1", self.classifier_epochs)
        require(self.fid_images >= 2, "evaluation.fid_images", "an integer >= 2", self.fid_images)
        require(len(set(self.classifiers)) == len(self.classifiers), "evaluation.classifiers", "no name twice", self.classifiers)


@dataclass(frozen=True)
class TrackingConfig:
    """What is written while training."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    grid_every: int = 0
    """Steps between the grids of images in previews/; with 0 there is one at the end of each phase."""
    trackers: tuple[Tracker, ...] = ()
    """Where the lines of metrics.jsonl are sent as well; those of the private phase when it has ended, or each point's time would tell
    how many images its steps drew."""
    project: str = "dpsyngen"
    """The project or experiment under which trackers file the run."""
    log_private_diagnostics_without_dp: bool = False
    """Log the private loss, gradient norms, the clipped fraction and drawn batch sizes, and let trackers follow the private phase live.
    They are NOT private."""

    def __post_init__(self) -> None:
        require(self.log_every >= 1, "tracking.log_every", "an integer >= 1", self.log_every)
        require(self.grid_every >= 0, "tracking.grid_every", "an integer >= 0", self.grid_every)
        require(len(set(self.trackers)) == len(self.trackers), "tracking.trackers", "no name twice", self.trackers)
        require(bool(self.project), "tracking.project", "a name", self.project)

    def grid_is_due(self, step: int, last: int) -> bool:
        """Whether a grid of images is drawn after `step` steps of a phase that has `last`."""
        return step == last or (self.grid_every > 0 and step % self.grid_every == 0)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result."""

    name: str = "run"
    """The run's directory is runs/NAME unless --run says otherwise."""
    seed: int = 0
    """The public seed: initialisation, programmatic images, generation. Private randomness never comes from it."""
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    hints: HintsConfig = field(default_factory=HintsConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    central: CentralConfig = field(default_factory=CentralConfig)
    private: PrivateConfig = field(default_factory=PrivateConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "an integer >= 0", self.seed)
        has_covariance = self.hints.kind == "class_means" and self.hints.covariance_rank > 0
        require(has_covariance or not self.stages.closed_form, "stages.closed_form",
                "false without DP class means and hints.covariance_rank > 0", self.stages.closed_form)
        self._check_resolutions()
        require(bool(self.name) and not any(c in self.name for c in "/\\\0") and self.name not in (".", ".."),
                 "name", "a plain directory name", self.name)
        size = self.data.expected_size
        if size is not None:
            require(self.private.batch_size <= size, "private.batch_size",
                     f"at most data.expected_size = {size}, since q = batch_size / expected_size can't exceed 1", self.private.batch_size)
        most = self.data.image_size // 2
        require(self.private.augment_shift <= most, "private.augment_shift", f"at most {most}, half of data.image_size", self.private.augment_shift)
        require(not self.private.augment_hints or self.hints.kind != "none", "private.augment_hints", "false, since hints.kind is none",
                self.private.augment_hints)
        self._check_central()
        require(self.sampling.guidance == 1 or self.data.num_classes > 0, "sampling.guidance",
                 "1, since data.num_classes is 0, so there is no class to guide to", self.sampling.guidance)
        require(self.sampling.guidance == 1 or self.network.label_dropout > 0, "sampling.guidance",
                 "1, since network.label_dropout is 0, so the network never learns to do without labels", self.sampling.guidance)
        if self.evaluation.reference == "held_out":
            require(self.data.held_out > 0, "data.held_out", "an integer > 0, since evaluation.reference is held_out", self.data.held_out)

    def _check_resolutions(self) -> None:
        size = self.data.image_size
        for stage in self.stages.custom:
            name = f"stages.custom: stage {stage.name}: downsampling"
            require(size % stage.downsampling == 0 and size // stage.downsampling >= 4, name,
                    f"a divisor of data.image_size = {size} that leaves at least 4 pixels", stage.downsampling)
            require(stage.downsampling == 1 or not self.stages.closed_form, name, "1, since stages.closed_form is at full resolution",
                    stage.downsampling)

    @property
    def without_secrets(self) -> "RunConfig":
        """The config without places of this machine and without a key, as it may leave. A path that its source needs becomes a word."""
        path = "not-released" if self.data.source in SOURCES_WITH_PATH else None
        return replace(
            self,
            data=replace(self.data, path=path, test_path=None, index=None),
            privacy=replace(self.privacy, unsafe_fixed_key=None),
            synthetic=replace(
                self.synthetic, cache=None, family=_without_folder(self.synthetic.family), options=_without_folders(self.synthetic.options),
            ),
            stages=replace(self.stages, custom=tuple(
                replace(stage, family=stage.family and _without_folder(stage.family), options=_without_folders(stage.options))
                for stage in self.stages.custom
            )),
        )  # fmt: skip

    @property
    def is_private(self) -> bool:
        """Whether nothing touches the private images but what is paid for."""
        return not self._has_stages_of("nonprivate")

    @property
    def uses_synthetic(self) -> bool:
        """Whether there is a synthetic phase."""
        return self._has_stages_of("synthetic")

    @property
    def uses_central(self) -> bool:
        """Whether there is a central phase."""
        return bool(self.central.steps or self.central.epochs)

    def private_steps(self, expected_size: int) -> int:
        """The private phase's length in steps: none without a stage that private images teach."""
        return self.private.planned_steps(expected_size) if self._learns_private_images else 0

    @property
    def _learns_private_images(self) -> bool:
        return self._has_stages_of("private") or self._has_stages_of("nonprivate")

    def _check_central(self) -> None:
        if self.uses_central:
            length = "steps" if self.central.steps else "epochs"
            given = getattr(self.central, length)
            require(self.hints.kind != "none", f"central.{length}", "0, since hints.kind is none, so there are no class means to learn from", given)
            require(self._learns_private_images, f"central.{length}", "0, since no stage learns from private images", given)

    def _has_stages_of(self, source: Source) -> bool:
        return any(source in stage.sources for stage in self.stages.stages)


def _without_folder(text: str) -> str:
    """A family of one's own, FOLDER/FILE.py:NAME, as FILE.py:NAME; anything else as it is."""
    file, colon, name = text.rpartition(":")
    return text if not file.endswith(".py") else file.rpartition("/")[2] + colon + name


def _without_folders(options: dict[str, float | int | str | bool]) -> dict[str, float | int | str | bool]:
    """A generator's options, of which some may name families."""
    return {_without_folder(name): _without_folder(value) if isinstance(value, str) else value for name, value in options.items()}
