"""The teacher: its features against convolutions done in space, its gradients against autograd's, its sensitivity, noise and price, and its runs."""

import json
import math

import numpy as np
import pytest
import torch
from running import call, launch, launch_together, private_images, refusal, sample_main, small, train_main, weights
from scipy.stats import kstest
from torch import Tensor
from torch.nn import functional

from dpsyngen.config import DataConfig, HintsConfig, NetworkConfig, PrivacyConfig, PrivateConfig, RunConfig, SamplingConfig, TeacherConfig
from dpsyngen.denoiser import Denoiser, build_denoiser
from dpsyngen.privacy.accounting import gaussian_mu
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.randomness import PrivateKey
from dpsyngen.privacy.secure_noise import Grid
from dpsyngen.privacy.teacher import TeacherMechanism
from dpsyngen.sampling import balanced_labels, draw_classes, generate
from dpsyngen.scattering import _gabor, num_features, scattering
from dpsyngen.teacher import Directions, Teacher

KEY = PrivateKey.fixed("ab" * 32)
CPU = torch.device("cpu")
CLASSES, DIMENSION = 3, 7


def pictures(count: int, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def in_space(image: np.ndarray, filter_at: np.ndarray) -> np.ndarray:
    """The periodic convolution of two arrays [n, n], by its definition."""
    side, total = len(image), np.zeros(image.shape, dtype=complex)
    for y in range(side):
        for x in range(side):
            total += image[y, x] * np.roll(filter_at, (y, x), axis=(0, 1))
    return total


def test_scattering_is_moduli_of_wavelet_coefficients() -> None:
    """Angle 1 alone, by convolutions in space: fine moduli, coarse moduli, and coarse moduli of the fine ones, blurred, at every fourth place."""
    image = pictures(1)
    found = scattering(image).reshape(-1, 4, 4).numpy()
    padded = np.pad((image[0, 0].numpy() + 1) / 2, 4, mode="reflect")

    def wavelet(scale: int) -> np.ndarray:
        parts = [_gabor(16, 0.8 * 2**scale, math.pi / 4, frequency, 0.5) for frequency in (0.75 * math.pi / 2**scale, 0.0)]
        return parts[0] - parts[0].sum() / parts[1].sum() * parts[1]

    blur = _gabor(16, 1.6, 0.0, 0.0, 1.0)
    fine = np.abs(in_space(padded, wavelet(0)))
    coarse, second = (np.abs(in_space(each, wavelet(1))) for each in (padded, fine))
    for place, truth in ((1 + 1, fine), (1 + 8 + 1, coarse), (1 + 16 + 8 + 1, second)):
        expected = in_space(truth, blur).real[::4, ::4]
        assert np.corrcoef(found[place].ravel(), expected.ravel())[0, 1] > 0.999  # equal but for the mean and scale of the kind, and sampling


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 28, 28), (3, 32, 32), (1, 64, 64)])
def test_features_are_each_image_s_own(shape: tuple[int, int, int]) -> None:
    images = pictures(3, shape)
    features = scattering(images)
    assert features.shape == (3, num_features(shape))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(scattering(images[1:2]), features[1:2], rtol=1e-3, atol=1e-5)
    assert torch.isfinite(scattering(torch.full((1, *shape), -1.0))).all()


def test_directions_are_the_main_axes() -> None:
    images = pictures(40)
    found = Directions.of(images, 5)
    features = scattering(images).double().numpy()
    centred = features - features.mean(axis=0)
    _, deviations, axes = np.linalg.svd(centred / math.sqrt(40), full_matrices=False)
    scaled = axes[:5].T / np.sqrt(deviations[:5] ** 2 + deviations[0] ** 2 / 300)
    np.testing.assert_allclose(np.abs((found.axes.numpy() * scaled).sum(axis=0)), (scaled**2).sum(axis=0), rtol=1e-3)
    seen = found.seen(images)
    assert seen.shape == (40, 6)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(40))


