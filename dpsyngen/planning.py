"""train.py --dry-run: what a config would do and cost, worked out without touching private data."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig
from dpsyngen.denoiser import Denoiser, RoutedDenoiser, build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.loss import denoising_loss, draw
from dpsyngen.networks.safety import refuse_mixing
from dpsyngen.noise_levels import Stage, central_stages, stages
from dpsyngen.ordinary_step import synthetic_batches
from dpsyngen.phases import expert, replay_batch_size
from dpsyngen.privacy.per_example import recording
from dpsyngen.privacy.plan import PrivacyPlan

# A step's noise has norm (noise multiplier) C sqrt(P) / batch, its signal at most C, and T steps average the noise down by sqrt(T).
# Beyond this ratio of the two so little signal is left that training can't be expected to work.
_HOPELESS_NOISE_PER_UNIT = 0.5


@dataclass(frozen=True)
class RunPlan:
    """What `plan_run` found. Times are seconds on this machine, memory is bytes."""

    privacy: PrivacyPlan | None
    epsilon: float | None
    stages: tuple[Stage, ...]
    synthetic_steps: int
    central_steps: int
    private_steps: int
    parameters: int
    memory: int
    seconds: float
    warnings: tuple[str, ...]


def plan_run(config: RunConfig) -> RunPlan:
    """Calibrate, count and time on random images. InputError if data.expected_size isn't declared: counting would touch the data."""
    size = config.data.expected_size
    if size is None:
        raise InputError("data.expected_size: expected a number for --dry-run, since null counts the private images")
    privacy = PrivacyPlan.calibrate(config, size) if config.is_private else None
    denoiser = build_denoiser(config)
    refuse_mixing(denoiser, config.data.image_shape)
    all_stages = stages(config)
    for stage in all_stages:
        if stage.source == "synthetic":
            synthetic_batches(config, stage)  # knows whether the family and its options exist
    if config.uses_central:
        central_stages(config)  # knows whether sigma can be drawn
    synthetic = config.synthetic.planned_steps(size) if config.uses_synthetic else 0
    central, private = config.central.planned_steps(size), config.private_steps(size)
    public = tuple(stage for stage in all_stages if stage.source == "synthetic")
    taught = tuple(stage for stage in all_stages if stage.source != "synthetic")
    per_public_row = _seconds_per_row(config, denoiser, public, per_example=False) if public else 0.0
    seconds = synthetic * config.synthetic.batch_size * config.synthetic.noise_multiplicity * per_public_row
    if central:
        per_central_row = _seconds_per_row(config, denoiser, taught, per_example=False)
        seconds += central * config.central.batch_size * config.central.noise_multiplicity * per_central_row
    if private:
        per_private_row = _seconds_per_row(config, denoiser, taught, per_example=privacy is not None)
        seconds += private * config.private.batch_size * config.private.noise_multiplicity * per_private_row
    if config.stages.replays:
        seconds += private * replay_batch_size(config) * config.synthetic.noise_multiplicity * per_public_row
    network = expert(denoiser, all_stages[-1].name)
    return RunPlan(
        privacy=privacy,
        epsilon=privacy.epsilon_after(private) if privacy else None,
        stages=all_stages,
        synthetic_steps=synthetic,
        central_steps=central,
        private_steps=private,
        parameters=sum(p.numel() for p in denoiser.parameters()),
        memory=_memory(config, denoiser, all_stages, size),
        seconds=seconds,
        warnings=tuple(_warnings(config, privacy, size, private, _dimension(denoiser, network, all_stages))),
    )


def _dimension(denoiser: Denoiser | RoutedDenoiser, network: Denoiser, stages: tuple[Stage, ...]) -> float:
    """Parameters that a private step trains, over the share of the private steps that they get: several networks take turns."""
    weights = [stage.weight for stage in stages if stage.source == "private"] if isinstance(denoiser, RoutedDenoiser) else []
    return sum(p.numel() for p in network.parameters()) * (sum(weights) / min(weights) if weights else 1.0)


