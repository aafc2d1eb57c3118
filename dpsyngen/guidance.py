"""Guidance: a denoiser changed so that what is drawn by it shows its class more clearly. Post-processing of what was released."""

from collections.abc import Callable

import torch
from torch import Tensor

from dpsyngen.config import SamplingConfig
from dpsyngen.teacher import Teacher

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""denoiser(x float32 [N, C, H, W], sigma float32 [N], labels int64 [N]) -> float32 [N, C, H, W], an estimate of E[x0 | x]."""


def guided(denoiser: Denoiser, scale: float, null_label: int) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): D_null + scale (D_y - D_null), as a denoiser.

    Scale 1 is the denoiser itself and 0 the unconditional one, at no extra cost; any other scale takes one doubled batch.
    """

    def unconditional(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return denoiser(x, sigma, torch.full_like(labels, null_label))

    def extrapolated(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, null_label)])
        conditional, null = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return null + scale * (conditional - null)

    if scale == 1:
        return denoiser
    return unconditional if scale == 0 else extrapolated


def guided_by(
    teacher: Teacher, denoiser: Denoiser, settings: SamplingConfig, sigma_data: float, null_label: int, per_class: int
) -> Denoiser:
    """Classifier guidance (Dhariwal and Nichol, arXiv 2105.05233): D + s v(sigma) g, with g the teacher's `evidence` at D, as a denoiser.

    E[x0 | x, y] is E[x0 | x] + sigma^2 times the gradient of ln p(y | x) by x. To the first order that is Cov[x0 | x] times the gradient of
    ln p(y | x0) at E[x0 | x], and Cov[x0 | x] is taken for v(sigma) = sigma^2 sigma_data^2 / (sigma^2 + sigma_data^2), which it is in every
    direction if images are Gaussian with deviation sigma_data. So no gradient goes through the denoiser. What is guided is kept in [-1, 1],
    where images are.

    Args:
        teacher: What knows classes.
        denoiser: Its labels below null_label are prototypes of classes; others mean no class, so they are not guided.
        settings: `teacher_guidance` is s, and 0 gives the denoiser itself; guided is only where ln sigma is in `teacher_range`
            (Kynkaanniemi et al., arXiv 2404.07724), and with `teacher_temperature`.
        sigma_data: > 0.
        null_label: The number of classes times per_class.
        per_class: Prototypes of each class.
    """
    lowest, highest = settings.teacher_range

    def towards_class(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        estimate, level = denoiser(x, sigma, labels), sigma.log()
        chosen = (labels < null_label) & (level >= lowest) & (level <= highest)
        if not chosen.any():
            return estimate
        variance = (1 / (1 / sigma[chosen] ** 2 + 1 / sigma_data**2))[:, None, None, None]
        evidence = teacher.evidence(estimate[chosen], labels[chosen] // per_class, settings.teacher_temperature)
        estimate[chosen] = (estimate[chosen] + settings.teacher_guidance * variance * evidence).clamp(-1, 1)
        return estimate

    return towards_class if settings.teacher_guidance > 0 else denoiser