def test_the_teacher_says_what_its_weights_say() -> None:
    directions, weights = Directions.of(pictures(40), 5), torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(1))
    teacher, images = Teacher((1, 8, 8), CLASSES), pictures(600, seed=2)
    teacher.take_over(directions, weights)
    logits = directions.seen(images) @ weights
    torch.testing.assert_close(functional.normalize(teacher(images)), functional.normalize(logits), rtol=1e-2, atol=1e-3)
    whole = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy()
    expected = teacher(torch.from_numpy(whole).movedim(-1, 1).float() / 127.5 - 1).argmax(dim=1)
    np.testing.assert_array_equal(teacher.classes_of(whole), expected)
    assert (expected == logits.argmax(dim=1)).float().mean() > 0.95  # but for rounding to bytes


def batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, DIMENSION, generator=rng), dim=1), torch.randint(CLASSES, (count,), generator=rng)


def mechanism(noise: float = 0.0, steps: int = 1, size: int = 50) -> TeacherMechanism:
    return TeacherMechanism(noise, CLASSES, size, steps, 2.0)


def test_steps_are_clipped_gradients_of_softmax_regression() -> None:
    """Two steps with momentum by brute force: each image's gradient by autograd, clipped by itself."""
    features, labels = batch(50)
    features *= torch.linspace(0.5, 1.5, 50)[:, None]  # some of whose gradients have to be clipped
    found = mechanism(steps=2).release([(features[:20], labels[:20]), (features[20:], labels[20:])], np.random.default_rng(0))
    expected, velocity, clipped = torch.zeros(DIMENSION, CLASSES, dtype=torch.float64), torch.zeros(DIMENSION, CLASSES, dtype=torch.float64), 0
    for _ in range(2):
        total = torch.zeros_like(expected)
        for z, label in zip(features.double(), labels, strict=True):
            variable = expected.clone().requires_grad_()
            functional.cross_entropy((z @ variable)[None], label[None]).backward()
            clipped += int(variable.grad.norm() > 1)
            total += variable.grad / max(1.0, variable.grad.norm())
        velocity = 0.9 * velocity + total / 50
        expected -= 2.0 * velocity
    assert clipped > 5
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_the_sum_is_divided_by_the_declared_size() -> None:
    features, labels = batch(50)
    whole, half = (mechanism(size=size).release([(features, labels)], np.random.default_rng(0)) for size in (50, 100))
    torch.testing.assert_close(whole, 2 * half)


class SentError(Exception):
    """What a process would send to the others."""