def _warnings(config: RunConfig, plan: PrivacyPlan | None, size: int, private_steps: int, dimension: float) -> list[str]:
    found = []
    if config.privacy.delta >= 1 / size:
        found.append(f"privacy.delta = {config.privacy.delta:g} is not below 1/N = {1 / size:.2g}: publishing one random image would satisfy it")
    if private_steps == 0:
        found.append("no private steps: no gradient step sees a private image")
    if plan is None:
        found.append("nonprivate stages: the private images are trained on WITHOUT any protection")
    elif plan.steps > 0 and plan.noise_multiplier / plan.batch_size * dimension ** 0.5 > _HOPELESS_NOISE_PER_UNIT * plan.steps**0.5:
        found.append(
            f"N = {size} is too small for epsilon = {config.privacy.epsilon:g}: noise of {plan.noise_multiplier:.3g} times the clipping norm "
            f"on a batch of {plan.batch_size} drowns the gradient; take a larger private.batch_size, fewer steps or a smaller network"
        )
    if plan is not None and plan.class_means is not None:
        per_class = size / max(1, config.data.num_classes) / plan.class_means.prototypes
        if plan.class_means.noise_multiplier / plan.class_means.count_weight > per_class / 4:
            found.append(
                f"hints: with about {per_class:.0f} images per class{' and prototype' * (plan.class_means.prototypes > 1)} "
                "the DP class means are mostly noise; raise hints.share or set hints.kind to none"
            )
    return found


def _probe(config: RunConfig, images: int, copies: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(-1, 1, (images, *config.data.image_shape)).astype(np.float32))
    return x.repeat_interleave(copies, dim=0), torch.zeros(images * copies, dtype=torch.int64)


def _seconds_per_row(config: RunConfig, denoiser: Denoiser | RoutedDenoiser, stages: tuple[Stage, ...], *, per_example: bool) -> float:
    """What a row (image x draw) of training takes on this machine, on average over the stages by their weights.

    Networks of one resolution are alike, so that one of them is timed.
    """
    alike = {stage.downsampling: stage for stage in stages}
    seconds = {factor: _timed(config, expert(denoiser, stage.name), stage, per_example=per_example) for factor, stage in alike.items()}
    return sum(stage.weight * seconds[stage.downsampling] for stage in stages) / sum(stage.weight for stage in stages)


