"""What comes out of a run: samples, their evaluation, and what is written on the way."""

from dataclasses import dataclass
from math import inf
from typing import Literal

from dpsyngen.config.checks import require

Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]


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
    attempts: int = 4
    """Where there is a teacher: how often an image is drawn, at most, until the teacher takes it for its class; after that it gets the label that
    the teacher gives it."""
    teacher_guidance: float = 0.0
    """Where there is a teacher: the scale of guidance by it, towards images that show their class more clearly; 0 for none. What the last attempt
    gave is drawn once more, guided, from the same noise."""
    teacher_temperature: float = 2.0
    """What the teacher's logits are divided by when it guides: the larger it is, the further it goes on where it is sure already."""
    teacher_range: tuple[float, float] = (-3.0, 0.5)
    """The range of ln sigma in which it guides."""
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
        require(self.attempts >= 1, "sampling.attempts", "an integer >= 1", self.attempts)
        require(0 <= self.teacher_guidance < inf, "sampling.teacher_guidance", "a number >= 0", self.teacher_guidance)
        require(0 < self.teacher_temperature < inf, "sampling.teacher_temperature", "a number > 0", self.teacher_temperature)
        low, high = self.teacher_range
        require(low < high, "sampling.teacher_range", "two numbers, the first below the second", self.teacher_range)
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