def gradient(mechanism: TeacherMechanism, features: Tensor, labels: Tensor, *, secure: bool, steps: int = 1) -> np.ndarray:
    """What the processes would add up in the last of some steps, the earlier of which are of other images, always the same."""
    others, count = np.ones((DIMENSION, CLASSES)), 0

    def send(own: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal count
        count += 1
        if count == steps:
            raise SentError(own["gradient"])
        return own | {"gradient": torch.from_numpy(others)}

    with pytest.raises(SentError) as caught:
        mechanism.release([(features, labels)], KEY.secure_stream("class_means") if secure else np.random.default_rng(0), send)
    return caught.value.args[0].numpy()


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_image_moves_each_sum_by_at_most_one(secure: bool, steps: int) -> None:
    features, labels = batch(130)
    features[5], features[6] = 40 * features[5], torch.nan
    noisy = mechanism(noise=0.5, steps=3)
    unit = Grid.of(0.5, 1.0).step if secure else 1.0
    whole = gradient(noisy, features, labels, secure=secure, steps=steps)
    if secure:
        np.testing.assert_array_equal(whole, whole.round())
    for left_out in (5, 6, 7, 8):
        kept = np.arange(130) != left_out
        moved = np.linalg.norm(whole - gradient(noisy, features[kept], labels[kept], secure=secure, steps=steps)) * unit
        assert moved <= 1 + 1e-9
        assert (moved == 0) == (left_out == 6)
        assert left_out != 5 or steps > 1 or moved == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("secure", [False, True])
def test_each_step_has_noise_of_its_own(secure: bool) -> None:
    empty, wide = [(torch.zeros(0, 400), torch.zeros(0, dtype=torch.int64))], TeacherMechanism(3.0, CLASSES, 50, 2, 2.0)
    sent: list[Tensor] = []

    def watch(own: dict[str, Tensor]) -> dict[str, Tensor]:
        sent.append(own["gradient"].clone())
        return own

    rng = KEY.secure_stream("class_means") if secure else np.random.default_rng(0)
    found = wide.release(empty, rng, watch).double().numpy() * 50 / -2.0  # = (1 + 0.9) first noise + second noise
    assert len(sent) == 2 and all(not each.any() for each in sent)
    assert kstest(found.ravel() / (3.0 * math.sqrt(1.9**2 + 1)), "norm").pvalue > 1e-3


def config_with(share: float) -> RunConfig:
    return RunConfig(
        data=DataConfig(image_size=8, num_classes=3, expected_size=40), network=NetworkConfig(width=8), hints=HintsConfig(share=0.2),
        teacher=TeacherConfig(share=share, steps=7), private=PrivateConfig(batch_size=40, steps=10, epochs=None),
        privacy=PrivacyConfig(epsilon=5.0, delta=1e-3),
    )  # fmt: skip


def test_it_is_in_the_price() -> None:
    """With every image in every batch all mechanisms are Gaussian, and their mu^2 add up (Dong et al., arXiv 1905.02383)."""
    plan = PrivacyPlan.calibrate(config_with(0.3), 40)
    assert plan.class_means is not None and plan.teacher is not None
    parts = [10 / plan.noise_multiplier**2, 1 / plan.class_means.noise_multiplier**2, 7 / plan.teacher.noise_multiplier**2]
    assert gaussian_mu(plan.epsilon_after(10), plan.delta) == pytest.approx(sum(parts) ** 0.5, rel=5e-3)
    assert parts[2] == pytest.approx(0.3 * gaussian_mu(5.0, 1e-3) ** 2, rel=1e-6)
    assert [m.name for m in plan.mechanisms(3, means_releases=2)] == ["DP class means"] * 2 + ["DP teacher"] * 2 + ["DP-SGD"]
    assert PrivacyPlan.from_record(json.loads(json.dumps(plan.record())), ()) == plan
    assert PrivacyPlan.calibrate(config_with(0.0), 40).noise_multiplier < plan.noise_multiplier


def denoiser_with_teacher() -> Denoiser:
    denoiser = build_denoiser(config_with(0.1))
    assert isinstance(denoiser, Denoiser) and denoiser.teacher is not None
    denoiser.set_class_means(pictures(3, seed=3))
    denoiser.teacher.take_over(Directions.of(pictures(40), 5), torch.randn(6, 3, generator=torch.Generator().manual_seed(4)))
    return denoiser.eval()


@torch.no_grad()
def test_images_are_drawn_until_the_teacher_agrees() -> None:
    denoiser, classes = denoiser_with_teacher(), balanced_labels(60, 3)
    settings = SamplingConfig(sampler="ddim", steps=3, sigma_max=40.0, batch_size=16, attempts=3)
    images, labels = draw_classes(denoiser, settings, classes, 5, (1, 8, 8), 3, CPU)
    attempts = [generate(denoiser, settings, classes, 5, (1, 8, 8), 3, CPU, attempts=np.full(60, attempt)) for attempt in range(3)]
    said = [denoiser.teacher.classes_of(each) for each in attempts]
    assert 0 < np.mean(said[0] == classes) < 1 and len({each.tobytes() for each in attempts}) == 3
    for i in range(60):
        chosen = next((attempt for attempt in range(3) if said[attempt][i] == classes[i]), 2)
        np.testing.assert_allclose(images[i].astype(int), attempts[chosen][i].astype(int), atol=1)  # rounding in another batch
        assert labels[i] == said[chosen][i]
    few, few_labels = draw_classes(denoiser, settings, classes[:25], 5, (1, 8, 8), 3, CPU)
    np.testing.assert_allclose(few.astype(int), images[:25].astype(int), atol=1)
    np.testing.assert_array_equal(few_labels, labels[:25])
    np.testing.assert_array_equal(draw_classes(denoiser, settings, np.full(4, 3), 5, (1, 8, 8), 3, CPU)[1], [3] * 4)  # no class, no check


FLAGS = ("--teacher.share=0.2", "--teacher.steps=4", "--teacher.components=6", "--teacher.images=20", "--sampling.attempts=3",
         "--sampling.teacher_guidance=2")  # fmt: skip


def test_a_run_with_a_teacher(tmp_path, monkeypatch, capsys) -> None:
    from dpsyngen.pipeline import DPSynGenPipeline

    images = private_images(tmp_path / "images.npz")
    for index, flags in enumerate((("--stages.variant=finetune_all",), ("--stages.variant=coarse", "--stages.holder=routed"),
                                   ("--stages.variant=nonprivate",), ("--privacy.secure_noise=true",))):  # fmt: skip
        run = tmp_path / str(index)
        call(train_main, *small(images, *flags, *FLAGS), "--run", run)
        call(sample_main, "--run", run, "--num-images", "30")
        pipeline = DPSynGenPipeline.from_pretrained(run / "model")
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.denoiser.denoiser.teacher.weight.abs().max() > 0
        with np.load(run / "samples/images.npz") as archive:
            np.testing.assert_array_equal(pipeline(num_images=30, seed=0, output_type="uint8").images, archive["images"])
            disagreed = (archive["labels"] != balanced_labels(30, 3)).mean()
        assert ("another label from the teacher" in capsys.readouterr().out) == (disagreed > 0)
    mechanisms = json.loads((tmp_path / "0/privacy.json").read_text())["mechanisms"]
    assert [mechanism["name"] for mechanism in mechanisms] == ["DP class means", "DP teacher", "DP-SGD"]
    for wrong in ("--teacher.share=0.95", "--hints.kind=none", "--data.num_classes=0", "--teacher.components=20"):
        refused = refusal(train_main, monkeypatch, capsys, *small(images, *FLAGS, wrong), "--run", tmp_path / "wrong")
        assert refused.removeprefix("--").startswith("teacher.")
    refused = refusal(train_main, monkeypatch, capsys, *small(images, "--stages.variant=finetune_all"), "--run", tmp_path / "0")
    assert "teacher." in refused


def test_two_processes_have_the_teacher_and_the_images_of_one(tmp_path) -> None:
    images = private_images(tmp_path / "images.npz", count=1200)
    arguments = small(images, *FLAGS, f"--privacy.unsafe_fixed_key={'ab' * 32}", "--data.expected_size=1200", "--compute.device=cpu")
    call(train_main, *arguments, "--run", tmp_path / "one")
    together = launch_together(2, "train.py", *arguments, "--run", tmp_path / "two")
    assert together.returncode == 0, together.stderr
    from safetensors.numpy import load

    one, two = (load(weights(tmp_path / name)) for name in ("one", "two"))
    for name in ("denoiser.teacher.weight", "denoiser.teacher.bias"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-5)
    flags = ("--run", tmp_path / "one", "--num-images=30", "--compute.device=cpu", "--out")
    for drawn in (launch("sample", *flags, tmp_path / "alone"), launch_together(2, "sample.py", *flags, tmp_path / "shared")):
        assert drawn.returncode == 0, drawn.stderr
    alone, shared = (np.load(tmp_path / name / "images.npz") for name in ("alone", "shared"))
    np.testing.assert_array_equal(alone["labels"], shared["labels"])
    np.testing.assert_array_equal(alone["images"], shared["images"])
    assert (alone["labels"] != balanced_labels(30, 3)).any()
