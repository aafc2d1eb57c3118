"""Per-example gradients with noise multiplicity folded in.

A step over B images with K draws each has B*K rows, rows of one image adjacent. What DP-SGD clips is the gradient of the
image's loss averaged over its K draws, so the K rows are contracted over while the gradient is formed: memory is
B x parameters, never B*K x parameters. Forward hooks keep each layer's input, tensor hooks catch the gradient of its output;
the weights themselves require no gradient meanwhile, so autograd spends nothing on dense weight gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dpsyngen.errors import InputError
from dpsyngen.privacy.layer_gradients import RULES, Gradients, OuterProducts
from dpsyngen.privacy.secure_noise import EXACT_ROWS

# Entries whose squares are summed in float32: at worst SEGMENT additions, each wrong by 2^-24, make the norm wrong by 2^-15.
SEGMENT = 1024
# How far below C contributions are scaled, so that the rounding of norm, factor and product can't lift them above it.
MARGIN = 1e-4

# Float32 elements (1 MiB) that are converted and used again before they leave a core's cache.
_CACHED_ELEMENTS = 2**18


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

    def clipped_sum(self, clipping_norm: float, stability: float | None = None) -> dict[str, Tensor]:
        """The sum over examples of each gradient scaled to a norm of at most `clipping_norm` C, float32.

        A gradient g longer than C is scaled to C; with a `stability` gamma each is scaled to g C / (||g|| + gamma), which is shorter than C
        (AUTO-S; Bu et al., arXiv 2206.07136, equation 3.2).

        An example whose gradient isn't finite contributes zero. Scaling and summing are float32 whatever precision the
        gradient was computed in; the bound holds for the rounded values, since it is their norm that was measured.
        """
        scale, finite = self._scale(clipping_norm, stability)
        keep = None if bool(finite.all()) else finite
        return {name: _weighted_sum(gradient, scale.float(), keep) for name, gradient in self.gradients.items()}

    def truncated_sum(self, clipping_norm: float, unit: float, examples: int, stability: float | None = None) -> dict[str, Tensor]:
        """The exact sum over the first `examples` of each clipped gradient in multiples of `unit`, truncated toward zero: integers in float64.

        Truncation makes no coordinate longer, so a contribution's norm stays at most `clipping_norm` / `unit`, which must be 2^20 at most:
        EXACT_ROWS of them sum to at most 2^24 in float32 and 2^33 to less than 2^53 in float64, so no order of summation changes a bit.
        """
        scale, finite = self._scale(clipping_norm, stability)
        used = torch.arange(len(scale), device=scale.device) < examples
        factors, keep = torch.where(used, scale / unit, 0.0), None if bool(finite.all()) else finite
        return {name: _truncated_sum(gradient, factors, keep) for name, gradient in self.gradients.items()}

    def _scale(self, clipping_norm: float, stability: float | None) -> tuple[Tensor, Tensor]:
        """What each example's gradient is scaled by, float64 [B], and whether it is finite, bool [B]: if not, the scale is zero.

        Squares of entries below 2^-63 may vanish from a norm. What that hides is far shorter than any `stability`, so it stays short.
        """
        norms, limit = self.norms(), clipping_norm * (1 - MARGIN)
        finite = torch.isfinite(norms)
        scale = torch.clamp(limit / norms.clamp(min=1e-30), max=1.0) if stability is None else limit / (norms + stability)
        return torch.where(finite, scale, 0.0), finite


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
        rows, shape = gradient.left.shape[0], torch.Size((gradient.left.shape[2], gradient.right.shape[2]))
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
    order = sorted(range(1, gradient.dim()), key=gradient.stride, reverse=True)
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
