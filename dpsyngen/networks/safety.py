"""Refuse networks whose rows depend on each other: one image's gradient would then carry others, and clipping bound nothing."""

import torch
from torch import nn

from dpsyngen.errors import InputError

_MIXING = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)


def refuse_mixing(denoiser: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Raise InputError if a layer mixes examples: by its type, or seen in a probe in which one row changes another's output.

    `denoiser(x, sigma, labels)` is called on random rows. Its mode and parameters stay as they are.
    """
    for name, layer in denoiser.named_modules():
        if isinstance(layer, _MIXING) or getattr(layer, "track_running_stats", False):
            raise InputError(f"network: layer {name!r} ({type(layer).__name__}) mixes the examples of a batch, which DP-SGD can't bound")
    device = next(denoiser.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *image_shape, generator=generator).to(device)
    sigma, labels = torch.full((4,), 0.5, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    saved = [parameter.detach().clone() for parameter in denoiser.parameters()]
    with torch.no_grad():
        for parameter in denoiser.parameters():  # zero-initialised layers would hide what lies before them
            parameter.copy_((0.1 * torch.randn(parameter.shape, generator=generator)).to(device))
        before = denoiser(x, sigma, labels)
        changed = x.clone()
        changed[1:] *= -3
        after = denoiser(changed, sigma, labels)
        for parameter, value in zip(denoiser.parameters(), saved, strict=True):
            parameter.copy_(value)
    if not torch.allclose(before[0], after[0], rtol=1e-4, atol=1e-5 * float(before[0].abs().max())):
        raise InputError("network: the output for one image changes with the other images of its batch, which DP-SGD can't bound")
