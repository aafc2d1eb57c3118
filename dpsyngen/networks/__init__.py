"""DP-safe backbones, one a file, behind one interface.

A backbone is built with keyword arguments in_channels, out_channels, image_size, num_labels, width, depth and maps
(x float32 [N, in_channels, H, W], c_noise float32 [N], labels int64 [N]) to float32 [N, out_channels, H, W], H and W being multiples of 4.
"""

from torch import nn

from dpsyngen.config import NetworkConfig
from dpsyngen.networks.lean import LeanNet
from dpsyngen.networks.padded import MULTIPLE, Padded
from dpsyngen.networks.unet import UNet


def build_backbone(config: NetworkConfig, *, in_channels: int, out_channels: int, image_size: int, num_labels: int) -> nn.Module:
    """The backbone that the config names, freshly initialised from torch's global generator; padded where image_size is no multiple of 4."""
    padded_size = -(-image_size // MULTIPLE) * MULTIPLE
    backbone = {"lean": LeanNet, "unet": UNet}[config.backbone]
    network = backbone(
        in_channels=in_channels,
        out_channels=out_channels,
        image_size=padded_size,
        num_labels=num_labels,
        width=config.width,
        depth=config.depth,
    )
    return network if padded_size == image_size else Padded(network, image_size)
