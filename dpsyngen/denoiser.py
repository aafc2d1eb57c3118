"""From a backbone to a denoiser: preconditioning, class hints, routing by stage."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dpsyngen.config import RunConfig, StageConfig
from dpsyngen.errors import InputError
from dpsyngen.hints import nearest_prototypes
from dpsyngen.networks import build_backbone
from dpsyngen.resolution import pooled, upsampled
from dpsyngen.teacher import Teacher


class Denoiser(nn.Module):
    """D(x; sigma, y) = m + c_skip (x - m) + c_out F(c_in (x - m), m, c_noise, y), with the hint m of class y (0 without hints).

    The coefficients are EDM's (Karras et al., arXiv 2206.00364, Table 1) or those of v-prediction (Salimans and Ho,
    arXiv 2202.00512), written for x = x0 + sigma n. The hint is E[x0 | y] as far as it is known, which is the best denoiser
    as sigma grows; the network starts from there.

    A class may have several prototypes as hints. A label is then the number of one of them, class * prototypes + place, so that it tells the
    class and the hint; `condition` makes such labels of classes for images, `conditions_to_draw` for sampling. The last one is the null label.

    `teacher`, where there is one, has no part in what the denoiser computes; it tells which class an image shows that was drawn by it.

    With `downsampling` s > 1 the network works on means over blocks of s x s pixels, where the noise level is sigma / s; see `_from_low_resolution`.
    """

    class_means: Tensor
    shares: Tensor
    modes: Tensor
    variances: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        parameterisation: Literal["edm", "v"],
        sigma_data: float,
        hinted: bool,
        prototypes: int = 1,
        rank: int = 0,
        closed_form_above: float = math.inf,
        downsampling: int = 1,
        detail_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.parameterisation = parameterisation
        self.sigma_data = sigma_data
        self.hinted = hinted
        self.prototypes = prototypes
        self.closed_form_above = closed_form_above
        self.downsampling = downsampling
        self.detail_std = detail_std
        channels, height, width = image_shape
        self.network_shape = (channels, height // downsampling, width // downsampling)
        self.null_label = num_classes * prototypes
        self.teacher: Teacher | None = None
        self.register_buffer("class_means", torch.zeros(self.null_label + 1 if hinted else 0, *image_shape))
        self.register_buffer("shares", torch.full((self.null_label if hinted else 0,), 1 / prototypes))
        self.register_buffer("modes", torch.zeros(rank, *image_shape))
        self.register_buffer("variances", torch.zeros(rank))

    def set_class_means(self, means: Tensor, shares: Tensor | None = None) -> None:
        """Take over DP class means or prototypes, float32 [num_classes * prototypes, C, H, W] in [-1, 1], and the share of its class that
        each has, [num_classes * prototypes]; equal ones where None. The null label's hint is their mean over balanced classes.
        """
        if shares is not None:
            self.shares.copy_(shares)
        mean = (means * self.shares[:, None, None, None]).sum(dim=0, keepdim=True) * (self.prototypes / self.null_label)
        self.class_means.copy_(torch.cat([means, mean]))

    def set_modes(self, modes: Tensor, variances: Tensor) -> None:
        """Take over the main axes of the DP covariance around the hints, [rank, C, H, W], orthonormal or zero, and the variances along them."""
        self.modes.copy_(modes)
        self.variances.copy_(variances)

    def condition(self, images: Tensor, labels: Tensor) -> Tensor:
        """The labels int64 [N] of images float32 [N, C, H, W] of these classes, int64 [N]: the nearest of each one's prototypes."""
        if self.prototypes == 1:
            return labels
        return nearest_prototypes(images, labels, self.class_means[:-1].to(images.device), self.prototypes)

    def conditions_to_draw(self, classes: np.ndarray) -> np.ndarray:
        """Labels int64 [N] for drawing images of these classes, int64 [N] in [0, num_classes], the last for no class.

        The images of a class get its prototypes in proportion to their shares. Which one image i gets depends on i and its class alone:
        multiples of the golden ratio modulo 1 fill [0, 1) evenly, whichever range of them is taken.
        """
        if self.prototypes == 1:
            return classes
        num_classes = self.null_label // self.prototypes
        uniform = np.arange(len(classes)) // num_classes * ((5**0.5 - 1) / 2) % 1
        reached = self.shares.unflatten(0, (num_classes, self.prototypes)).cumsum(dim=1).cpu().numpy()
        place = (reached[np.minimum(classes, num_classes - 1), :-1] <= uniform[:, None]).sum(axis=1)
        return np.where(classes == num_classes, self.null_label, classes * self.prototypes + place)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in for float32 sigma of any shape."""
        data = self.sigma_data if self.parameterisation == "edm" else 1.0
        total = torch.sqrt(sigma**2 + data**2)
        return data**2 / total**2, sigma * data / total, 1 / total

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor, hint: Tensor | None = None) -> Tensor:
        """Estimate x0: x float32 [N, C, H, W], sigma float32 [N] > 0, labels int64 [N] -> float32 [N, C, H, W].

        `hint` float32 [N, C, H, W] replaces the class means, which programmatic images don't have. Above ln sigma = `closed_form_above` the
        estimate is that of `gaussian`, unless a hint is given.
        """
        if self.downsampling > 1:
            return self._from_low_resolution(x, sigma, labels, hint)
        if hint is None and self.closed_form_above < math.inf:
            coarse = torch.log(sigma) > self.closed_form_above
            if coarse.any():
                gaussian = self.gaussian(x, sigma, labels)
                if coarse.all() and not torch.is_grad_enabled():
                    return gaussian
                return torch.where(coarse[:, None, None, None], gaussian, self.by_network(x, sigma, labels, None))
        return self.by_network(x, sigma, labels, hint)

    def gaussian(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """E[x0 | x] as `forward` has it, in closed form, if images of a label are Gaussian: their mean is the hint, their variance is
        that of each mode along it, and sigma_data^2 (1 for v-prediction) in every other direction.
        """
        c_skip, _, _ = self.coefficients(sigma[:, None])
        centred = x - self.class_means[labels]
        factors = self.variances / (self.variances + sigma[:, None] ** 2) - c_skip
        along = torch.einsum("nchw,rchw->nr", centred, self.modes) * factors
        return self.class_means[labels] + c_skip[:, :, None, None] * centred + torch.einsum("nr,rchw->nchw", along, self.modes)

    def by_network(self, x: Tensor, sigma: Tensor, labels: Tensor, hint: Tensor | None = None) -> Tensor:
        """The network's estimate at its own resolution: x float32 [N, *network_shape] with noise of deviation sigma in each of its pixels.

        `hint` as in `forward`, at full resolution.
        """
        c_skip, c_out, c_in = self.coefficients(sigma[:, None, None, None])
        c_noise = torch.log(sigma) / 4
        if not self.hinted:
            return c_skip * x + c_out * self.backbone(c_in * x, c_noise, labels).float()
        m = pooled(self.class_means[labels] if hint is None else hint, self.downsampling)
        inputs = torch.cat([c_in * (x - m), m], dim=1)
        return m + c_skip * (x - m) + c_out * self.backbone(inputs, c_noise, labels // self.prototypes).float()

    def _from_low_resolution(self, x: Tensor, sigma: Tensor, labels: Tensor, hint: Tensor | None) -> Tensor:
        """`forward` by a network for means over blocks of pixels.

        What it gives is E[pool(x0)]. Of the detail, by which pixels differ from the means of their blocks, nothing is learnt: it is that of the
        hint, and what x has beyond it times v / (v + sigma^2), the best estimate if that is Gaussian and white with variance v = detail_std^2.
        """
        factor = self.downsampling
        means = pooled(x, factor)
        estimate = self.by_network(means, sigma / factor, labels, hint)
        detail = x - upsampled(means, factor)
        shrink = (self.detail_std**2 / (self.detail_std**2 + sigma**2))[:, None, None, None]
        if not self.hinted:
            return upsampled(estimate, factor) + shrink * detail
        m = self.class_means[labels] if hint is None else hint
        expected = m - upsampled(pooled(m, factor), factor)
        return upsampled(estimate, factor) + expected + shrink * (detail - expected)


class RoutedDenoiser(nn.Module):
    """One denoiser per stage; each row goes to the one whose range holds its ln sigma (Choi et al., section 4.3).

    Raises InputError for a stage whose name means something to torch's ModuleDict.
    """

    def __init__(self, stages: Sequence[StageConfig], denoisers: Sequence[Denoiser]) -> None:
        super().__init__()
        for stage in stages:
            if hasattr(nn.ModuleDict(), stage.name):
                raise InputError(f"stages.custom: expected a stage name that torch doesn't use itself, got {stage.name}")
        self.stages = tuple(stages)
        self.experts = nn.ModuleDict({stage.name: denoiser for stage, denoiser in zip(stages, denoisers, strict=True)})
        self.null_label = denoisers[0].null_label
        self.hinted = denoisers[0].hinted
        self.prototypes = denoisers[0].prototypes
        self.sigma_data = denoisers[0].sigma_data
        self.teacher: Teacher | None = None

    def expert(self, name: str) -> Denoiser:
        """The denoiser of the stage of that name."""
        return self.experts[name]  # type: ignore[return-value]

    def set_class_means(self, means: Tensor, shares: Tensor | None = None) -> None:
        """As `Denoiser.set_class_means`, for every expert."""
        for stage in self.stages:
            self.expert(stage.name).set_class_means(means, shares)

    def set_modes(self, modes: Tensor, variances: Tensor) -> None:
        """As `Denoiser.set_modes`, for every expert."""
        for stage in self.stages:
            self.expert(stage.name).set_modes(modes, variances)

    def conditions_to_draw(self, classes: np.ndarray) -> np.ndarray:
        """As `Denoiser.conditions_to_draw`."""
        return self.expert(self.stages[0].name).conditions_to_draw(classes)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """As `Denoiser.forward`."""
        out = torch.empty_like(x)
        log_sigma = torch.log(sigma)
        for stage in self.stages:
            lower, upper = stage.range
            rows = (log_sigma >= lower) & (log_sigma < upper)
            if rows.any():
                out[rows] = self.expert(stage.name)(x[rows], sigma[rows], labels[rows])
        return out


def build_denoiser(config: RunConfig) -> Denoiser | RoutedDenoiser:
    """The untrained denoiser of a config, initialised from its public seed; beside it the config's teacher, if any, which knows nothing yet."""
    torch.manual_seed(config.seed)
    denoiser: Denoiser | RoutedDenoiser
    if config.stages.holder == "routed":
        stages = config.stages.stages
        denoiser = RoutedDenoiser(stages, [_build_single(config, stage.downsampling, stage.detail_std) for stage in stages])
    else:
        denoiser = _build_single(config)
    if config.teacher.used:
        denoiser.teacher = Teacher(config.data.image_shape, config.data.num_classes)
    return denoiser


def _build_single(config: RunConfig, downsampling: int = 1, detail_std: float = 0.0) -> Denoiser:
    channels, hinted = config.data.channels, config.hints.kind != "none"
    num_classes = max(1, config.data.num_classes)
    backbone = build_backbone(
        config.network,
        in_channels=channels * (2 if hinted else 1),
        out_channels=channels,
        image_size=config.data.image_size // downsampling,
        num_labels=num_classes + 1,
    )
    network = config.network
    return Denoiser(
        backbone, config.data.image_shape, num_classes,
        parameterisation=network.parameterisation, sigma_data=network.sigma_data, hinted=hinted,
        prototypes=config.hints.prototypes if hinted else 1, rank=config.hints.covariance_rank if hinted else 0,
        closed_form_above=config.stages.tau2 if config.stages.closed_form else math.inf,
        downsampling=downsampling, detail_std=detail_std,
    )  # fmt: skip
