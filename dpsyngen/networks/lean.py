"""A backbone for small machines: two levels at half and quarter resolution, few pointwise passes, wide products.

Most of a small U-Net's time on a CPU goes into full-resolution layers of few channels, which move memory rather than
multiply. Here the image enters by space-to-depth, so that every convolution has `width` channels or more.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _norm(channels: int) -> nn.GroupNorm:
    """Groups of 16 channels: torch's CPU kernel for bf16 is ten times slower with groups that don't fill a vector."""
    return nn.GroupNorm(max(1, channels // 16) if channels % 16 == 0 else 1, channels)


class ResidualBlock(nn.Module):
    """One GroupNorm modulated by the embedding (AdaGN; Dhariwal and Nichol, section 3.1), then two convolutions.

    There is no second norm between the convolutions: on a CPU norms are among the slowest layers of a net this small.
    """

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm(x), 1 + scale)
        return x + self.conv_out(F.silu(self.conv_in(F.silu(h))))


class Attention(nn.Module):
    """Self-attention over the positions of the coarse level, one head for every 32 channels or a few more, with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(heads for heads in range(1, max(1, channels // 32) + 1) if channels % heads == 0)
        self.norm = _norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n, h * w, c)
        q, k, v = self.qkv(tokens).reshape(n, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        # 49 tokens: plain products beat scaled_dot_product_attention's CPU kernels, in bf16 by a factor of four
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        attended = (weights @ v).transpose(1, 2).reshape(n, h * w, c)
        return x + self.project(attended).reshape(n, h, w, c).permute(0, 3, 1, 2)


class LeanNet(nn.Module):
    """Backbone interface: forward(x [N, in_channels, H, W], c_noise [N], labels int64 [N]) -> [N, out_channels, H, W].

    H and W are multiples of 4. `num_labels` counts the null label of classifier-free guidance.
    """

    def __init__(self, *, in_channels: int, out_channels: int, image_size: int, num_labels: int, width: int, depth: int) -> None:
        super().__init__()
        if image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, got {image_size}")
        embedding = 2 * width
        frequencies = torch.exp(torch.linspace(0, math.log(64), width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.noise_embedding = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label_embedding = nn.Embedding(num_labels, embedding)
        nn.init.zeros_(self.label_embedding.weight)
        self.stem = nn.Conv2d(4 * in_channels, width, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(width, embedding) for _ in range(depth))
        self.to_coarse = nn.Conv2d(4 * width, 2 * width, 1)
        self.coarse_in = nn.ModuleList(ResidualBlock(2 * width, embedding) for _ in range(depth))
        self.attention = Attention(2 * width)
        self.coarse_out = nn.ModuleList(ResidualBlock(2 * width, embedding) for _ in range(depth))
        self.to_fine = nn.Conv2d(2 * width, 4 * width, 1)
        self.up = nn.ModuleList(ResidualBlock(width, embedding) for _ in range(depth))
        self.head_norm = _norm(width)
        self.head = nn.Conv2d(width, 4 * out_channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        angles = c_noise[:, None] * self.frequencies
        embedding = self.noise_embedding(torch.cat([angles.cos(), angles.sin()], dim=1))
        embedding = F.silu(embedding + self.label_embedding(labels))
        h = self.stem(F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last))
        for block in self.down:
            h = block(h, embedding)
        skip = h
        h = self.to_coarse(F.pixel_unshuffle(h, 2).contiguous(memory_format=torch.channels_last))
        for block in self.coarse_in:
            h = block(h, embedding)
        h = self.attention(h)
        for block in self.coarse_out:
            h = block(h, embedding)
        h = skip + F.pixel_shuffle(self.to_fine(h), 2).contiguous(memory_format=torch.channels_last)
        for block in self.up:
            h = block(h, embedding)
        return F.pixel_shuffle(self.head(F.silu(self.head_norm(h))), 2)
