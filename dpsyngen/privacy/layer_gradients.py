"""Each layer's per-example gradients, from its input and the gradient of its output.

The K rows of an example are contracted over while its gradient is formed. Of several ways to the same gradient each rule takes the one
that was fastest for the sizes at hand; `python benchmarks/private_step.py --layers` shows what they cost.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsyngen.errors import InputError

# Patch elements that are gathered and multiplied at a time on a CPU; 64 times as many elsewhere.
_CACHED_PATCHES = 2**23

# Convolutions on a CPU whose maps are large enough per example: the library's dense kernel, called once per example, beats a batched
# product over patches, since it never writes these; but a call has a fixed cost, and one for each weight. Measured on maps of 7 to 28
# pixels, 48 to 128 channels, K from 1 to 32.
_PATCH_ELEMENTS_FOR_A_KERNEL_CALL = 10**6
_POSITIONS_PER_CHANNEL_FOR_A_KERNEL_CALL = 40
# At most this many positions per example: then bf16 patches gathered positions last are faster, though that layout wastes the padding.
_POSITIONS_FOR_LINES = 256
# A Linear's gradient stays a sum of outer products where those take at most this fraction of the matrix's memory, as in layers that
# see one vector per row (embeddings of sigma and class, modulations) while K is small.
_OUTER_PRODUCTS_SAVE = 4
# Outer products of a longer vector count as not finite, so that no product of scale and vector can overflow float32 or lose its bits.
_LONGEST_VECTOR = 1e14


@dataclass(frozen=True)
class OuterProducts:
    """Per-example gradients [B, out, in] that are sums of few outer products and are kept as these: sum over t of left[b, t] right[b, t]^T.

    Neither their norms nor their clipped sum need the matrices ("ghost clipping"; Li et al., arXiv 2110.05679, section 4).
    """

    left: Tensor
    """Float32 [B, T, out]."""
    right: Tensor
    """Float32 [B, T, in]."""

    def norms(self) -> Tensor:
        """An upper bound on each matrix's L2 norm, float64 [B], too large by a relative 2^-20 at most unless the T terms cancel.

        The norm from the terms' inner products is exact to float64; added is what float32 can lose in scaling and multiplying terms
        that cancel, so that the bound holds for what `weighted_sum` adds up. Infinite where vectors are too long to be scaled in float32.
        """
        left, right = self.left.double(), self.right.double()
        inner = torch.bmm(left, left.transpose(1, 2)) * torch.bmm(right, right.transpose(1, 2))
        lengths = torch.stack([left.norm(dim=2), right.norm(dim=2)])
        norms = inner.sum(dim=(1, 2)).clamp(min=0).sqrt() + 2**-20 * lengths.prod(dim=0).sum(dim=1)
        return norms.masked_fill((lengths > _LONGEST_VECTOR).any(dim=2).any(dim=0), torch.inf)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The sum over b of weights[b] times the matrix of b, float32 [out, in]."""
        return (self.left * weights[:, None, None]).flatten(0, 1).t() @ self.right.flatten(0, 1)

    def matrices(self) -> Tensor:
        """Float32 [B, out, in]."""
        return torch.bmm(self.left.transpose(1, 2), self.right)


# A rule maps (layer, input rows, gradient of the output rows, B) to {parameter name: per-example gradients [B, *shape]}.
Gradients = Tensor | OuterProducts
Rule = Callable[[Any, Tensor, Tensor, int], Mapping[str, Gradients]]


def _linear(layer: nn.Linear, x: Tensor, g: Tensor, examples: int) -> dict[str, Gradients]:
    x, g = x.reshape(examples, -1, x.shape[-1]), g.reshape(examples, -1, g.shape[-1])
    few = x.shape[1] * (layer.in_features + layer.out_features) <= layer.in_features * layer.out_features / _OUTER_PRODUCTS_SAVE
    weight = OuterProducts(g.float(), x.float()) if few else torch.bmm(g.transpose(1, 2), x)
    return {"weight": weight, "bias": g.sum(dim=1)}


def _conv2d(layer: nn.Conv2d, x: Tensor, g: Tensor, examples: int) -> dict[str, Tensor]:
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise InputError(f"network: {type(layer).__name__} with padding {layer.padding!r} ({layer.padding_mode}) has no per-example gradient")
    positions = g.numel() // (examples * g.shape[1])
    large = (
        positions >= _POSITIONS_PER_CHANNEL_FOR_A_KERNEL_CALL * layer.out_channels
        and positions * layer.weight[0].numel() >= _PATCH_ELEMENTS_FOR_A_KERNEL_CALL
    )
    small = g.dtype == torch.bfloat16 and positions <= _POSITIONS_FOR_LINES and layer.stride == (1, 1) and layer.groups == 1
    weight = _conv2d_by_patches
    if g.device.type == "cpu" and (large or small):
        weight = _conv2d_by_kernel if large else _conv2d_by_lines
    return {"weight": weight(layer, x, g, examples), "bias": _sum_per_channel(g, examples)}


