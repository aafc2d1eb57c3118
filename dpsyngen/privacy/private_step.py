"""The private step: the noisy mean gradient of a Poisson batch, ready for the optimiser."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpsyngen.compute import Compute, Piece
from dpsyngen.config import RunConfig
from dpsyngen.data import Dataset
from dpsyngen.denoiser import Denoiser
from dpsyngen.loss import Draws, Variation, denoising_loss, draw
from dpsyngen.noise_levels import turns
from dpsyngen.privacy.journal import Journal
from dpsyngen.privacy.per_example import PerExampleGradients, recording
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.randomness import PrivateKey
from dpsyngen.sigma_draws import SigmaDraw


@dataclass(frozen=True)
class PrivateStep:
    """Call with a step number: fills `.grad` of the denoiser's parameters (Dockhorn et al., arXiv 2210.09929, Algorithm 1).

    The logical batch is cut into chunks of compute.chunk_size images, each with draws from its own substream, and processes get equal parts
    of them; so neither the number of processes nor how many chunks are computed at once changes anything but rounding.
    """

    denoiser: Denoiser
    sigma_draw: SigmaDraw
    dataset: Dataset
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
        diagnostics = _Diagnostics() if self.config.tracking.log_private_diagnostics_without_dp else None
        for pieces in self.compute.deal(batch, self.config.compute, whole_chunks=self.plan.secure_noise):
            examples = sum(map(len, pieces))
            record, losses = self._pieces(pieces, step)
            for name, gradient in self.plan.clip_and_sum(record, examples).items():
                total[name] += gradient
            if diagnostics is not None:
                diagnostics.add(losses[:examples], record.norms()[:examples], self.plan.clipping_norm)
        total = self.compute.sum_over_processes(total)
        noisy = self.plan.privatise(total, self.key, self.journal.attempt, step)
        for name, parameter in self.denoiser.named_parameters():
            parameter.grad = noisy.get(name)
        return {} if diagnostics is None else diagnostics.summary(self.compute)

    def _pieces(self, pieces: list[Piece], step: int) -> tuple[PerExampleGradients, Tensor]:
        """Per-example gradients of some pieces of chunks, B images of K rows each, and their losses [B]."""
        parts = [self._rows(piece, step) for piece in pieces]
        if self.plan.secure_noise:  # always as many rows, see `_rows`
            parts += parts[-1:] * (self.config.compute.chunks_at_once - len(parts))
        rows, draws = torch.cat([images for images, _ in parts]), Draws.cat([drawn for _, drawn in parts])
        copies = self.plan.noise_multiplicity
        with recording(self.denoiser, len(rows), copies) as record:
            with self.compute.autocast():
                x = rows.to(self.compute.device).repeat_interleave(copies, dim=0)
                rows_losses = denoising_loss(self.denoiser, x, draws.to(self.compute.device), hints_moved=self._variation.hints_moved)
                losses = rows_losses.view(-1, copies).mean(dim=1)
            losses.sum().backward()
        return record, losses.detach()

    @property
    def _variation(self) -> Variation:
        return Variation.of(self.config.private)

    def _rows(self, piece: Piece, step: int) -> tuple[Tensor, Draws]:
        """A piece's images, float32 [B, C, H, W], and the draws of their K rows each, from the substream of its chunk.

        Under secure noise a short chunk is filled up: kernels may round otherwise for another number of rows, and exact sums would
        carry that from one image to the others. Pieces are whole chunks then.
        """
        config, indices, part = self.config, piece.entries, piece.part
        if self.plan.secure_noise:
            indices = np.pad(indices, (0, config.compute.chunk_size - len(indices)), mode="edge")
            part = slice(0, len(indices))
        images, labels = self.dataset.batch(indices)
        labels = self.denoiser.condition(images, labels)
        copies = self.plan.noise_multiplicity
        drawn = draw(
            self.plan.draw_source(self.key, self.journal.attempt, step, piece.chunk), self.sigma_draw,
            labels.repeat_interleave(copies), self.denoiser.network_shape,
            label_dropout=config.network.label_dropout, null_label=self.denoiser.null_label,
            copies=copies, variation=self._variation,
        )  # fmt: skip
        return images[part], drawn.rows(slice(part.start * copies, part.stop * copies))


@dataclass(frozen=True)
class PrivateStepsInTurn:
    """Private steps of one plan on the networks of several stages. Whose turn it is follows from the weights and the step's number alone, so
    each is a step of the plan like any other. The networks whose turn it isn't have no gradient, so that an optimiser leaves them.
    """

    steps: tuple[PrivateStep, ...]
    weights: tuple[float, ...]

    def __call__(self, step: int) -> dict[str, float]:
        """As `PrivateStep`, of the one whose turn it is."""
        for other in self.steps:
            for parameter in other.denoiser.parameters():
                parameter.grad = None
        return self.steps[int(turns(self.weights, np.array(step)))](step)


class _Diagnostics:
    """Means over a step's batch on all processes. Not private: they describe the drawn images."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)

    def add(self, losses: Tensor, norms: Tensor, clipping_norm: float) -> None:
        losses, norms = losses.cpu().double(), norms.cpu().double()
        self.sums += torch.stack([losses, norms, (norms > clipping_norm).double(), torch.ones_like(norms)]).sum(dim=1)

    def summary(self, compute: Compute) -> dict[str, float]:
        loss, norm, clipped, images = compute.sum_over_processes({"sums": self.sums})["sums"].tolist()
        if images == 0:
            return {}
        values = {"loss": loss / images, "gradient_norm": norm / images, "clipped_fraction": clipped / images, "drawn_batch_size": images}
        return {f"{name}_without_dp": value for name, value in values.items()}
