"""Guidance by the teacher: against Gaussians tilted in closed form, gradients against differences, and the images that it gives."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_teacher import denoiser_with_teacher, pictures
from torch import Tensor, nn

from dpsyngen.config import SamplingConfig
from dpsyngen.denoiser import Denoiser
from dpsyngen.guidance import guided_by
from dpsyngen.sampling import balanced_labels, draw_classes, generate
from dpsyngen.teacher import Directions, Teacher

CPU = torch.device("cpu")
DEVIATION = 0.15
SHAPE, CLASSES, PROTOTYPES = (1, 8, 8), 3, 2
EVERYWHERE = (-math.inf, math.inf)


def white_gaussian(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """The exact denoiser of images from N(0, DEVIATION^2)."""
    share = DEVIATION**2 / (DEVIATION**2 + sigma**2)
    return share[:, None, None, None] * x


class LogLinear(Teacher):
    """ln p(y | x0) is linear in pixels, up to what doesn't depend on the class: gradients[y] . x0."""

    def __init__(self, gradients: Tensor) -> None:
        super().__init__(SHAPE, len(gradients))
        self.gradients = nn.Buffer(gradients)

    def evidence(self, images: Tensor, classes: Tensor, temperature: float = 1.0) -> Tensor:
        return self.gradients[classes] / temperature


def test_a_gaussian_is_tilted_as_it_should_be() -> None:
    """N(0, s^2) times exp(w x) is N(s^2 w, s^2), whatever the sampler and its grid; prototypes have the class that they are of."""
    gradients = 10 * pictures(CLASSES, SHAPE, seed=5)
    settings = SamplingConfig(steps=60, teacher_guidance=1.5, teacher_temperature=0.8, teacher_range=EVERYWHERE)
    denoiser = guided_by(LogLinear(gradients), white_gaussian, settings, DEVIATION, CLASSES * PROTOTYPES, PROTOTYPES)
    labels = np.repeat(np.arange(7), 700)
    images = torch.from_numpy(generate(denoiser, settings, labels, 0, SHAPE, 6, CPU).transpose(0, 3, 1, 2) / 127.5 - 1)
    for label in range(7):
        mean, own = 1.5 / 0.8 * DEVIATION**2 * (gradients[label // PROTOTYPES] if label < 6 else torch.zeros(SHAPE)), images[labels == label]
        assert (own.mean(dim=0) - mean).abs().max() < 4.5 * DEVIATION / math.sqrt(700)
        assert (own - mean).std().item() == pytest.approx(DEVIATION, rel=0.02)


def test_only_the_range_is_guided() -> None:
    x, labels = pictures(6, SHAPE), torch.tensor([0, 1, 2, 3, 4, 6])
    settings = SamplingConfig(teacher_guidance=1.0, teacher_range=(-2.0, 0.5))
    denoiser = guided_by(LogLinear(torch.ones(3, *SHAPE)), white_gaussian, settings, DEVIATION, 6, PROTOTYPES)
    for log_sigma, inside in ((-2.1, False), (-1.9, True), (0.4, True), (0.6, False)):
        sigma = torch.full((6,), math.exp(log_sigma))
        moved = (denoiser(x, sigma, labels) != white_gaussian(x, sigma, labels)).flatten(start_dim=1).any(dim=1)
        assert moved.tolist() == [inside] * 5 + [False]  # the last is the null label
    assert guided_by(LogLinear(torch.ones(3, *SHAPE)), white_gaussian, SamplingConfig(), DEVIATION, 6, PROTOTYPES) is white_gaussian


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 12)])
def test_evidence_is_the_slope_of_the_log_likelihood(shape: tuple[int, int, int]) -> None:
    """Against central differences along random directions, and of each image by itself, beyond the number that is computed at once."""
    directions, teacher, images = Directions.of(pictures(40, shape), 5), Teacher(shape, CLASSES), pictures(300, shape, seed=2) / 2
    teacher.take_over(directions, torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(1)))
    classes = torch.arange(300) % CLASSES
    found = teacher.evidence(images, classes, temperature=0.5)
    steps = 0.003 * pictures(300, shape, seed=3)

    def log_likelihoods(at: Tensor) -> Tensor:
        return torch.log_softmax(teacher(at).double() / (0.5 * math.sqrt(2) * 3), dim=1)[torch.arange(300), classes]

    differences = log_likelihoods(images + steps) - log_likelihoods(images - steps)
    slopes = 2 * (found * steps).flatten(start_dim=1).sum(dim=1).double()
    assert (slopes - differences).norm() < 0.05 * differences.norm()
    torch.testing.assert_close(teacher.evidence(images[7:8], classes[7:8], temperature=0.5)[0], found[7], rtol=1e-2, atol=1e-3)
    assert not found.requires_grad and images.grad is None


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_a_blank_image_has_a_slope(value: float) -> None:
    teacher = denoiser_with_teacher().teacher
    assert teacher is not None
    assert teacher.evidence(torch.full((2, *SHAPE), value), torch.tensor([0, 1])).isfinite().all()


