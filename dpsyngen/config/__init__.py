"""The configuration of a run: frozen dataclasses that check their own invariants.

A `RunConfig` says everything that decides a result. It is read from YAML by `dpsyngen.cli`, written into the run
directory, and handed down in parts; nothing else in the product reads files or flags to learn what to do.
Every check raises `InputError` with the dotted name of the field.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from dpsyngen.config.checks import require
from dpsyngen.config.data import AUTO_IN_MEMORY_BYTES, SOURCES_ON_DISK, SOURCES_WITH_PATH, DataConfig
from dpsyngen.config.hints import HintsConfig
from dpsyngen.config.outcome import EvaluationConfig, SamplingConfig, Tracker, TrackingConfig
from dpsyngen.config.phases import CentralConfig, PhaseConfig, PrivateConfig, SigmaDraw, SyntheticConfig
from dpsyngen.config.stages import Source, StageConfig, StagesConfig, Variant
from dpsyngen.config.teacher import TeacherConfig

__all__ = [
    "AUTO_IN_MEMORY_BYTES", "SOURCES_ON_DISK", "SOURCES_WITH_PATH", "CentralConfig", "ComputeConfig", "DataConfig", "EvaluationConfig",
    "HintsConfig", "NetworkConfig", "PhaseConfig", "PrivacyConfig", "PrivateConfig", "RunConfig", "SamplingConfig", "SigmaDraw", "Source",
    "StageConfig", "StagesConfig", "SyntheticConfig", "TeacherConfig", "Tracker", "TrackingConfig", "Variant",
]  # fmt: skip


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
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
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
        self._check_teacher()
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

    def _check_teacher(self) -> None:
        share, hints = self.teacher.share, self.hints
        if not self.teacher.used:
            return
        require(hints.kind != "none", "teacher.share", "0, since hints.kind is none, and the teacher is released together with them", share)
        require(self.data.num_classes >= 2, "teacher.share", f"0, since data.num_classes is {self.data.num_classes}", share)
        left = 1 - hints.share - (hints.covariance_share if hints.covariance_rank else 0)
        require(share < left, "teacher.share", f"a number that leaves something beside the hints' shares, below {left:g}", share)

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
