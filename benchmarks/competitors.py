"""The ways to compute a private step that `private_step.py` compares: this package's, Opacus' three, torch.func's.

Each gets the same weights and the same rows, B examples of K rows, and ends with the same quantity: the sum over examples of the
gradient of the example's loss, averaged over its K rows, clipped to C. A method is two calls, `backward` and `clipped_sum`, so that
what is held between them, the per-example gradients, can be weighed.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from backbones import build
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping, register_grad_sampler
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.overrides import TorchFunctionMode

from dpsyngen.compute import Compute
from dpsyngen.config import HintsConfig, NetworkConfig, PrivacyConfig, PrivateConfig, RunConfig, StagesConfig
from dpsyngen.denoiser import Denoiser
from dpsyngen.errors import InputError
from dpsyngen.loss import Draws, denoising_loss, draw
from dpsyngen.noise_levels import stages
from dpsyngen.privacy.per_example import MARGIN, PerExampleGradients, recording
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.randomness import PrivateKey

Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """B examples of K adjacent rows, the network and the clipping norm. Images float32 [B K, 1, 28, 28] in [-1, 1]."""

    denoiser: Denoiser
    images: Tensor
    draws: Draws
    copies: int
    compute: Compute
    clipping_norm: float

    @classmethod
    def random(cls, network: NetworkConfig, rows: int, copies: int, compute: Compute, clipping_norm: float = 1.0) -> "Problem":
        """Random images, for speed doesn't depend on what they show, and weights moved off the zeros that some layers start at."""
        config, denoiser, generator = RunConfig(), build(network), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in denoiser.parameters():  # behind a layer of zeros every gradient would be zero
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
        rng, shape, examples = np.random.default_rng(0), config.data.image_shape, rows // copies
        images = torch.from_numpy(rng.uniform(-1, 1, (examples, *shape)).astype(np.float32)).repeat_interleave(copies, dim=0)
        labels = torch.from_numpy(rng.integers(config.data.num_classes, size=examples)).repeat_interleave(copies)
        (stage,) = stages(RunConfig(stages=StagesConfig(variant="nonprivate")))
        draws = draw(rng, stage.sigma_draw, labels, shape, label_dropout=0.1, null_label=denoiser.null_label)
        device = compute.device
        return cls(denoiser.to(device), images.to(device), draws.to(device), copies, compute, clipping_norm)

    @property
    def examples(self) -> int:
        """B."""
        return len(self.images) // self.copies

    def row_losses(self, denoiser: Denoiser) -> Tensor:
        """The loss of every row, float32 [B K]."""
        with self.compute.autocast():
            return denoising_loss(denoiser, self.images, self.draws)


class Method(ABC):
    """One way to a step, on its own copy of the network; raises what its library raises where it can't do it."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.denoiser = problem, copy.deepcopy(problem.denoiser)
        self.parameters = dict(self.denoiser.named_parameters())
        self.clipping_norm = problem.clipping_norm * (1 - MARGIN)  # as far below C as this package stays

    @abstractmethod
    def backward(self) -> Any:
        """Forward and backward pass; returns the per-example gradients in the form in which the method holds them."""

    @abstractmethod
    def clipped_sum(self, gradients: Any) -> Gradient:
        """The sum over examples of their clipped gradients, by parameter."""

    def step(self) -> Gradient:
        """Both in a row."""
        return self.clipped_sum(self.backward())

    def take_gradients(self) -> Gradient:
        """The `.grad` of every parameter, which is cleared."""
        taken = {name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None}
        for parameter in self.parameters.values():
            parameter.grad = None
        return taken


class Ordinary(Method):
    """Forward and backward of the mean loss over the same rows: what a private step would cost if privacy were free."""

    def backward(self) -> None:
        self.problem.row_losses(self.denoiser).mean().backward()

    def clipped_sum(self, gradients: None) -> Gradient:
        return self.take_gradients()


class Ours(Method):
    """`recording` and `PerExampleGradients.clipped_sum`, called as the private step calls them."""

    def backward(self) -> PerExampleGradients:
        problem = self.problem
        with recording(self.denoiser, problem.examples, problem.copies) as record:
            problem.row_losses(self.denoiser).view(-1, problem.copies).mean(dim=1).sum().backward()
        return record

    def clipped_sum(self, gradients: PerExampleGradients) -> Gradient:
        return gradients.clipped_sum(self.problem.clipping_norm)


class OursWithNoise(Ours):
    """A whole logical step of this package: the same, through the plan, and the noise."""

    secure = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        config = RunConfig(
            stages=StagesConfig(variant="dpdm"),
            hints=HintsConfig(kind="none"),
            private=PrivateConfig(batch_size=problem.examples, noise_multiplicity=problem.copies, steps=1, epochs=None),
            privacy=PrivacyConfig(clipping_norm=problem.clipping_norm, secure_noise=self.secure),
        )
        self.plan, self.key = PrivacyPlan.calibrate(config, expected_size=60_000), PrivateKey.fresh()

    def clipped_sum(self, gradients: PerExampleGradients) -> Gradient:
        return self.plan.privatise(self.plan.clip_and_sum(gradients, self.problem.examples), self.key, attempt=0, step=0)


class OursWithSecureNoise(OursWithNoise):
    """The same with `privacy.secure_noise`."""

    secure = True


@register_grad_sampler(nn.Conv2d)
def _conv_of_contiguous(layer: nn.Conv2d, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Opacus' rule on a contiguous copy: it takes strides for granted that channels-last activations, the lean network's, don't have.

    Without the copy Opacus 1.6 gives gradients that have nothing to do with the true ones, and no warning.
    """
    return compute_conv_grad_sample(layer, [activation.contiguous() for activation in activations], backprops)


