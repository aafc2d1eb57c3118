"""Per-example gradients with noise multiplicity folded in.

A step over B images with K draws each has B*K rows, rows of one image adjacent. What DP-SGD clips is the gradient of the
image's loss averaged over its K draws, so the K rows are contracted over while the gradient is formed: memory is
B x parameters, never B*K x parameters. Forward hooks keep each layer's input, tensor hooks catch the gradient of its output;
the weights themselves require no gradient meanwhile, so autograd spends nothing on dense weight gradients.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsyngen.errors import InputError
from dpsyngen.privacy.secure_noise import EXACT_ROWS

# Entries whose squares are summed in float32: at worst SEGMENT additions, each wrong by 2^-24, make the norm wrong by 2^-15.
SEGMENT = 1024
# How far below C contributions are scaled, so that the rounding of norm, factor and product can't lift them above it.
MARGIN = 1e-4

# Float32 elements (1 MiB) that are converted and used again before they leave a core's cache.
_CACHED_ELEMENTS = 2**18
# Patch elements that are gathered and multiplied at a time on a CPU, so that they needn't come back from memory.
_CACHED_PATCHES = 2**23

# Convolutions on a CPU whose maps are large enough per example: the library's dense kernel, called once per example, beats a batched
# product over patches, since it never writes these; but a call has a fixed cost, and one for each weight. Measured on maps of 7 to 28
# pixels, 48 to 128 channels, K from 1 to 32.
_PATCH_ELEMENTS_FOR_A_KERNEL_CALL = 10**6
_POSITIONS_PER_CHANNEL_FOR_A_KERNEL_CALL = 40
# A Linear's gradient stays a sum of outer products where those take at most this fraction of the matrix's memory, as in layers that
# see one vector per row (embeddings of sigma and class, modulations) while K is small.
_OUTER_PRODUCTS_SAVE = 4


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
        that cancel, so that the bound holds for what `weighted_sum` adds up.
        """
        left, right = self.left.double(), self.right.double()
        inner = torch.bmm(left, left.transpose(1, 2)) * torch.bmm(right, right.transpose(1, 2))
        terms = (left.norm(dim=2) * right.norm(dim=2)).sum(dim=1)
        return inner.sum(dim=(1, 2)).clamp(min=0).sqrt() + 2**-20 * terms

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The sum over b of weights[b] times the matrix of b, float32 [out, in]."""
        return (self.left * weights[:, None, None]).flatten(0, 1).t() @ self.right.flatten(0, 1)

    def matrices(self) -> Tensor:
        """Float32 [B, out, in]."""
        return torch.bmm(self.left.transpose(1, 2), self.right)


# A rule maps (layer, input rows, gradient of the output rows, B) to {parameter name: per-example gradients [B, *shape]}.
Gradients = Tensor | OuterProducts
Rule = Callable[[nn.Module, Tensor, Tensor, int], Mapping[str, Gradients]]


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
    weight = _conv2d_by_kernel if large and not g.is_cuda else _conv2d_by_patches
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
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    rows, channels_out, height, width = g.shape
    groups, channels_in = layer.groups, layer.in_channels // layer.groups
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph)).contiguous()
    image, line, pixel = padded.stride()[:3]
    shape = (rows, height, width, groups, kh, kw, channels_in)
    patches = padded.as_strided(shape, (image, sh * line, sw * pixel, channels_in, dh * line, dw * pixel, 1)).unflatten(0, (examples, -1))
    g_flat = g.permute(0, 2, 3, 1).reshape(examples, -1, groups, channels_out // groups).permute(0, 2, 3, 1)
    products = torch.empty(examples, groups, channels_out // groups, kh * kw * channels_in, dtype=x.dtype, device=x.device)
    together = max(1, _CACHED_PATCHES * (64 if g.is_cuda else 1) // patches[0].numel())
    for start in range(0, examples, together):
        block = slice(start, start + together)
        gathered = patches[block].reshape(-1, g_flat.shape[3], groups, kh * kw * channels_in).transpose(1, 2)
        torch.bmm(g_flat[block].flatten(0, 1), gathered.flatten(0, 1), out=products[block].flatten(0, 1))
    return products.view(examples, channels_out, kh, kw, channels_in).permute(0, 1, 4, 2, 3)


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
}  # type: ignore[assignment]


def layers_with_parameters(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that own trainable parameters, by name; InputError names one that has no rule here.

    A subclass of a known layer may compute something else, so only the exact types count.
    """
    layers = {}
    for name, layer in module.named_modules():
        if any(p.requires_grad for p in layer.parameters(recurse=False)):
            if type(layer) not in RULES:
                known = ", ".join(kind.__name__ for kind in RULES)
                raise InputError(f"network: layer {name!r} of type {type(layer).__name__} has no per-example gradient; expected one of {known}")
            layers[name] = layer
    return layers


