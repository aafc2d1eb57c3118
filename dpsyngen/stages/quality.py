"""A denoiser trained on given images for a short while, and its error on others at every noise level."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dpsyngen.compute import Compute
from dpsyngen.config import HintsConfig, RunConfig, StagesConfig
from dpsyngen.denoiser import Denoiser, build_denoiser
from dpsyngen.loss import Draws, denoising_loss
from dpsyngen.phases import Phase
from dpsyngen.progress import moving_average
from dpsyngen.sigma_draws import Uniform, sigma_of

# (first, n) -> images first, ..., first + n - 1 of an endless sequence, float32 [n, C, H, W] in [-1, 1]
Images = Callable[[int, int], Tensor]
Tick = Callable[[], object]
# (x float32 [N, C, H, W], sigma float32 [N], labels int64 [N]) -> an estimate of x0 like x
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]

_TRAINING, _MEASURING = 0, 1
_TOGETHER = 250  # images denoised at once
_NULL_LABEL = 1  # of a denoiser without classes, which has the label 0 beside it


def plain(config: RunConfig) -> RunConfig:
    """The config with a denoiser that has neither hints nor classes nor experts: what is compared is what images alone teach."""
    return replace(
        config, hints=HintsConfig(kind="none"), stages=StagesConfig(), sampling=replace(config.sampling, guidance=1.0),
        data=replace(config.data, num_classes=0, class_names=None),
    )  # fmt: skip


def trained(config: RunConfig, images: Images, steps: int, batch: int, compute: Compute, tick: Tick) -> Denoise:
    """The averaged weights after `steps` ordinary steps on `batch` images each; `tick` is called after every one.

    ln sigma is uniform over the range that config.sampling walks down, stratified within a batch (as in Kingma et al., arXiv 2107.00630,
    appendix I.1). Optimiser, schedule and average are those of config.synthetic. Initial weights, sigma and noise come from
    config.seed alone, so denoisers of the same settings differ by their images only.
    """
    denoiser = build_denoiser(plain(config)).to(compute.device)
    assert isinstance(denoiser, Denoiser)  # noqa: S101 - plain() has no experts
    levels = Uniform(math.log(config.sampling.sigma_min), math.log(config.sampling.sigma_max))
    labels = torch.full((batch,), _NULL_LABEL)

    def gradient(step: int) -> dict[str, float]:
        rng = _rng(config.seed, _TRAINING, step)
        sigma = sigma_of(levels, (np.arange(batch) + rng.random(batch)) / batch)
        noise = rng.standard_normal((batch, *config.data.image_shape), dtype=np.float32)
        x = images(step * batch, batch).to(compute.device)
        with compute.autocast():
            loss = denoising_loss(denoiser, x, Draws(sigma, torch.from_numpy(noise), labels).to(compute.device)).mean()
        loss.backward()
        return {}

    phase = Phase("synthetic", config.synthetic, steps, gradient, denoiser)
    optimizer = phase.optimizer()
    average = moving_average(denoiser, config.synthetic.ema_decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate(step)
        optimizer.zero_grad()
        phase.gradient(step)
        optimizer.step()
        average.update_parameters(denoiser)
        tick()
    denoiser.load_state_dict(average.module.state_dict())
    return denoiser.eval()


def shifted(denoise: Denoise, apart: Tensor) -> Denoise:
    """The denoiser told that the images' mean is `apart` [C, H, W] less than that of those it was trained on."""
    return lambda x, sigma, labels: denoise(x + apart, sigma, labels) - apart


@torch.no_grad()
def errors(denoise: Denoise, images: Tensor, sigmas: np.ndarray, seed: int, compute: Compute, tick: Tick) -> np.ndarray:
    """Mean squared error per pixel of D(x0 + sigma n; sigma) against x0 = images float32 [N, C, H, W] at each sigma [m]; float64 [m].

    The noise n of an image is a function of the seed and its place, the same at every sigma and for every denoiser. float32 arithmetic.
    `tick` is called after each sigma.
    """
    noise = torch.from_numpy(_rng(seed, _MEASURING, 0).standard_normal(tuple(images.shape), dtype=np.float32))
    pairs = [(x0.to(compute.device), n.to(compute.device)) for x0, n in zip(images.split(_TOGETHER), noise.split(_TOGETHER), strict=True)]
    found = []
    for sigma in map(float, sigmas):
        total = 0.0
        for x0, n in pairs:
            levels = torch.full((len(x0),), sigma, device=compute.device)
            labels = torch.full((len(x0),), _NULL_LABEL, device=compute.device)
            total += float(((denoise(x0 + sigma * n, levels, labels) - x0) ** 2).double().sum())
        found.append(total / images.numel())
        tick()
    return np.array(found)


def _rng(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(purpose, number))))
