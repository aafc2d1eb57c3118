"""A backbone for images whose side isn't a multiple of 4, as halves of 28 pixels have it."""

import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 4
"""What backbones need the sides of their images to be a multiple of."""


class Padded(nn.Module):
    """A backbone whose input is padded to the next multiple of 4 by repeating its border, and whose output is cropped.

    The border is repeated, rather than followed by zeros, since zero is no neutral grey in a hint.
    """

    def __init__(self, backbone: nn.Module, image_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_size = image_size
        missing = -image_size % MULTIPLE
        self.before, self.after = missing // 2, missing - missing // 2

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        """As the backbone, for x float32 [N, in_channels, image_size, image_size]."""
        inside = slice(self.before, self.before + self.image_size)
        padding = (self.before, self.after, self.before, self.after)
        out: Tensor = self.backbone(F.pad(x, padding, mode="replicate"), c_noise, labels)
        return out[:, :, inside, inside]