class PerExampleGradients:
    """The gradients of B examples: parameter name -> [B, *parameter shape], in float32 or the layer's bf16, or outer products."""

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.gradients: dict[str, Gradients] = {}

    def add(self, name: str, gradient: Gradients) -> None:
        """Gather a contribution to a parameter; a layer that is called twice contributes twice."""
        if name in self.gradients:
            gradient = self.tensor(name).float() + (gradient.matrices() if isinstance(gradient, OuterProducts) else gradient.float())
        self.gradients[name] = gradient

    def tensor(self, name: str) -> Tensor:
        """One parameter's gradients, [B, *parameter shape]."""
        gradient = self.gradients[name]
        return gradient.matrices() if isinstance(gradient, OuterProducts) else gradient

    def norms(self) -> Tensor:
        """The L2 norm of each example's whole gradient, float64 [B], measured on the very values that `clipped_sum` adds up.

        Squares are summed in float32 over at most SEGMENT entries and in float64 beyond, so it is too small by a relative MARGIN / 2 at
        most; where a layer computes in bf16 it may be too large by 0.8 %.
        """
        return torch.linalg.vector_norm(torch.stack([_norms(gradient) for gradient in self.gradients.values()]), dim=0)

    def clipped_sum(self, clipping_norm: float) -> dict[str, Tensor]:
        """The sum over examples of each gradient scaled to a norm of at most `clipping_norm`, float32.

        An example whose gradient isn't finite contributes zero. Scaling and summing are float32 whatever precision the
        gradient was computed in; the bound holds for the rounded values, since it is their norm that was measured.
        """
        scale, finite = self._scale(clipping_norm)
        keep = None if bool(finite.all()) else finite
        return {name: _weighted_sum(gradient, scale.float(), keep) for name, gradient in self.gradients.items()}

    def truncated_sum(self, clipping_norm: float, unit: float, examples: int) -> dict[str, Tensor]:
        """The exact sum over the first `examples` of each clipped gradient in multiples of `unit`, truncated toward zero: integers in float64.

        Truncation makes no coordinate longer, so a contribution's norm stays at most `clipping_norm` / `unit`, which must be 2^20 at most:
        EXACT_ROWS of them sum to at most 2^24 in float32 and 2^33 to less than 2^53 in float64, so no order of summation changes a bit.
        """
        scale, finite = self._scale(clipping_norm)
        used = torch.arange(len(scale), device=scale.device) < examples
        factors, keep = torch.where(used, scale / unit, 0.0), None if bool(finite.all()) else finite
        return {name: _truncated_sum(gradient, factors, keep) for name, gradient in self.gradients.items()}

    def _scale(self, clipping_norm: float) -> tuple[Tensor, Tensor]:
        """What each example's gradient is scaled by, float64 [B], and whether it is finite, bool [B]: if not, the scale is zero."""
        norms = self.norms()
        finite = torch.isfinite(norms)
        return torch.where(finite, torch.clamp(clipping_norm * (1 - MARGIN) / norms.clamp(min=1e-30), max=1.0), 0.0), finite


def _norms(gradient: Gradients) -> Tensor:
    """Each example's L2 norm, float64 [B]."""
    if isinstance(gradient, OuterProducts):
        return gradient.norms()
    return _row_norms(_in_memory_order(gradient)[0].flatten(start_dim=1))


def _weighted_sum(gradient: Gradients, weights: Tensor, keep: Tensor | None) -> Tensor:
    """The sum over b of weights[b] times the gradient of b, float32 [*parameter shape], of those that bool [B] `keep` says, or all."""
    if isinstance(gradient, OuterProducts):
        if keep is not None:
            gradient = OuterProducts(*(torch.where(keep[:, None, None], factor, 0) for factor in (gradient.left, gradient.right)))
        return gradient.weighted_sum(weights)
    ordered, back = _in_memory_order(gradient)
    flat = ordered.flatten(start_dim=1)
    flat = flat if keep is None else torch.where(keep[:, None], flat, 0)
    total = torch.zeros(flat.shape[1], device=flat.device)
    for start, block in _float_blocks(flat):
        total.addmv_(block.t(), weights[start : start + len(block)])
    return total.view(ordered.shape[1:]).permute(back)