class OpacusHooks(Method):
    """Opacus' grad samplers on B K rows, then the mean over K, as DPDM's version of Opacus does it, and Opacus' own clipping.

    DPDM takes that mean twice, for norms and for sums; once is enough, and the gradients of the rows are dropped as it is taken.
    """

    functorch = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.module = GradSampleModule(self.denoiser, loss_reduction="sum", force_functorch=self.functorch)
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.denoiser.parameters()), noise_multiplier=0.0, max_grad_norm=self.clipping_norm,
            expected_batch_size=problem.examples, loss_reduction="sum",
        )  # fmt: skip

    def backward(self) -> list[Tensor]:
        self.problem.row_losses(self.denoiser).sum().backward()
        return [parameter.grad_sample for parameter in self.parameters.values()]

    def clipped_sum(self, gradients: list[Tensor]) -> Gradient:
        gradients.clear()
        if self.problem.copies > 1:
            for parameter in self.parameters.values():
                parameter.grad_sample = parameter.grad_sample.unflatten(0, (-1, self.problem.copies)).mean(dim=1)
        self.optimizer.clip_and_accumulate()
        sums = {name: parameter.summed_grad for name, parameter in self.parameters.items()}
        self.optimizer.zero_grad(set_to_none=True)
        return sums


class OpacusFunctorch(OpacusHooks):
    """The same with torch.func in place of Opacus' hand-written grad samplers."""

    functorch = True


class OpacusGhost(Method):
    """Opacus' ghost clipping: norms in a first backward pass, a second one of the losses scaled by their clipping factors."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        if problem.copies > 1:
            raise InputError("it finds the norm of each row's gradient, not of the mean over an example's K rows")
        self.module = GradSampleModuleFastGradientClipping(self.denoiser, loss_reduction="sum", max_grad_norm=self.clipping_norm)
        self.optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(self.denoiser.parameters()), noise_multiplier=0.0, max_grad_norm=self.clipping_norm,
            expected_batch_size=problem.examples, loss_reduction="sum",
        )  # fmt: skip

    def backward(self) -> None:
        losses = self.problem.row_losses(self.denoiser)
        DPTensorFastGradientClipping(self.module, self.optimizer, losses, loss_reduction="sum").backward()

    def clipped_sum(self, gradients: None) -> Gradient:
        return self.take_gradients()


class _MeanLoss(nn.Module):
    """The loss of one example as a module's forward, which `functional_call` needs."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, images: Tensor, sigma: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        return denoising_loss(self.denoiser, images, Draws(sigma, noise, labels)).mean()


class _NoMemoryFormat(TorchFunctionMode):
    """Drops `contiguous(memory_format=...)`, a hint for speed that vmap refuses."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return args[0] if function is Tensor.contiguous and kwargs else function(*args, **(kwargs or {}))


class Vmap(Method):
    """torch.func: vmap over examples of the gradient of the mean loss over K rows."""

    def autocast(self) -> AbstractContextManager[None]:
        """Without the cache of cast weights, which would outlive the transform that they belong to."""
        compute = self.problem.compute
        return torch.autocast(compute.device.type, dtype=torch.bfloat16, enabled=compute.bf16, cache_enabled=False)

    def backward(self) -> Gradient:
        problem, module = self.problem, _MeanLoss(self.denoiser)
        weights = {name: parameter.detach() for name, parameter in module.named_parameters()}

        def loss(weights: Gradient, *rows: Tensor) -> Tensor:
            with self.autocast(), _NoMemoryFormat():
                return functional_call(module, weights, rows)

        draws = problem.draws
        rows = [tensor.unflatten(0, (-1, problem.copies)) for tensor in (problem.images, draws.sigma, draws.noise, draws.labels)]
        gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(weights, *rows)
        return {name.removeprefix("denoiser."): gradient for name, gradient in gradients.items()}

    def clipped_sum(self, gradients: Gradient) -> Gradient:
        norms = torch.stack([gradient.flatten(start_dim=1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)
        factors = (self.clipping_norm / (norms + 1e-6)).clamp(max=1.0)
        return {name: torch.einsum("i,i...", factors, gradient) for name, gradient in gradients.items()}


METHODS: dict[str, type[Method]] = {
    "ours": Ours,
    "Opacus hooks": OpacusHooks,
    "Opacus functorch": OpacusFunctorch,
    "Opacus ghost": OpacusGhost,
    "vmap(grad)": Vmap,
}
NOISY: dict[str, type[Method]] = {"ours, noise": OursWithNoise, "ours, secure noise": OursWithSecureNoise}
