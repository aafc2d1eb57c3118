"""Training: the loop, and the run around it. Running it again resumes it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from dpsyngen import pretraining
from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig
from dpsyngen.data import Dataset, load_train
from dpsyngen.denoiser import Denoiser, RoutedDenoiser, build_denoiser
from dpsyngen.errors import Interrupted
from dpsyngen.interruption import GO_ON, signals_deferred
from dpsyngen.moments import release_moments
from dpsyngen.networks.safety import refuse_mixing
from dpsyngen.phases import Phase, central_phase, private_phase, synthetic_phase
from dpsyngen.previews import write_preview
from dpsyngen.privacy.continuation import plan_for
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.progress import Progress, StepBar, moving_average
from dpsyngen.run_directory import RunDirectory
from dpsyngen.saved_model import write_model
from dpsyngen.snapshots import Snapshots
from dpsyngen.tracking import Trackers, expect_installed


@dataclass(frozen=True)
class Preparation:
    """What a run starts from: all that bad input can spoil is made before a phase spends hours or a file is written."""

    config: RunConfig
    compute: Compute
    denoiser: Denoiser | RoutedDenoiser
    dataset: Dataset
    plan: PrivacyPlan | None
    """None for nonprivate stages."""
    synthetic: Phase | None
    """None for variants without a synthetic phase."""
    central: Phase | None
    """None where the config has no central phase."""


def prepare(config: RunConfig, compute: Compute, run: RunDirectory, *, changed_privacy: bool = False) -> Preparation:
    """Build the network, read the private images, calibrate the noise. Raises InputError for what can't be used; writes nothing."""
    expect_installed(config.tracking)
    denoiser = build_denoiser(config).to(compute.device)
    refuse_mixing(denoiser, config.data.image_shape)
    synthetic, central = synthetic_phase(config, denoiser, compute), central_phase(config, denoiser, compute)
    dataset = load_train(config.data)
    size = config.data.expected_size or len(dataset)
    plan = plan_for(config, size, run, changed_privacy=changed_privacy) if config.is_private else None
    return Preparation(config, compute, denoiser, dataset, plan, synthetic, central)


def train(prepared: Preparation, run: RunDirectory, trackers: Trackers) -> None:
    """Train from the beginning, or from the newest checkpoint, to the end; then write model/ and the final privacy.json."""
    config, compute, denoiser, plan = prepared.config, prepared.compute, prepared.denoiser, prepared.plan
    progress = Progress(run, compute, denoiser, trackers, config.compute.checkpoints_kept)
    progress.resume()
    if progress.phase == "synthetic":
        if prepared.synthetic is not None and not (progress.step == 0 and pretraining.take_up(config, denoiser, compute)):
            run_phase(prepared.synthetic, prepared.synthetic.steps, config, progress)
            pretraining.keep(config, denoiser, compute)
        progress.enter("private" if prepared.central is None else "central")
    ledger = Ledger.open(
        config, plan, run, compute, prepared.dataset.fingerprint,
        reached=progress.step if progress.phase == "private" else 0, has_class_means=progress.has_class_means,
        weights=progress.digest(), computed_by=progress.attempt,
    )  # fmt: skip
    progress.attempt = ledger.journal.attempt
    if denoiser.hinted and not progress.has_class_means:
        release_moments(config, plan, ledger, prepared.dataset, compute, denoiser)
        progress.has_class_means = True
        progress.save()
    if prepared.central is not None and progress.phase == "central":
        run_phase(prepared.central, prepared.central.steps, config, progress, lambda step: ledger.epsilon_at(0))
        progress.enter("private")
    private = private_phase(config, denoiser, prepared.dataset, plan, ledger, compute)
    run_phase(private, ledger.last_step(private.steps, progress.step), config, progress, ledger.epsilon_at)
    trackers.complete()
    if compute.is_main:
        write_model(run.model, config, denoiser, ledger.report())
        ledger.close()
    compute.wait()


def run_phase(
    phase: Phase,
    last: int,
    config: RunConfig,
    progress: Progress,
    epsilon: Callable[[int], float | None] = lambda step: None,
) -> None:
    """Train from `progress.step` to `last`. Private and ordinary training differ in `phase.gradient` alone.

    Ctrl-C or SIGTERM to any process ends all of them after the step in hand, with a checkpoint and Interrupted.
    """
    optimizer = phase.optimizer()
    average = moving_average(progress.denoiser, phase.settings.ema_decay)
    snapshots = Snapshots.of(progress.run.averages, config.private.ema_snapshots if phase.name == "private" else 0, phase.steps, progress.denoiser)
    progress.take_up(optimizer, average, snapshots.running)
    bar = StepBar.of(phase.name, progress.step, last, phase.settings.batch_size, shown=progress.compute.is_main)
    with bar, signals_deferred() as signal_that_came:
        for step in range(progress.step, last):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = phase.learning_rate(step)
            metrics = phase.gradient(step)
            optimizer.step()
            average.update_parameters(progress.denoiser)
            progress.step = step + 1
            snapshots.update(progress.step, progress.denoiser)
            if progress.step % config.tracking.log_every == 0 or progress.step == last:
                spent = epsilon(progress.step)
                metrics |= {} if spent is None else {"epsilon": spent}
                progress.log(metrics, time.perf_counter() - began)
                bar.set_postfix({name: f"{value:.3g}" for name, value in metrics.items()}, refresh=False)
            stopped_by = progress.compute.largest_over_processes(signal_that_came())
            if config.tracking.grid_is_due(progress.step, last):
                write_preview(progress, average.module, config)
            if progress.step < last and snapshots.due(progress.step) and progress.compute.is_main:
                snapshots.write(progress.step)  # before the checkpoint, for a resume to find those of all steps that it doesn't take again
            if progress.step % config.compute.checkpoint_every == 0 or progress.step == last or stopped_by:
                progress.save(optimizer, average, snapshots.running)
            if stopped_by:
                raise Interrupted(f"interrupted, step {progress.step} of the {phase.name} phase is saved; {GO_ON}", stopped_by)
            bar.update()
    if progress.step > 0:
        if progress.compute.is_main:
            snapshots.write(progress.step)  # the last, also where a resumed phase has ended early
        progress.denoiser.load_state_dict(average.module.state_dict())
