"""Adam that knows how much of a gradient's square is DP noise."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class NoiseCorrection:
    """What is public about the noise in a gradient; numbers of the plan and the config alone."""

    deviation: float
    """Standard deviation s of the noise on each entry, in the gradient's units."""
    floor: float
    """The least second moment that is believed, in standard errors that its estimate has under noise alone."""


class NoiseCorrectedAdam(torch.optim.Optimizer):
    """Adam whose second moment is the gradient's without the noise's (DP-AdamBC; Tang et al., arXiv 2312.14334, Algorithm 1).

    With gradients g_t whose noise has variance s^2, t counted from 1:

        m_t = beta1 m_(t-1) + (1 - beta1) g_t
        v_t = beta2 v_(t-1) + (1 - beta2) (g_t^2 - s^2)
        weights -= lr m_t / (1 - beta1^t) / (sqrt(max(v_t / (1 - beta2^t), floor e_t)) + eps)

    s^2 is subtracted from each square rather than once from their average, which is the same while s stays, and right as well where a
    resumed run goes on with other noise. Noise alone gives the estimate v_t / (1 - beta2^t) the standard error

        e_t = s^2 sqrt(2 (1 - beta2) (1 + beta2^t) / ((1 + beta2) (1 - beta2^t)))

    which takes the place of the paper's constant gamma': it is about s^2 while few gradients were seen, when a smaller one would let single
    entries leap, and falls as they become more. With s = 0 this is torch.optim.Adam. A parameter without a gradient is left alone, and its t.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], correction: NoiseCorrection, eps: float = 1e-8
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})
        self.correction = correction

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients in `.grad`. Its state is tensors alone, named as torch.optim.Adam's."""
        if closure is not None:
            raise ValueError("NoiseCorrectedAdam.step: expected no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["betas"], group["eps"])

    def _update(self, parameter: nn.Parameter, gradient: torch.Tensor, lr: float, betas: tuple[float, float], eps: float) -> None:
        state, (beta1, beta2), variance = self.state[parameter], betas, self.correction.deviation**2
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        t, mean, square = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).sub_((1 - beta2) * variance)
        least = self.correction.floor * variance * _relative_error(beta2, t)
        divisor = (square / (1 - beta2**t)).clamp_(min=least).sqrt_().add_(eps)
        parameter.addcdiv_(mean, divisor, value=-lr / (1 - beta1**t))


def _relative_error(beta2: float, t: int) -> float:
    """The standard error of the average, with Adam's weights, of t squares of independent Gaussians, over their variance."""
    return math.sqrt(2 * (1 - beta2) * (1 + beta2**t) / ((1 + beta2) * (1 - beta2**t)))
