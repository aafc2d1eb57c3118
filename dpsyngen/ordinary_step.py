"""The ordinary step: the mean gradient over public images, over released class means, or over private images without any guarantee."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpsyngen.compute import Compute, Piece
from dpsyngen.config import PhaseConfig, RunConfig
from dpsyngen.data import Dataset, SyntheticImages, deformed
from dpsyngen.denoiser import Denoiser
from dpsyngen.errors import InputError
from dpsyngen.hints import synthetic_hints
from dpsyngen.loss import Draws, Variation, denoising_loss, draw
from dpsyngen.noise_levels import Stage, turns

# (places of the images in an endless sequence int64 [n], rng) -> images float32 [n, C, H, W], labels int64 [n], hints like the images or None
Batches = Callable[[np.ndarray, np.random.Generator], tuple[Tensor, Tensor, Tensor | None]]


def synthetic_batches(config: RunConfig, stage: Stage) -> Batches:
    """A stage's programmatic images with hints made from themselves; they have no class, so random labels teach that labels say nothing yet.

    Raises InputError for a family or an option that doesn't exist.
    """
    try:
        source = SyntheticImages(stage.family, stage.options, config.data.image_shape, config.seed, config.synthetic.distinct)
    except InputError as error:
        if not any(own.name == stage.name and own.family is not None for own in config.stages.custom):
            raise
        raise InputError(f"stages.custom: stage {stage.name}: {str(error).removeprefix('synthetic.')}") from error

    if config.hints.kind != "none" and config.hints.synthetic_from == "class" and source.copies < 2:
        draws_none = f"since stage {stage.name} learns from {stage.family}, which draws no classes"
        raise InputError(f"hints.synthetic_from: expected image, {draws_none}, got 'class'")

    def batch(places: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        if config.hints.kind == "none":
            images, hints = source.batch(places), None
        elif config.hints.synthetic_from == "image":
            images = source.batch(places)
            hints = synthetic_hints(images, config.hints, rng)
        else:
            images, means = source.with_class_means(places, config.hints.synthetic_neighbours)
            hints = synthetic_hints(means, config.hints, rng)
        classes = rng.integers(max(1, config.data.num_classes), size=len(places))
        return images, torch.from_numpy(classes * (1 if hints is None else config.hints.prototypes)), hints

    return batch


def nonprivate_batches(dataset: Dataset, denoiser: Denoiser) -> Batches:
    """Private images drawn uniformly with replacement, unprotected: the ceiling that private training is compared with."""

    def batch(places: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor, None]:
        images, labels = dataset.batch(rng.integers(len(dataset), size=len(places)))
        return images, denoiser.condition(images, labels), None

    return batch


def central_batches(config: RunConfig, denoiser: Denoiser) -> Batches:
    """Deformed copies of the class means or prototypes that the denoiser has as hints by then, each with its own as its hint.

    Classes are balanced, and prototypes come in proportion to their shares of their class. Nothing else is read, so it is post-processing.
    """

    def batch(places: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor, None]:
        reached = denoiser.shares.double().cumsum(dim=0).cpu().numpy()
        labels = np.searchsorted(reached[:-1], reached[-1] * rng.random(len(places)), side="right")
        images = deformed(denoiser.class_means.cpu()[labels], places, config.seed, config.central.deformation)
        return images, torch.from_numpy(labels), None

    return batch


@dataclass(frozen=True)
class Lesson:
    """A stage, the denoiser that learns it, the images that teach it, and a factor of its loss."""

    stage: Stage
    denoiser: Denoiser
    batches: Batches
    factor: float = 1.0


@dataclass(frozen=True)
class OrdinaryStep:
    """Call with a step number: fills `.grad` with the mean gradient over the batch and returns its public loss.

    The batch is divided between the lessons by their stages' weights. Chunks, substreams and processes are as in the private step, but the
    randomness comes from the public seed. Step t goes on in the public sequences where `before` such steps, of `images_before` images
    together, have ended.
    """

    lessons: tuple[Lesson, ...]
    batch_size: int
    phase: PhaseConfig
    config: RunConfig
    compute: Compute
    public: bool
    before: int = 0
    images_before: int = 0

    def __call__(self, step: int) -> dict[str, float]:
        """Returns {"loss": mean}; of images that are not public nothing, or {"loss_without_dp": mean} if the config asks for it."""
        parameters = {f"{i}.{name}": p for i, network in enumerate(self.networks()) for name, p in network.named_parameters()}
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        loss = torch.zeros(1, device=self.compute.device)
        for pieces in self.compute.deal(np.arange(self.batch_size), self.config.compute):
            loss += self._pieces(step, pieces)
        reduced = self.compute.sum_over_processes({"loss": loss} | {name: p.grad for name, p in parameters.items()})  # type: ignore[arg-type]
        for name, parameter in parameters.items():
            parameter.grad = reduced[name]
        if self.public:
            return {"loss": reduced["loss"].item()}
        return {"loss_without_dp": reduced["loss"].item()} if self.config.tracking.log_private_diagnostics_without_dp else {}

    def networks(self) -> list[Denoiser]:
        """The distinct networks that learn."""
        return list({id(lesson.denoiser): lesson.denoiser for lesson in self.lessons}.values())

    def _pieces(self, step: int, pieces: list[Piece]) -> Tensor:
        """Add the share of these pieces of chunks in the mean gradient; returns their share of the mean loss."""
        rows, share = self.batch_size * self.phase.noise_multiplicity, torch.zeros(1, device=self.compute.device)
        parts: list[list[tuple[Tensor, Draws, Tensor | None]]] = [[] for _ in self.lessons]
        for piece in pieces:
            for index, part in enumerate(self._rows(step, piece)):
                if part is not None:
                    parts[index].append(part)
        for lesson, shares in zip(self.lessons, parts, strict=True):
            if not shares:
                continue
            images, draws, hints = zip(*shares, strict=True)
            x, hint = self._copied(images), None if hints[0] is None else self._copied(hints)
            with self.compute.autocast():
                losses = denoising_loss(lesson.denoiser, x, Draws.cat(draws).to(self.compute.device), hint, hints_moved=self._variation.hints_moved)
                loss = losses.sum() * (lesson.factor / rows)
            loss.backward()
            share += loss.detach()
        return share

    @property
    def _variation(self) -> Variation:
        return Variation.of(self.phase)

    def _copied(self, images: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(images).to(self.compute.device).repeat_interleave(self.phase.noise_multiplicity, dim=0)

    def _rows(self, step: int, piece: Piece) -> Iterator[tuple[Tensor, Draws, Tensor | None] | None]:
        """For each lesson its share of a piece, images, draws and hints, from the substream of its chunk; None where it has none."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.config.seed, self.before + step, piece.chunk))))
        places = self.images_before + step * self.batch_size + piece.entries
        owner = turns([lesson.stage.weight for lesson in self.lessons], places)
        inside = np.zeros(len(places), dtype=bool)
        inside[piece.part] = True
        copies = self.phase.noise_multiplicity
        for index, lesson in enumerate(self.lessons):
            mine = owner == index
            if not mine.any():
                yield None
                continue
            images, labels, hints = lesson.batches(places[mine], rng)
            draws = draw(
                rng, lesson.stage.sigma_draw, labels.repeat_interleave(copies), lesson.denoiser.network_shape,
                label_dropout=self.config.network.label_dropout, null_label=lesson.denoiser.null_label,
                copies=copies, variation=self._variation,
            )  # fmt: skip
            wanted = torch.from_numpy(inside[mine])
            rows = draws.rows(wanted.repeat_interleave(copies))
            yield (images[wanted], rows, None if hints is None else hints[wanted]) if wanted.any() else None