def _timed(config: RunConfig, network: Denoiser, stage: Stage, *, per_example: bool) -> float:
    """Seconds per row of one stage's training step on a few random images, the fastest of three."""
    phase, compute = (config.private if per_example else config.synthetic), Compute.start(config.compute)
    copies, images = phase.noise_multiplicity, max(2, min(config.compute.chunk_size, 64 // phase.noise_multiplicity))
    x, labels = _probe(config, images, copies)
    network = network.to(compute.device)
    draws = draw(
        np.random.default_rng(0), stage.sigma_draw, labels, network.network_shape, label_dropout=0.0, null_label=network.null_label,
    ).to(compute.device)  # fmt: skip
    x, fastest = x.to(compute.device), float("inf")
    for _ in range(3):
        began = time.perf_counter()
        if per_example:
            with recording(network, images, copies) as record:
                with compute.autocast():
                    losses = denoising_loss(network, x, draws).view(-1, copies).mean(dim=1)
                losses.sum().backward()
            record.clipped_sum(1.0)
        else:
            with compute.autocast():
                loss = denoising_loss(network, x, draws).mean()
            loss.backward()
        fastest = min(fastest, time.perf_counter() - began)
    network.zero_grad(set_to_none=True)
    return fastest / len(x)


def _memory(config: RunConfig, denoiser: Denoiser | RoutedDenoiser, stages: tuple[Stage, ...], size: int) -> int:
    """Images, weights with gradient, averages and Adam's moments, a chunk's activations and per-example gradients."""
    parameters = sum(p.numel() for p in denoiser.parameters())
    bytes_each = 2 if config.compute.precision == "bf16" else 4
    outputs = max(_outputs(config, expert(denoiser, stage.name)) for stage in stages)
    images = config.compute.chunk_size * config.compute.chunks_at_once
    rows = images * config.private.noise_multiplicity
    per_example = images * parameters if config.is_private else 0
    # autograd keeps about three tensors per layer's output: its input, and those of the pointwise operations around it
    held = size * np.prod(config.data.image_shape) if config.data.held_in_memory(size) else 0
    weights = 7 if config.private.ema_snapshots else 5
    seen = 4 * size * (config.teacher.components + 1) if config.teacher.used else 0
    return int(held + seen + weights * 4 * parameters + bytes_each * (3 * rows * outputs + per_example))


def _outputs(config: RunConfig, network: Denoiser) -> int:
    """How many numbers the layers of a network give out for one image."""
    outputs = 0

    def count(layer: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal outputs
        outputs += output.numel()

    network = network.cpu()
    handles = [layer.register_forward_hook(count) for layer in network.backbone.modules() if not list(layer.children())]
    x, labels = _probe(config, 1, 1)
    with torch.no_grad():
        network(x, torch.ones(1), labels)
    for handle in handles:
        handle.remove()
    return outputs


def print_plan(config: RunConfig) -> None:
    """Show the plan as a table on stdout, then its warnings."""
    plan = plan_run(config)
    if not Compute.start(config.compute).is_main:
        return
    table = Table(title=f"Plan of {config.name}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _rows(config, plan):
        table.add_row(name, value)
    console = Console(soft_wrap=True)
    console.print(table)
    for warning in plan.warnings:
        console.print(f"[bold yellow]warning:[/] {warning}", highlight=False)


def _rows(config: RunConfig, plan: RunPlan) -> list[tuple[str, str]]:
    shape = "x".join(map(str, config.data.image_shape))
    rows = [("private images", f"{config.data.expected_size:,} of {shape} from {config.data.source} (declared, not counted)")]
    rows += [(f"stage {stage.name}", _described(stage, plan.stages)) for stage in plan.stages]
    if plan.synthetic_steps:
        synthetic = config.synthetic
        rows.append(("synthetic phase", f"{plan.synthetic_steps:,} steps of {synthetic.batch_size} x {synthetic.noise_multiplicity} draws"))
    if plan.central_steps:
        central = config.central
        rows.append(("central phase", f"{plan.central_steps:,} steps of {central.batch_size} x {central.noise_multiplicity} draws"))
    if plan.private_steps:
        private = config.private
        rows.append(("private phase", f"{plan.private_steps:,} steps of {private.batch_size} x {private.noise_multiplicity} draws"))
    if plan.private_steps and config.stages.replays:
        rows.append(("replay", f"{replay_batch_size(config)} programmatic images a private step, weight {config.stages.replay:g}"))
    if plan.privacy is not None:
        privacy = plan.privacy
        rows.append(("privacy", f"epsilon = {plan.epsilon:.4g} (target {privacy.target_epsilon:g}) at delta = {privacy.delta:g}, per image"))
        if privacy.class_means is not None:
            means = privacy.class_means
            often = "once" if means.rounds == 1 else f"in each of {means.rounds} rounds, for {means.prototypes} prototypes per class"
            rows.append(("noise of the class means", f"{means.noise_multiplier:.4g} times the sensitivity, {often}"))
        if privacy.teacher is not None:
            teacher = privacy.teacher
            rows.append(("noise of the teacher", f"{teacher.noise_multiplier:.4g} times the sensitivity, in each of {teacher.steps} steps"))
        if privacy.steps:
            automatic = " (automatic clipping)" if privacy.clipping == "automatic" else ""
            noise = f"{privacy.noise_multiplier:.4g} x C = {privacy.clipping_norm:g}{automatic}, q = {privacy.sampling_rate:.4g}"
            rows.append(("noise of DP-SGD", noise))
    rows.append(("parameters", f"{plan.parameters:,}"))
    rows.append(("memory", f"about {plan.memory / 2**30:.2g} GiB"))
    rows.append(("training time here", _duration(plan.seconds)))
    return rows


def _described(stage: Stage, stages: tuple[Stage, ...]) -> str:
    """A stage's range, images, draw of sigma, and share of its phase's draws."""
    together = [other for other in stages if (other.source == "synthetic") == (stage.source == "synthetic")]
    share = f", {stage.weight / sum(other.weight for other in together):.3g} of its phase" if len(together) > 1 else ""
    images = f"{stage.family} images" if stage.source == "synthetic" else f"{stage.source} images"
    resolution = f", at 1/{stage.downsampling} of the resolution" if stage.downsampling > 1 else ""
    return f"ln sigma in [{stage.lower:g}, {stage.upper:g}] from {images}, {stage.sigma_draw}{share}{resolution}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:,.1f} h"