def denoiser_and_teacher() -> tuple[Denoiser, Teacher, np.ndarray]:
    """A denoiser, its teacher, which takes no class for likelier than others, and sixty classes to draw."""
    denoiser = denoiser_with_teacher()
    assert denoiser.teacher is not None
    weights = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(4)) * torch.tensor([[10.0]] * 5 + [[0.0]])
    denoiser.teacher.take_over(Directions.of(pictures(40), 5), weights)
    return denoiser, denoiser.teacher, balanced_labels(60, CLASSES)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"sampler": "ddim"}, {"sampler": "heun"}, {"sampler": "ddim", "guidance": 1.5}])
def test_guided_images_show_their_class(settings: dict) -> None:
    denoiser, _, classes = denoiser_and_teacher()
    plain = SamplingConfig(steps=8, sigma_max=40.0, batch_size=16, attempts=1, **settings)
    strong = SamplingConfig(steps=8, sigma_max=40.0, batch_size=16, attempts=1, teacher_guidance=20.0, **settings)

    def drawn(how: SamplingConfig, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return draw_classes(denoiser, how, of, 5, SHAPE, 3, CPU, progress=False)

    images, labels = drawn(strong, classes)
    assert np.mean(labels == classes) > np.mean(drawn(plain, classes)[1] == classes) + 0.2
    np.testing.assert_allclose(drawn(strong, classes[:25])[0].astype(int), images[:25].astype(int), atol=2)  # rounding in another batch
    none = np.full(8, 3)  # no class
    np.testing.assert_array_equal(drawn(strong, none)[0], drawn(plain, none)[0])


@torch.no_grad()
def test_noise_is_chosen_by_what_it_gives_unguided() -> None:
    """Each image is a guided one of the attempt at which the unguided one showed its class, or of the last."""
    denoiser, teacher, classes = denoiser_and_teacher()
    plain = SamplingConfig(sampler="ddim", steps=6, sigma_max=40.0, batch_size=16, attempts=3)
    guides = replace(plain, teacher_guidance=5.0)
    towards = guided_by(teacher, denoiser, guides, denoiser.sigma_data, denoiser.null_label, denoiser.prototypes)
    unguided, guided = ([generate(how, plain, classes, 5, SHAPE, 3, CPU, attempts=np.full(60, attempt)) for attempt in range(3)]
                        for how in (denoiser, towards))  # fmt: skip
    said = [teacher.classes_of(each) for each in unguided]
    chosen = [next((attempt for attempt in range(3) if said[attempt][i] == classes[i]), 2) for i in range(60)]
    expected = np.stack([guided[attempt][i] for i, attempt in enumerate(chosen)])
    assert set(chosen) == {0, 1, 2}
    assert (np.abs(expected.astype(int) - unguided[0].astype(int)) > 3).any(axis=(1, 2, 3)).mean() > 0.5
    images, labels = draw_classes(denoiser, guides, classes, 5, SHAPE, 3, CPU, progress=False)
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)  # rounding in another batch
    np.testing.assert_array_equal(labels, teacher.classes_of(images))
