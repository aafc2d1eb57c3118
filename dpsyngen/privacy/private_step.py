"""The private step: the noisy mean gradient of a Poisson batch, ready for the optimiser."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig
from dpsyngen.data import ImageDataset
from dpsyngen.denoiser import Denoiser
from dpsyngen.loss import denoising_loss, draw
from dpsyngen.noise_levels import Stage
from dpsyngen.privacy.journal import Journal
from dpsyngen.privacy.per_example import PerExampleGradients, recording
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.randomness import PrivateKey


@dataclass(frozen=True)
class PrivateStep:
    """Call with a step number: fills `.grad` of the denoiser's parameters (Dockhorn et al., arXiv 2210.09929, Algorithm 1).

    The logical batch is cut into chunks of compute.chunk_size images, each with draws from its own substream, and the chunks are
    dealt to the processes; so neither the number of processes nor their order changes anything but rounding.
    """

    denoiser: Denoiser
    stage: Stage
    dataset: ImageDataset
    plan: PrivacyPlan
    key: PrivateKey
    journal: Journal
    config: RunConfig
    compute: Compute

    def __call__(self, step: int) -> dict[str, float]:
        """Journal the step, then spend it. Returns diagnostics, which are NOT private and empty unless the config asks for them."""
        self.journal.begin(step)
        batch = self.plan.draw_batch(self.key, self.journal.attempt, step, len(self.dataset))
        total = {name: torch.zeros_like(p, dtype=self.plan.sum_dtype) for name, p in self.denoiser.named_parameters() if p.requires_grad}
        diagnostics = _Diagnostics()
        size = self.config.compute.chunk_size
        for chunk in range(self.compute.rank, -(-len(batch) // size), self.compute.processes):
            indices = batch[chunk * size : (chunk + 1) * size]
            # Kernels may round otherwise for another number of rows; exact sums would carry that from one image to the others.
            padding = size - len(indices) if self.plan.secure_noise else 0
            record, losses = self._chunk(np.pad(indices, (0, padding), mode="edge"), step, chunk)
            for name, gradient in self.plan.clip_and_sum(record, len(indices)).items():
                total[name] += gradient
            if self.config.tracking.log_private_diagnostics_without_dp:
                diagnostics.add(losses[: len(indices)], record.norms()[: len(indices)], self.plan.clipping_norm)
        total = self.compute.sum_over_processes(total)
        gradient = self.plan.privatise(total, self.key, self.journal.attempt, step)
        for name, parameter in self.denoiser.named_parameters():
            parameter.grad = gradient.get(name)
        return diagnostics.summary()

    def _chunk(self, indices: np.ndarray, step: int, chunk: int) -> tuple[PerExampleGradients, Tensor]:
        """Per-example gradients of one chunk, B images of K rows each, and their losses [B]."""
        images, labels = self.dataset.batch(indices)
        copies, private = self.plan.noise_multiplicity, self.config.private
        rng = self.plan.draw_source(self.key, self.journal.attempt, step, chunk)
        draws = draw(
            rng, self.stage, labels.repeat_interleave(copies), self.config.data.image_shape,
            p_mean=private.p_mean, p_std=private.p_std, label_dropout=self.config.network.label_dropout, null_label=self.denoiser.null_label,
        ).to(self.compute.device)  # fmt: skip
        rows = images.to(self.compute.device).repeat_interleave(copies, dim=0)
        with recording(self.denoiser, len(indices), copies) as record:
            with self.compute.autocast():
                losses = denoising_loss(self.denoiser, rows, draws).view(-1, copies).mean(dim=1)
            losses.sum().backward()
        return record, losses.detach()


class _Diagnostics:
    """Means over a step's batch on this process. Not private: they describe the drawn images."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def add(self, losses: Tensor, norms: Tensor, clipping_norm: float) -> None:
        self.rows.append(torch.stack([losses, norms.float(), (norms > clipping_norm).float()], dim=1))

    def summary(self) -> dict[str, float]:
        if not self.rows:
            return {}
        rows = torch.cat(self.rows)
        loss, norm, clipped = rows.mean(dim=0).tolist()
        return {"loss": loss, "gradient_norm": norm, "clipped_fraction": clipped, "batch_size": float(len(rows))}
