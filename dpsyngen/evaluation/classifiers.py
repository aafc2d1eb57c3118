"""The classifiers that a synthetic dataset is judged by, and how they are trained.

Three of them, as DPDM uses (Dockhorn et al., arXiv 2210.09929, section 5 and its train_downstream_classifiers.py), which follows
DP-MERF (Harder et al., arXiv 2002.11603) and DP-Sinkhorn (Cao et al., arXiv 2111.01177) in judging by logistic regression, an MLP
and a CNN. Two things differ from DPDM's script. Adam's learning rate is 1e-3 rather than 3e-4, since sets of 10,000 images are
common here and need fewer epochs that way. And the best epoch is chosen on held-out synthetic images, so that no real label
has a say in what is reported.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dpsyngen.compute import Compute
from dpsyngen.data import ImageDataset, to_unit_range
from dpsyngen.evaluation.batches import in_batches

BATCH_SIZE = 128
LEARNING_RATE = 1e-3
HELD_OUT_FRACTION = 0.1
PATIENCE = {"logistic_regression": 10, "mlp": 10, "cnn": 5}  # epochs without a better one before training stops; the CNN's are dear
_INFERENCE_BATCH = 500


class HalfDropout(nn.Module):
    """Dropout with probability 1/2. One random bit decides on a unit, so 64 of them cost what torch's dropout pays for one.

    On a CPU drawing masks would otherwise take half of the CNN's training time.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element of x [N, C, ...] with probability 1/2 and double the others; in evaluation mode return x."""
        if not self.training:
            return x
        drawn = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        bits = drawn.view(torch.uint8)[: x.numel()].bitwise_and_(1)
        mask = bits.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)  # laid out like x, which is channels_last
        return x * mask.to(x.dtype).mul_(2)


class Classifier(nn.Module):
    """A trunk that gives features, and a linear head.

    The trunk computes in bfloat16 where the CPU has instructions for it; the head always in float32, where logits don't tie.
    """

    def __init__(self, trunk: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(num_features, num_classes)
        # Twice as fast on a CPU. One-channel images have no layout of their own, so that the weights decide.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the annotations of torch lack it

    def features(self, x: Tensor) -> Tensor:
        """float32 [N, C, H, W] in [-1, 1] to penultimate features float32 [N, F]."""
        bfloat16 = x.device.type == "cpu" and _has_bfloat16()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            return self.trunk(x.contiguous(memory_format=torch.channels_last)).float()

    def forward(self, x: Tensor) -> Tensor:
        """float32 [N, C, H, W] in [-1, 1] to logits float32 [N, num_classes]."""
        return self.head(self.features(x))


def _has_bfloat16() -> bool:
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch can't tell
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def build_classifier(kind: str, image_shape: tuple[int, int, int], num_classes: int) -> Classifier:
    """Build an untrained classifier, initialised from torch's global generator.

    Args:
        kind: logistic_regression; mlp, with one hidden layer of 100 ReLU units; cnn, three convolutions of 3 x 3 with 32, 64
            and 128 channels, max-pooling after the first two, a hidden layer of 128 units, and dropout of 1/2. As in DPDM,
            convolutions aren't padded; below 20 pixels, where nothing would be left, they are.
        image_shape: (C, H, W), H and W at least 8.
        num_classes: At least 2.
    """
    channels, height, width = image_shape
    pixels = channels * height * width
    if kind == "logistic_regression":
        return Classifier(nn.Flatten(), pixels, num_classes)
    if kind == "mlp":
        return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(pixels, 100), nn.ReLU()), 100, num_classes)
    if kind != "cnn":
        raise ValueError(f"kind: expected logistic_regression, mlp or cnn, got {kind!r}")
    padding = 1 if min(height, width) < 20 else 0

    def remaining(side: int) -> int:
        lost = 2 - 2 * padding
        return ((side - lost) // 2 - lost) // 2 - lost

    trunk = nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=padding), nn.MaxPool2d(2), nn.ReLU(), HalfDropout(),
        nn.Conv2d(32, 64, 3, padding=padding), nn.MaxPool2d(2), nn.ReLU(), HalfDropout(),
        nn.Conv2d(64, 128, 3, padding=padding), nn.ReLU(), nn.Flatten(),
        nn.Linear(128 * remaining(height) * remaining(width), 128), nn.ReLU(), HalfDropout(),
    )  # fmt: skip
    return Classifier(trunk, 128, num_classes)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators start from seed and cuDNN is deterministic; afterwards they are as they were."""
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        torch.manual_seed(seed)
        yield


def optimiser_step(model: Classifier, optimiser: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> None:
    """One step of cross-entropy on x float32 [n, C, H, W] in [-1, 1] with labels int64 [n]."""
    loss = functional.cross_entropy(model(x), labels)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def apply_in_batches(
    function: Callable[[Tensor], Tensor], images: np.ndarray, compute: Compute, description: str | None = None
) -> np.ndarray:
    """`in_batches` for a function of tensors on the device, float32 [n, C, H, W] in [-1, 1], without gradients."""
    return in_batches(lambda batch: function(to_unit_range(batch).to(compute.device)), images, _INFERENCE_BATCH, compute, description)


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier in evaluation mode with the weights of its best epoch."""

    model: Classifier
    selected_epoch: int
    """Counted from 1."""
    held_out_accuracy: float
    """In [0, 1], on the held-out images that chose the epoch."""


def train_classifier(
    kind: str, data: ImageDataset, epochs: int, seed: int, device: torch.device, on_epoch: Callable[[], object] = lambda: None
) -> TrainedClassifier:
    """Train on nine tenths of the images; the other tenth chooses the epoch, by accuracy and then by cross-entropy.

    Training stops early when a few epochs (PATIENCE) have brought nothing better. A function of its arguments alone, up to the rounding
    of the device.

    Args:
        kind: See `build_classifier`.
        data: At least 10 images with labels. No other images are seen.
        epochs: The most epochs.
        seed: Of initialisation, split, order and dropout.
        device: Where to compute.
        on_epoch: Called after each epoch, for a progress bar.
    """
    alone = Compute(device)  # several processes train a classifier each, not one together
    with seeded(seed, device):
        order = torch.randperm(len(data))
        size = round(len(data) * HELD_OUT_FRACTION)
        held_out, training = order[:size], order[size:]
        held_out_images, held_out_labels = data.images[held_out.numpy()], torch.from_numpy(data.labels[held_out.numpy()])
        channels, height, width = data.images.shape[1:]
        model = build_classifier(kind, (channels, height, width), len(data.class_names)).to(device)
        optimiser = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
        best_score, best_epoch, best_weights = (-1.0, 0.0), 0, model.state_dict()
        for epoch in range(1, epochs + 1):
            model.train()
            for batch in training[torch.randperm(len(training))].split(BATCH_SIZE):
                x, labels = data.batch(batch.numpy())
                optimiser_step(model, optimiser, x.to(device), labels.to(device))
            model.eval()
            logits = torch.from_numpy(apply_in_batches(model, held_out_images, alone))
            accuracy = (logits.argmax(1) == held_out_labels).double().mean().item()
            score = (accuracy, -functional.cross_entropy(logits, held_out_labels).item())
            if score > best_score:
                best_score, best_epoch, best_weights = score, epoch, copy.deepcopy(model.state_dict())
            on_epoch()
            if epoch - best_epoch >= PATIENCE[kind]:
                break
    model.load_state_dict(best_weights)
    return TrainedClassifier(model, best_epoch, best_score[0])
