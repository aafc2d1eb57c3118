"""Replay: each private step also learns a little from programmatic images, so that what they taught stays.

The public gradient is added to the finished private one, after clipping, noise and normalisation. It is a function of the weights, which are
private already, of programmatic images and of the public seed. So it is post-processing and costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpsyngen.denoiser import Denoiser
from dpsyngen.ordinary_step import OrdinaryStep


@dataclass(frozen=True)
class ReplayStep:
    """Call with a step number: `.grad` of the denoiser is g_private + weight * g_public * min(1, C / ||g_public||).

    g_private is what `private` leaves in `.grad`, g_public what `public` does. The latter is clipped as a whole, to the same C
    (`clipping_norm`) as each private image, so that `weight` means the same at every scale; it is left out if it isn't finite.
    """

    private: Callable[[int], dict[str, float]]
    public: OrdinaryStep
    denoiser: Denoiser
    weight: float
    clipping_norm: float

    def __call__(self, step: int) -> dict[str, float]:
        """Returns what the private step does, and the public loss as `replay_loss`."""
        logged = self.private(step)
        finished = {name: parameter.grad for name, parameter in self.denoiser.named_parameters()}
        loss = self.public(step)["loss"]
        factor = self.weight * self._clip()
        for name, parameter in self.denoiser.named_parameters():
            parameter.grad = _added(finished[name], parameter.grad, factor)
        return logged | {"replay_loss": loss}

    def _clip(self) -> float:
        """min(1, C / ||g||) of the gradient g that lies in `.grad`; 0 if it isn't finite."""
        norm = torch.linalg.vector_norm(torch.stack([p.grad.double().norm() for p in self.denoiser.parameters() if p.grad is not None])).item()
        return min(1.0, self.clipping_norm / max(norm, 1e-30)) if norm < float("inf") else 0.0


def _added(private: Tensor | None, public: Tensor | None, factor: float) -> Tensor | None:
    if private is None or public is None or factor == 0:
        return private
    return private + factor * public