def _truncated_sum(gradient: Gradients, factors: Tensor, keep: Tensor | None) -> Tensor:
    """The sum over b of factors[b] times the gradient of b, truncated toward zero: integers in float64 [*parameter shape]; `keep` as above.

    Products are formed in float32; matrices from outer products, whose terms may cancel, in float64.
    """
    if isinstance(gradient, OuterProducts):
        rows, shape = gradient.left.shape[0], (gradient.left.shape[2], gradient.right.shape[2])
        back: tuple[int, ...] = (0, 1)
    else:
        gradient, back = _in_memory_order(gradient)
        rows, shape = gradient.shape[0], gradient.shape[1:]
    total = torch.zeros(shape, dtype=torch.float64, device=factors.device)
    for start in range(0, rows, EXACT_ROWS):
        part = slice(start, start + EXACT_ROWS)
        if isinstance(gradient, OuterProducts):
            block = torch.bmm(gradient.left[part].double().transpose(1, 2), gradient.right[part].double())
        else:
            block = gradient[part].float()
        column = (-1, *(1 for _ in shape))
        block = block * factors[part].to(block.dtype).view(column)
        block = block if keep is None else torch.where(keep[part].view(column), block, 0)
        total += block.trunc_().sum(dim=0)
    return total.permute(back)


def _float_blocks(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    """[B, n] in float32, a few rows at a time with their first index: a float copy of all of it would not fit in a CPU's cache."""
    rows = len(flat) if flat.dtype == torch.float32 or flat.is_cuda else max(1, _CACHED_ELEMENTS // max(1, flat.shape[1]))
    for start in range(0, len(flat), max(1, rows)):
        yield start, flat[start : start + rows].float()


def _row_norms(flat: Tensor) -> Tensor:
    """The L2 norm of each row of [B, n], float64 [B]; for bf16 an upper bound.

    torch squares and adds bf16 in float32 too, several times faster than after a conversion, but rounds each segment's norm to bf16.
    """
    whole = flat.shape[1] // SEGMENT * SEGMENT
    segments = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, SEGMENT)), dim=2)
    rest = torch.linalg.vector_norm(flat[:, whole:], dim=1, keepdim=True)
    norms = torch.linalg.vector_norm(torch.cat([segments, rest], dim=1).double(), dim=1)
    return norms * (1 + 2**-8) if flat.dtype == torch.bfloat16 else norms


def _in_memory_order(gradient: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """[B, ...] with the later axes sorted as they lie in memory, so that flattening copies nothing, and how to sort them back."""
    order = sorted(range(1, gradient.dim()), key=lambda axis: -gradient.stride(axis))
    return gradient.permute(0, *order), tuple(order.index(axis) for axis in range(1, gradient.dim()))


@contextmanager
def recording(module: nn.Module, examples: int, copies: int) -> Iterator[PerExampleGradients]:
    """While open, a forward pass of `module` followed by backward() of the examples' summed losses fills the record.

    The rows of an example are adjacent, `copies` to each; its loss is the mean over them. Weights get no `.grad`.

    Raises InputError for a layer without a rule, for a parameter that two layers share, and for a layer whose input or output
    doesn't have one entry per row along its first axis, since nobody could then say whose gradient is whose.
    """
    layers = layers_with_parameters(module)
    names: dict[nn.Parameter, str] = {}
    for name, layer in layers.items():
        for own, parameter in layer.named_parameters(name, recurse=False):
            if parameter in names:
                raise InputError(f"network: {own} is the same parameter as {names[parameter]}; tied weights are not supported")
            names[parameter] = own
    trained = [parameter for parameter in names if parameter.requires_grad]
    wanted = {names[parameter] for parameter in trained}
    record = PerExampleGradients(examples)

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def forward_hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen, expected = len(inputs[0]), examples * copies
            if seen != expected or len(output) != expected:
                raise InputError(f"network: layer {name!r} sees {seen} rows where the batch has {expected}; can't tell the examples apart")
            if not output.requires_grad:  # nothing before this layer depends on a trained weight
                output.requires_grad_()
            kept = [inputs[0].detach()]

            def backward_hook(g: Tensor) -> None:
                x = kept.pop()  # or the input would live as long as the graph
                with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
                    rows = x.to(g.dtype) if x.is_floating_point() else x
                    for own, gradient in RULES[type(layer)](layer, rows, g, examples).items():
                        full = f"{name}.{own}" if name else own
                        if full in wanted:
                            record.add(full, gradient)

            output.register_hook(backward_hook)
            return output

        return forward_hook

    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
