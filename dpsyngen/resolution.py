"""Images at lower resolution: means over blocks of pixels, and back."""

import torch.nn.functional as F
from torch import Tensor


def pooled(x: Tensor, factor: int) -> Tensor:
    """Means over blocks of factor x factor pixels: [N, C, H, W] -> [N, C, H / factor, W / factor].

    Of independent noise of deviation sigma in each pixel they leave independent noise of deviation sigma / factor.
    """
    return x if factor == 1 else F.avg_pool2d(x, factor)


def upsampled(z: Tensor, factor: int) -> Tensor:
    """Each pixel as a block of factor x factor pixels, so that pooled(upsampled(z)) = z.

    upsampled(pooled(x)) is then the orthogonal projection of x onto such images: white noise is independent in it and in what is left of x.
    """
    return F.interpolate(z, scale_factor=factor, mode="nearest")
