"""The time of each layer's per-example rule against that of its ordinary weight gradient, which is what limits it."""

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from competitors import Ordinary, Problem
from rich import box
from rich.table import Table
from torch import Tensor, nn

from dpsyngen.privacy.per_example import layers_with_parameters, recording

Call = tuple[nn.Module, Tensor, Tensor]  # a layer, its input and the gradient of its output


def calls_in(problem: Problem) -> dict[str, list[Call]]:
    """What every layer sees in a step, grouped by kind of layer and shape of input."""
    denoiser = copy.deepcopy(problem.denoiser)
    calls: dict[str, list[Call]] = defaultdict(list)

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        output.register_hook(lambda g: calls[f"{layer} on {list(x.shape[1:])}"].append((layer, x, g.clone())))

    handles = [layer.register_forward_hook(keep) for layer in layers_with_parameters(denoiser).values()]
    problem.row_losses(denoiser).sum().backward()
    for handle in handles:
        handle.remove()
    return calls


def times(problem: Problem, call: Call, repeats: int) -> tuple[float, float, float]:
    """Seconds of the ordinary weight gradient, of the per-example gradients, and of their clipping and summing.

    A GroupNorm's ordinary gradient includes that of its input: torch's CPU kernel crashes on channels-last rows without.
    """
    layer, x, g = call
    wanted = list(layer.parameters())
    if isinstance(layer, nn.GroupNorm):
        x = x.detach().requires_grad_()
        wanted.append(x)
    with problem.compute.autocast():
        ordinary = layer(x)
    found = []
    for repeat in range(-1, repeats):
        dense = _seconds(lambda: torch.autograd.grad(ordinary, wanted, g, retain_graph=True), x)
        with recording(layer, problem.examples, problem.copies) as record:
            with problem.compute.autocast():
                output = layer(x.detach())
            rule = _seconds(lambda output=output: torch.autograd.grad(output.view_as(output), output, g), x)
        clip = _seconds(lambda record=record: record.clipped_sum(problem.clipping_norm), x)
        found += [(dense, rule, clip)] if repeat >= 0 else []
    dense, rule, clip = (statistics.median(column) for column in zip(*found, strict=True))
    return dense, rule, clip


def _seconds(call: Callable[[], Any], x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def layer_table(problem: Problem, title: str, repeats: int, markdown: bool) -> Table:
    """One row a kind of layer, the costliest first; times are of all layers of the kind together, the sum over kinds last."""
    ordinary = Ordinary(problem)
    ordinary.step()
    step = statistics.median(_seconds(ordinary.step, problem.images) for _ in range(repeats))
    rows = []
    for kind, calls in calls_in(problem).items():
        dense, rule, clip = (len(calls) * seconds for seconds in times(problem, calls[0], repeats))
        rows.append((kind, len(calls), dense, rule, clip))
    rows.sort(key=lambda row: row[2] - row[3])
    rows.append(("all", sum(row[1] for row in rows), *(sum(row[i] for row in rows) for i in (2, 3, 4))))
    made = Table(
        title=f"{title}: the ordinary step takes {1e3 * step:.1f} ms", title_justify="left", box=box.MARKDOWN if markdown else box.HEAVY_HEAD
    )
    for heading in ("layer", "how many", "weight gradient, ms", "per example, ms", "ratio", "clip and sum, ms"):
        made.add_column(heading, justify="left" if heading == "layer" else "right")
    for kind, count, dense, rule, clip in rows:
        made.add_row(kind, str(count), f"{1e3 * dense:.2f}", f"{1e3 * rule:.2f}", f"{rule / dense:.2f}", f"{1e3 * clip:.2f}")
    return made
