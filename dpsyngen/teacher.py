"""The teacher: a linear classifier on scattering features that says which class an image shows, and the public directions it looks along."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dpsyngen.data import to_unit_range
from dpsyngen.scattering import num_features, scattering

AT_ONCE = 250
"""Images whose features are computed together: their wavelet coefficients stay in a core's cache, more or less."""
_OFFSET = 3.0  # the last entry of what the classifier sees, about as long as the others together: it becomes the bias
_LENGTH = math.sqrt(2) * _OFFSET  # about that of what is seen before it is scaled to norm 1, by which logits differ from a `Teacher`'s
_SMALLEST = 1 / 300  # directions are divided by their deviation, but for those of less than this part of the largest variance


class Directions(NamedTuple):
    """Where programmatic images lie and how they differ, in features: mean float32 [F], and axes [F, k], each divided by its deviation."""

    mean: Tensor
    axes: Tensor

    @classmethod
    def of(cls, images: Tensor, components: int) -> "Directions":
        """The main axes of images float32 [N, C, H, W] in [-1, 1] that are public, N > components."""
        features = torch.cat([scattering(part) for part in images.split(AT_ONCE)])
        mean = features.mean(dim=0)
        centred = (features - mean).double()
        variances, mixtures = torch.linalg.eigh(centred @ centred.T / len(images))  # of N x N, which has the same spectrum
        variances, mixtures = variances.flip(0)[:components], mixtures.flip(1)[:, :components]
        axes = centred.T @ mixtures / (variances * len(images)).clamp(min=1e-30).sqrt()
        return cls(mean, (axes / (variances + _SMALLEST * variances[0]).sqrt()).float())

    def seen(self, images: Tensor) -> Tensor:
        """What the classifier sees of images float32 [N, C, H, W] in [-1, 1]: float32 [N, k + 1] of norm 1, each of its image alone."""
        along = torch.cat([(scattering(part) - self.mean) @ self.axes for part in images.split(AT_ONCE)])
        return functional.normalize(functional.pad(along, (0, 1), value=_OFFSET), dim=1)


class Teacher(nn.Module):
    """Linear on scattering features. Its weights are part of what a run releases; they are zero until they are set."""

    weight: Tensor
    bias: Tensor

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_features(image_shape), num_classes))
        self.register_buffer("bias", torch.zeros(num_classes))

    def take_over(self, directions: Directions, weights: Tensor) -> None:
        """Take over weights float32 [k + 1, num_classes] for what `directions` see: logits become those, but for a positive factor."""
        weight = directions.axes @ weights[:-1]
        self.weight.copy_(weight)
        self.bias.copy_(_OFFSET * weights[-1] - directions.mean @ weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [N, num_classes] of images float32 [N, C, H, W] in [-1, 1]."""
        return torch.cat([scattering(part) @ self.weight + self.bias for part in images.split(AT_ONCE)])

    @torch.enable_grad()
    def evidence(self, images: Tensor, classes: Tensor, temperature: float = 1.0) -> Tensor:
        """The gradient of ln p(class | image) by the image: which way images show their classes more clearly.

        p is the softmax of the logits divided by the temperature; at 1 it is about what descent made likely. The larger it is, the longer
        there is a slope where the teacher is sure already.

        Args:
            images: float32 [N, C, H, W] in [-1, 1].
            classes: int64 [N] in [0, num_classes).
            temperature: > 0.
        Returns:
            float32 [N, C, H, W], of each image by itself.
        """
        gradients: list[Tensor] = []
        with torch.autocast(images.device.type, enabled=False):
            for part, own in zip(images.detach().float().split(AT_ONCE), classes.split(AT_ONCE), strict=True):
                leaf = part.clone().requires_grad_()
                likelihoods = functional.log_softmax(self(leaf) / (temperature * _LENGTH), dim=1)
                gradients += torch.autograd.grad(likelihoods.gather(1, own[:, None]).sum(), leaf)
        return torch.cat(gradients)

    @torch.no_grad()
    def classes_of(self, images: np.ndarray) -> np.ndarray:
        """The class that each image uint8 [N, H, W, C] shows, int64 [N]."""
        parts = np.split(images, range(AT_ONCE, len(images), AT_ONCE))
        scaled = (to_unit_range(part.transpose(0, 3, 1, 2)).to(self.weight.device) for part in parts)
        return torch.cat([self(part).argmax(dim=1) for part in scaled]).cpu().numpy()