def _conv2d_by_kernel(layer: nn.Conv2d, x: Tensor, g: Tensor, examples: int) -> Tensor:
    """The library's dense weight gradient once per example: no patches are written, but each call must have enough to do."""
    rows = len(x) // examples
    weight = torch.empty_like(layer.weight, dtype=x.dtype)
    return torch.stack(
        [
            torch.ops.aten.convolution_backward(
                g[i : i + rows], x[i : i + rows], weight, None,
                layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups, (False, True, False),
            )[1]
            for i in range(0, len(x), rows)
        ]
    )  # fmt: skip


def _conv2d_by_patches(layer: nn.Conv2d, x: Tensor, g: Tensor, examples: int) -> Tensor:
    """Batched products over patches, gathered channels last: a kernel's row of them lies in one piece, so the copy runs at memory speed."""
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = layer.kernel_size, layer.stride, layer.dilation, cast(tuple[int, int], layer.padding)
    rows, channels_out, height, width = g.shape
    groups, channels_in = layer.groups, layer.in_channels // layer.groups
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph)).contiguous()
    image, line, pixel = padded.stride()[:3]
    shape = (rows, height, width, groups, kh, kw, channels_in)
    patches = padded.as_strided(shape, (image, sh * line, sw * pixel, channels_in, dh * line, dw * pixel, 1)).unflatten(0, (examples, -1))
    g_flat = g.permute(0, 2, 3, 1).reshape(examples, -1, groups, channels_out // groups).permute(0, 2, 3, 1)
    products = torch.empty(examples, groups, channels_out // groups, kh * kw * channels_in, dtype=x.dtype, device=x.device)
    together = max(1, _CACHED_PATCHES * (1 if g.device.type == "cpu" else 64) // patches[0].numel())
    for start in range(0, examples, together):
        block = slice(start, start + together)
        gathered = patches[block].reshape(-1, g_flat.shape[3], groups, kh * kw * channels_in).transpose(1, 2)
        torch.bmm(g_flat[block].flatten(0, 1), gathered.flatten(0, 1), out=products[block].flatten(0, 1))
    return products.view(examples, channels_out, kh, kw, channels_in).permute(0, 1, 4, 2, 3)


def _conv2d_by_lines(layer: nn.Conv2d, x: Tensor, g: Tensor, examples: int) -> Tensor:
    """One batched product over patches, gathered positions last; stride 1 and one group only.

    With the gradient laid out on the padded map, zero outside, an entry of the kernel sees all positions of a channel as one line of
    the padded input, so lines are copied whole; and bf16 products run twice as fast with positions last.
    """
    (kh, kw), (dh, dw), (ph, pw) = layer.kernel_size, layer.dilation, cast(tuple[int, int], layer.padding)
    rows, channels_in, height, width = x.shape
    height, width, copies = height + 2 * ph, width + 2 * pw, rows // examples
    length = copies * height * width
    line = torch.zeros(examples, channels_in, copies, height, width, dtype=x.dtype)
    line[..., ph : height - ph, pw : width - pw] = x.unflatten(0, (examples, copies)).transpose(1, 2)
    g_line = F.pad(g.permute(0, 2, 3, 1), (0, 0, 0, width - g.shape[3], 0, height - g.shape[2])).reshape(examples, length, -1)
    positions = length - (kh - 1) * dh * width - (kw - 1) * dw
    shape, stride = (examples, kh, kw, channels_in, positions), (channels_in * length, dh * width, dw, length, 1)
    patches = line.as_strided(shape, stride).reshape(examples, -1, positions)
    product = torch.bmm(patches, g_line[:, :positions])
    return product.view(examples, kh, kw, channels_in, -1).permute(0, 4, 3, 1, 2)


def _group_norm(layer: nn.GroupNorm, x: Tensor, g: Tensor, examples: int) -> dict[str, Tensor]:
    normalised = F.group_norm(x, layer.num_groups, eps=layer.eps)
    return {"weight": _sum_per_channel(g * normalised, examples), "bias": _sum_per_channel(g, examples)}


def _sum_per_channel(g: Tensor, examples: int) -> Tensor:
    """[N, C, ...] -> [B, C]; torch adds in float32 and rounds the result once."""
    return g.unflatten(0, (examples, -1)).sum(dim=(1, *range(3, g.dim() + 1)))


def _layer_norm(layer: nn.LayerNorm, x: Tensor, g: Tensor, examples: int) -> dict[str, Tensor]:
    normalised = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    shape = (examples, -1, *layer.normalized_shape)
    return {"weight": (g * normalised).reshape(shape).sum(dim=1), "bias": g.reshape(shape).sum(dim=1)}


def _embedding(layer: nn.Embedding, x: Tensor, g: Tensor, examples: int) -> dict[str, Tensor]:
    indices, g = x.reshape(examples, -1), g.reshape(examples, -1, g.shape[-1]).float()
    weight = torch.zeros(examples, *layer.weight.shape, device=g.device)
    weight.scatter_add_(1, indices[:, :, None].expand_as(g), g)
    if layer.padding_idx is not None:
        weight[:, layer.padding_idx] = 0
    return {"weight": weight}


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}
