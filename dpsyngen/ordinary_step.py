"""The ordinary step: the mean gradient over public images, or over private ones without any guarantee (variant nonprivate)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpsyngen.compute import Compute, Piece
from dpsyngen.config import PhaseConfig, RunConfig
from dpsyngen.data import Dataset, SyntheticImages
from dpsyngen.denoiser import Denoiser
from dpsyngen.hints import synthetic_hints
from dpsyngen.loss import Draws, denoising_loss, draw
from dpsyngen.noise_levels import Stage

# (step, chunk, n, rng) -> images float32 [n, C, H, W], labels int64 [n], hints like the images or None
Batches = Callable[[int, int, int, np.random.Generator], tuple[Tensor, Tensor, Tensor | None]]


def synthetic_batches(config: RunConfig) -> Batches:
    """Programmatic images with hints made from themselves; they have no class, so random labels teach that labels say nothing yet."""
    source = SyntheticImages(config.synthetic.family, config.synthetic.options, config.data.image_shape, config.seed)

    def batch(step: int, chunk: int, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        first = step * config.synthetic.batch_size + chunk * config.compute.chunk_size
        images = source.batch(range(first, first + n))
        hints = synthetic_hints(images, config.hints, rng) if config.hints.kind != "none" else None
        return images, torch.from_numpy(rng.integers(max(1, config.data.num_classes), size=n)), hints

    return batch


def nonprivate_batches(dataset: Dataset) -> Batches:
    """Private images drawn uniformly with replacement, unprotected: the ceiling that private training is compared with."""

    def batch(step: int, chunk: int, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, None]:
        return *dataset.batch(rng.integers(len(dataset), size=n)), None

    return batch


@dataclass(frozen=True)
class OrdinaryStep:
    """Call with a step number: fills `.grad` with the mean gradient over the batch and returns its public loss.

    `experts` pairs each stage with the denoiser that learns it; the batch is shared evenly between the stages. Chunks, substreams
    and processes are as in the private step, but the randomness comes from the public seed.
    """

    experts: tuple[tuple[Stage, Denoiser], ...]
    batches: Batches
    phase: PhaseConfig
    config: RunConfig
    compute: Compute
    public: bool

    def __call__(self, step: int) -> dict[str, float]:
        """Returns {"loss": mean}; of images that are not public nothing, or {"loss_without_dp": mean} if the config asks for it."""
        parameters = {f"{i}.{name}": p for i, (_, net) in enumerate(self._networks()) for name, p in net.named_parameters()}
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        loss = torch.zeros(1, device=self.compute.device)
        for pieces in self.compute.deal(np.arange(self.phase.batch_size), self.config.compute):
            loss += self._pieces(step, pieces)
        reduced = self.compute.sum_over_processes({"loss": loss} | {name: p.grad for name, p in parameters.items()})  # type: ignore[arg-type]
        for name, parameter in parameters.items():
            parameter.grad = reduced[name]
        if self.public:
            return {"loss": reduced["loss"].item()}
        return {"loss_without_dp": reduced["loss"].item()} if self.config.tracking.log_private_diagnostics_without_dp else {}

    def _networks(self) -> list[tuple[Stage, Denoiser]]:
        """One entry per distinct network."""
        return list({id(denoiser): (stage, denoiser) for stage, denoiser in self.experts}.values())

    def _pieces(self, step: int, pieces: list[Piece]) -> Tensor:
        """Add the share of these pieces of chunks in the mean gradient; returns their share of the mean loss."""
        copies, share = self.phase.noise_multiplicity, torch.zeros(1, device=self.compute.device)
        parts: list[list[tuple[Tensor, Draws, Tensor | None]]] = [[] for _ in self.experts]
        for piece in pieces:
            for index, part in enumerate(self._rows(step, piece)):
                if part is not None:
                    parts[index].append(part)
        for (_, denoiser), shares in zip(self.experts, parts, strict=True):
            if not shares:
                continue
            images, draws, hints = zip(*shares, strict=True)
            x, hint = self._copied(images), None if hints[0] is None else self._copied(hints)
            with self.compute.autocast():
                loss = denoising_loss(denoiser, x, Draws.cat(draws).to(self.compute.device), hint).sum() / (copies * self.phase.batch_size)
            loss.backward()
            share += loss.detach()
        return share

    def _copied(self, images: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(images).to(self.compute.device).repeat_interleave(self.phase.noise_multiplicity, dim=0)

    def _rows(self, step: int, piece: Piece) -> Iterator[tuple[Tensor, Draws, Tensor | None] | None]:
        """For each expert its share of a piece, images, draws and hints, from the substream of its chunk; None where it has none."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.config.seed, step, piece.chunk))))
        images, labels, hints = self.batches(step, piece.chunk, len(piece.entries), rng)
        positions = torch.arange(len(labels))
        inside = (positions >= piece.part.start) & (positions < piece.part.stop)
        for index, (stage, denoiser) in enumerate(self.experts):
            mine = slice(index, None, len(self.experts))
            if not len(labels[mine]):
                yield None
                continue
            draws = draw(
                rng, stage, labels[mine].repeat_interleave(self.phase.noise_multiplicity), self.config.data.image_shape, p_mean=self.phase.p_mean,
                p_std=self.phase.p_std, label_dropout=self.config.network.label_dropout, null_label=denoiser.null_label,
            )  # fmt: skip
            wanted = inside[mine]
            rows = draws.rows(wanted.repeat_interleave(self.phase.noise_multiplicity))
            yield (images[mine][wanted], rows, None if hints is None else hints[mine][wanted]) if wanted.any() else None
