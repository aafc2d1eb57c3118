"""diffusers' UNet2DModel in the size that DPDM uses, behind the interface that backbones share."""

from typing import cast

from torch import Tensor, nn

from dpsyngen.networks.torchvision_compat import mend_torchvision


class UNet(nn.Module):
    """A convolutional U-Net with self-attention at its coarsest level and in the middle.

    With the default width and depth it is the network of DPDM (Dockhorn et al., arXiv 2210.09929, and its published
    configurations), as near as diffusers' UNet2DModel comes: 32 channels times (1, 2, 2), or (1, 1, 2, 2) from 64 pixels on,
    two residual blocks per level, down- and upsampling inside residual blocks, one attention head; 1.67 M parameters at
    28 x 28 in grayscale, where theirs has 1.75 M. As there, each residual branch and the network itself end in a layer that
    starts at zero.

    No layer mixes examples, and every parameter belongs to a Conv2d, Linear, GroupNorm or Embedding that is called once.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        image_size: int,
        num_labels: int,
        width: int = 32,
        depth: int = 2,
    ) -> None:
        """Build the network with fresh weights from torch's global generator.

        Args:
            in_channels: Channels of x, hints included.
            out_channels: Channels of the result.
            image_size: Height and width, a multiple of 4.
            num_labels: Label embeddings, the null label included; >= 1.
            width: Channels of the finest level, a multiple of 8.
            depth: Residual blocks per level on the way down; one more on the way up.
        """
        super().__init__()
        mend_torchvision()  # diffusers imports it on the way
        from diffusers import UNet2DModel  # here, since it takes seconds that users of other backbones need not spend

        multipliers = (1, 1, 2, 2) if image_size >= 64 and image_size % 8 == 0 else (1, 2, 2)
        finer = len(multipliers) - 1
        model = UNet2DModel(
            sample_size=image_size,
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=tuple(width * multiplier for multiplier in multipliers),
            layers_per_block=depth,
            down_block_types=("DownBlock2D",) * finer + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * finer,
            downsample_type="resnet",
            upsample_type="resnet",
            attention_head_dim=None,  # one head
            norm_num_groups=width // 4,
            num_class_embeds=num_labels,
        )
        self.model = cast(nn.Module, model)  # diffusers' own annotations hide what it is
        for name, module in self.model.named_modules():
            if name.endswith(("conv2", "to_out.0", "conv_out")):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        """x float32 [N, in_channels, H, W], c_noise float32 [N], labels int64 [N] in [0, num_labels) -> [N, out_channels, H, W]."""
        out: Tensor = self.model(x, c_noise, class_labels=labels, return_dict=False)[0]
        return out
