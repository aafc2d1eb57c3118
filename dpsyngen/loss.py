"""The denoising loss of one image per row; who averages over what is the caller's business."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dpsyngen.augmentation import Augmentation, moved
from dpsyngen.config import PhaseConfig, PrivateConfig
from dpsyngen.denoiser import Denoiser
from dpsyngen.resolution import pooled
from dpsyngen.sigma_draws import SigmaDraw, sigma_of, stratified


class DrawSource(Protocol):
    """NumPy's generator, or something else that gives independent values of these two distributions."""

    def random(self, size: int, /) -> np.ndarray:
        """Uniforms in [0, 1), float64 [size]."""

    def standard_normal(self, size: tuple[int, ...], /, dtype: Any) -> np.ndarray:
        """Normal deviates, `dtype` [*size]."""


@dataclass(frozen=True)
class Draws:
    """The randomness of one forward pass over N rows: sigma float32 [N], noise float32 [N, *network_shape], labels int64 [N] after dropout,
    moves int64 [N, 3] as in `Augmentation.draw`, or None where images stay as they are.
    """

    sigma: Tensor
    noise: Tensor
    labels: Tensor
    moves: Tensor | None = None

    def to(self, device: torch.device) -> "Draws":
        """The same draws on another device."""
        return self._each(lambda values: values.to(device))

    def rows(self, which: slice | Tensor) -> "Draws":
        """The draws of some rows: a slice, or bool [N]."""
        return self._each(lambda values: values[which])

    @classmethod
    def cat(cls, parts: "Sequence[Draws]") -> "Draws":
        """The draws of several chunks, one after another."""
        sigma, noise, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("sigma", "noise", "labels"))
        moves = [part.moves for part in parts if part.moves is not None]
        return cls(sigma, noise, labels, torch.cat(moves) if moves else None)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Draws":
        return Draws(change(self.sigma), change(self.noise), change(self.labels), None if self.moves is None else change(self.moves))


@dataclass(frozen=True)
class Variation:
    """How the K draws of an image differ: by default all are independent and the image stays as it is (docs/method.md, "What the K draws vary")."""

    sigma_stratified: bool = False
    antithetic: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    hints_moved: bool = False
    """Whether class means as hints are moved with the image."""

    @classmethod
    def of(cls, phase: PhaseConfig) -> "Variation":
        """That of a phase; programmatic images aren't augmented, their families vary them."""
        if not isinstance(phase, PrivateConfig):
            return cls(phase.sigma_stratified, phase.antithetic)
        return cls(phase.sigma_stratified, phase.antithetic, Augmentation(phase.augment_flip, phase.augment_shift), phase.augment_hints)


AS_THEY_ARE = Variation()
"""Independent draws, images as they are."""


def denoising_loss(denoiser: Denoiser, x: Tensor, draws: Draws, hint: Tensor | None = None, *, hints_moved: bool = False) -> Tensor:
    """Weighted squared error per image, float32 [N] (Karras et al., equation 2).

    x float32 [N, C, H, W] in [-1, 1], before the moves of `draws`, which class means as hints follow if `hints_moved`. The weight 1 / c_out^2
    makes the network's own target unit-variance at every sigma; the square is averaged over pixels and never over rows, so that no row's loss
    depends on another's. A network for a lower resolution is trained there: its image is pooled(x), its noise level sigma / downsampling.
    """
    if draws.moves is not None:
        x = moved(x, draws.moves)
        if hints_moved and hint is None:
            hint = moved(denoiser.class_means[draws.labels], draws.moves)
    x, sigma = pooled(x, denoiser.downsampling), draws.sigma / denoiser.downsampling
    estimate = denoiser if denoiser.downsampling == 1 else denoiser.by_network
    denoised = estimate(x + sigma[:, None, None, None] * draws.noise, sigma, draws.labels, hint)
    _, c_out, _ = denoiser.coefficients(sigma)
    return torch.mean((denoised - x) ** 2, dim=(1, 2, 3)) / c_out**2


def draw(
    rng: DrawSource,
    sigma_draw: SigmaDraw,
    labels: Tensor,
    image_shape: tuple[int, int, int],
    *,
    label_dropout: float,
    null_label: int,
    copies: int = 1,
    variation: Variation = AS_THEY_ARE,
) -> Draws:
    """Randomness for len(labels) rows, all from `rng`: sigma, unit noise, labels dropped to the null label, moves.

    Each `copies` adjacent rows are one image's, an even number if antithetic. Their joint distribution is the same for every image, and they
    are independent of other images' rows; the guarantee needs both.
    """
    rows, twins = len(labels), 2 if variation.antithetic else 1
    uniform = rng.random(rows // twins)
    if variation.sigma_stratified:
        uniform = stratified(uniform, copies // twins)
    sigma = sigma_of(sigma_draw, uniform).repeat_interleave(twins)
    dropped = torch.from_numpy(rng.random(rows) < label_dropout)
    noise = torch.from_numpy(rng.standard_normal((rows // twins, *image_shape), dtype=np.float32))
    if variation.antithetic:
        noise = torch.stack([noise, -noise], dim=1).flatten(0, 1)
    return Draws(sigma, noise, torch.where(dropped, null_label, labels), variation.augmentation.draw(rng.random, rows))
