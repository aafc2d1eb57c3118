"""Samplers: small pure functions of a denoiser and a grid of noise levels, and the generation of a synthetic dataset.

A sampler walks an image down `sigmas`, float64 [steps + 1] that falls to a final 0 (`dpsyngen.noise_levels.karras_grid`),
along the probability flow ODE dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al., arXiv 2206.00364, equation 1 with
sigma(t) = t). The denoiser computes in float32; the image between its calls keeps the precision of `x`, float64 where
the device has it, so that eighteen or a thousand steps add up to no rounding error worth the name.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from tqdm import tqdm

from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig, SamplingConfig
from dpsyngen.data import to_uint8
from dpsyngen.denoiser import Denoiser as ConditionalDenoiser
from dpsyngen.denoiser import RoutedDenoiser
from dpsyngen.errors import InputError
from dpsyngen.guidance import Denoiser, guided, guided_by
from dpsyngen.noise_levels import karras_grid


def _denoise(denoiser: Denoiser, x: Tensor, sigma: float, labels: Tensor) -> Tensor:
    levels = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
    return denoiser(x.float(), levels, labels).to(x.dtype)


def ddim(denoiser: Denoiser, x: Tensor, sigmas: Tensor, labels: Tensor) -> Tensor:
    """DDIM (Song et al., arXiv 2010.02502, equation 12 with eta = 0), which is Euler's method on the ODE in sigma.

    `x` is the starting noise [N, C, H, W] with standard deviation sigmas[0]. Returns images near [-1, 1], same shape and dtype.
    """
    for sigma, following in pairwise(sigmas.tolist()):
        denoised = _denoise(denoiser, x, sigma, labels)
        x = denoised + (following / sigma) * (x - denoised)
    return x


def heun(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor,
    noise: Callable[[], Tensor],
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """EDM's stochastic second-order sampler (Karras et al., Algorithm 2); deterministic (Algorithm 1) where s_churn is 0.

    `x` is the starting noise [N, C, H, W] with standard deviation sigmas[0]. Each call of `noise` returns fresh standard
    normal noise in the shape of `x`; it is called only at levels that churn. The last step, to 0, is Euler's, since the
    slope isn't defined there. Returns images near [-1, 1], same shape and dtype.
    """
    steps = len(sigmas) - 1
    for sigma, following in pairwise(sigmas.tolist()):
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
        raised = sigma * (1 + gamma)
        if gamma > 0:
            x = x + s_noise * math.sqrt(raised**2 - sigma**2) * noise()
        slope = (x - _denoise(denoiser, x, raised, labels)) / raised
        euler = x + (following - raised) * slope
        if following > 0:
            slope_there = (euler - _denoise(denoiser, euler, following, labels)) / following
            x = x + (following - raised) * (slope + slope_there) / 2
        else:
            x = euler
    return x


def balanced_labels(num_images: int, num_classes: int) -> np.ndarray:
    """int64 [num_images]: label i is i mod num_classes, so classes differ by at most one image; all 0 without classes."""
    return np.arange(num_images, dtype=np.int64) % max(num_classes, 1)


def image_noise(
    seed: int, indices: Sequence[int] | np.ndarray, image_shape: tuple[int, int, int], attempts: Sequence[int] | np.ndarray | None = None
) -> Callable[[], Tensor]:
    """A source of standard normal noise, float32 [len(indices), C, H, W] a call, that has one generator per image.

    Image i draws from the i-th child of the public seed (numpy's SeedSequence), so its starting noise and its churn are
    the same in any batch on any number of processes. Further attempts at an image draw from children of that child.
    """
    tries = np.zeros(len(indices), dtype=np.int64) if attempts is None else attempts
    keys = [(int(i), int(attempt)) if attempt > 0 else (int(i),) for i, attempt in zip(indices, tries, strict=True)]
    generators = [np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))) for key in keys]
    return lambda: torch.from_numpy(np.stack([generator.standard_normal(image_shape, dtype=np.float32) for generator in generators]))


def _sample_batch(
    denoiser: Denoiser, config: SamplingConfig, noise: Callable[[], Tensor], labels: Tensor, device: torch.device
) -> Tensor:
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    sigmas = karras_grid(config.steps, config.sigma_min, config.sigma_max, config.rho)

    def draw() -> Tensor:
        return noise().to(device, dtype)

    start = draw() * sigmas[0].item()
    if config.sampler == "ddim":
        return ddim(denoiser, start, sigmas, labels)
    return heun(denoiser, start, sigmas, labels, draw, config.s_churn, config.s_min, config.s_max, config.s_noise)


@torch.no_grad()
def sample_set(denoiser: ConditionalDenoiser | RoutedDenoiser, config: RunConfig, compute: Compute) -> tuple[np.ndarray, np.ndarray]:
    """The sample set that a run's config asks for, as `draw_classes` returns it for balanced classes.

    In the precision of `compute`, and by all of its processes.
    """
    classes = balanced_labels(config.sampling.num_images, config.data.num_classes)
    with compute.autocast():
        return draw_classes(
            denoiser, config.sampling, classes, config.seed, config.data.image_shape, config.data.num_classes, compute.device,
            rank=compute.rank, processes=compute.processes,
        )  # fmt: skip


def draw_classes(
    denoiser: ConditionalDenoiser | RoutedDenoiser,
    config: SamplingConfig,
    classes: np.ndarray,
    seed: int,
    image_shape: tuple[int, int, int],
    num_classes: int,
    device: torch.device,
    *,
    call: Denoiser | None = None,
    progress: bool = True,
    rank: int = 0,
    processes: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image of each class, checked and guided where there is a teacher: images uint8 [N, H, W, C] and labels int64 [N].

    An image that the teacher takes for another class is drawn again from other noise, up to `config.attempts` times in all. With
    `config.teacher_guidance` the last attempt at each is then drawn once more, from the same noise, guided by the teacher: noise is
    chosen by what the denoiser makes of it alone, since guidance would bring any to show its class somehow. What is still taken for
    another class in the end gets that one for its label. All post-processing of what was released. Image i and its label depend on i and
    classes[i] alone, as `generate` has it.

    Args:
        denoiser: Knows the classes' hints and the teacher.
        config: Of `generate`, the number of attempts, and how the teacher guides.
        classes: int64 [N] in [0, num_classes], the last for no class; such images aren't checked.
        seed, image_shape, device, progress, rank, processes: As for `generate`.
        num_classes: 0 for a model without labels.
        call: What is called in the denoiser's place, if it is the denoiser in another form.
    """
    conditions, num_labels = denoiser.conditions_to_draw(classes), denoiser.null_label if num_classes else 0
    everyone, attempts, labels = np.arange(len(classes)), np.zeros(len(classes), dtype=np.int64), classes.copy()
    teacher, unguided = denoiser.teacher, call or denoiser

    def draw(drawing: Denoiser, indices: np.ndarray, doing: str = "sampling") -> np.ndarray:
        return generate(
            drawing, config, conditions[indices], seed, image_shape, num_labels, device, progress, rank, processes,
            indices=indices, attempts=attempts[indices], doing=doing,
        )  # fmt: skip

    if teacher is None:
        return draw(unguided, everyone), labels

    def check(indices: np.ndarray) -> np.ndarray:
        """Label these images by the teacher; those of them that it takes for another class."""
        with torch.autocast(device.type, enabled=False):
            said = teacher.classes_of(images[indices]) if rank == 0 else np.zeros(len(indices), dtype=np.int64)
        labels[indices] = _of_main(said, device, processes)
        return indices[labels[indices] != classes[indices]]

    guided_drawing = guided_by(teacher, unguided, config, denoiser.sigma_data, denoiser.null_label, denoiser.prototypes)
    choosing = unguided if config.attempts > 1 else guided_drawing  # there is no noise to choose where each has one attempt
    images = draw(choosing, everyone)
    of_classes = everyone[classes < num_classes]
    mistaken = check(of_classes)
    for attempt in range(1, config.attempts):
        if len(mistaken) == 0:
            break
        attempts[mistaken] = attempt
        images[mistaken] = draw(unguided, mistaken, "drawing again")
        mistaken = check(mistaken)
    if guided_drawing is not choosing and len(of_classes) > 0:
        images[of_classes] = draw(guided_drawing, of_classes, "guiding")
        check(of_classes)
    return images, labels


def generate(
    denoiser: Denoiser,
    config: SamplingConfig,
    labels: np.ndarray,
    seed: int,
    image_shape: tuple[int, int, int],
    num_labels: int,
    device: torch.device,
    progress: bool = True,
    rank: int = 0,
    processes: int = 1,
    indices: np.ndarray | None = None,
    attempts: np.ndarray | None = None,
    doing: str = "sampling",
) -> np.ndarray:
    """Draw one image per label. Image i depends on (denoiser, config, labels[i], seed, i) alone, but for rounding in another batch.

    Batches are the same on any number of processes, so images are too, to the bit on processes with equal devices and threads.

    Args:
        denoiser: See `Denoiser`; label `num_labels` is its null label.
        config: Sampler, grid, guidance and batch size; its num_images is not looked at.
        labels: int64 [N] in [0, num_labels], e.g. from `balanced_labels`, by `conditions_to_draw` where a class has several prototypes.
        seed: The public seed, >= 0.
        image_shape: (C, H, W).
        num_labels: 0 for a model without labels.
        device: Where the denoiser is.
        progress: Show a bar on stderr, where that is a terminal.
        rank: This process's number in [0, processes).
        processes: How many share the work, in torch.distributed's default group; every one must call this and gets all images.
        indices: int64 [N], the images' numbers where they aren't 0 to N - 1: image i is the one of number indices[i].
        attempts: int64 [N], >= 0: each gives other images of the same number. All 0 if None.
        doing: What the bar says.
    Returns:
        uint8 [N, H, W, C].
    Raises:
        InputError: guidance without classes, or a model whose images aren't finite.
    """
    if num_labels == 0 and config.guidance != 1:
        raise InputError(f"sampling.guidance: expected 1, since the model has no classes to be guided to, got {config.guidance!r}")
    denoiser = guided(denoiser, config.guidance, num_labels)
    channels, height, width = image_shape
    total, numbers = len(labels), np.arange(len(labels)) if indices is None else indices
    size = min(config.batch_size, total)  # whatever the number of processes: kernels may round otherwise for another number of images
    images = np.empty((total, height, width, channels), dtype=np.uint8)
    with tqdm(total=total, desc=doing, unit="image", disable=None if progress and rank == 0 else True) as bar:
        for first in range(0, total, size * processes):  # a round: each process takes one batch, and all share the results
            last = min(first + size * processes, total)
            mine = np.arange(first + rank * size, min(first + (rank + 1) * size, total))
            batch = torch.zeros(size, *image_shape, dtype=torch.float32, device=device)  # of one shape in the last round too
            if len(mine) > 0:
                noise = image_noise(seed, numbers[mine], image_shape, None if attempts is None else attempts[mine])
                batch[: len(mine)] = _sample_batch(denoiser, config, noise, torch.from_numpy(labels[mine]).to(device), device)
            batch = _gather(batch, processes)[: last - first]
            if not batch.isfinite().all():
                raise InputError("the model's images are not finite: expected a model whose training has not diverged")
            images[first:last] = to_uint8(batch)
            bar.update(last - first)
    return images


def _of_main(numbers: np.ndarray, device: torch.device, processes: int) -> np.ndarray:
    """The main process's numbers, int64 [N], on every process, so that rounding on different devices can't part them."""
    if processes == 1:
        return numbers
    sent = torch.from_numpy(numbers).to(device)
    torch.distributed.broadcast(sent, src=0)
    return sent.cpu().numpy()


def _gather(batch: Tensor, processes: int) -> Tensor:
    """The batches of all processes, [processes * N, ...] in the order of their ranks, on every process."""
    if processes == 1:
        return batch
    batches = [torch.empty_like(batch) for _ in range(processes)]
    torch.distributed.all_gather(batches, batch)
    return torch.cat(batches)
