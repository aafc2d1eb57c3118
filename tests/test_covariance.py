"""The DP covariance: its axes against NumPy's, its sensitivity, noise and price, and the Gaussian denoiser against the dense closed form."""

import math

import numpy as np
import pytest
import torch
from running import call, private_images, refusal, sample_main, small, train_main
from scipy.fft import dctn
from scipy.stats import kstest
from torch import Tensor

from dpsyngen.config import DataConfig, HintsConfig, NetworkConfig, PrivacyConfig, PrivateConfig, RunConfig, StagesConfig
from dpsyngen.denoiser import Denoiser, build_denoiser
from dpsyngen.privacy.accounting import gaussian_mu
from dpsyngen.privacy.class_means import ClassMeans
from dpsyngen.privacy.covariance import CovarianceMechanism
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.randomness import PrivateKey

SHAPE, CLASSES, PARTS = (2, 8, 8), 3, 2
KEY = PrivateKey.fixed("ab" * 32)


def mechanism(noise: float = 0.0, radius: float = 100.0, rank: int = 4, resolution: int = 8, size: int = 300) -> CovarianceMechanism:
    return CovarianceMechanism(noise, size, radius, resolution, rank)


def images_and_hints(count: int = 300, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, ClassMeans]:
    """Images around prototypes with a few directions in which they vary; their labels, their prototypes' rows, the hints."""
    rng = torch.Generator().manual_seed(seed)
    means = torch.rand(CLASSES * PARTS, *SHAPE, generator=rng) * 1.6 - 0.8
    rows = torch.randint(CLASSES * PARTS, (count,), generator=rng)
    axes = torch.linalg.qr(torch.randn(128, 4, generator=rng)).Q.T * torch.tensor([1.5, 1.2, 0.9, 0.6])[:, None]
    images = means[rows] + (torch.randn(count, 4, generator=rng) @ axes).unflatten(1, SHAPE) + 0.02 * torch.randn(count, *SHAPE, generator=rng)
    return images, rows // PARTS, rows, ClassMeans(means, torch.full((CLASSES * PARTS,), 1 / PARTS))


def test_without_noise_it_is_the_covariance_around_the_prototypes() -> None:
    images, labels, rows, hints = images_and_hints()
    modes, variances = mechanism().release([(images[:100], labels[:100]), (images[100:], labels[100:])], hints, np.random.default_rng(0))
    centred = (images - hints.means[rows]).flatten(1).double().numpy()
    expected, axes = np.linalg.eigh(centred.T @ centred / 300)
    np.testing.assert_allclose(variances, expected[::-1][:4], rtol=1e-5)
    np.testing.assert_allclose(np.abs(modes.flatten(1).numpy() @ axes[:, ::-1][:, :4]), np.eye(4), atol=1e-4)


def test_low_resolution_keeps_low_frequencies() -> None:
    images, labels, _, hints = images_and_hints()
    modes, _ = mechanism(resolution=3).release([(images, labels)], hints, np.random.default_rng(0))
    spectrum = dctn(modes.numpy(), axes=(2, 3), norm="ortho")
    assert np.abs(spectrum[..., 3:, :]).max() < 1e-5 and np.abs(spectrum[..., 3:]).max() < 1e-5
    torch.testing.assert_close(modes.flatten(1) @ modes.flatten(1).T, torch.eye(4), rtol=1e-4, atol=1e-4)


class SentError(Exception):
    """What a process would send to the others."""


def vector(mechanism: CovarianceMechanism, images: Tensor, labels: Tensor, hints: ClassMeans, *, secure: bool) -> Tensor:
    def send(own: dict[str, Tensor]) -> dict[str, Tensor]:
        raise SentError(own["vector"])

    with pytest.raises(SentError) as caught:
        mechanism.release([(images, labels)], hints, KEY.secure_stream("class_means") if secure else np.random.default_rng(0), send)
    return caught.value.args[0]


@pytest.mark.parametrize("secure", [False, True])
def test_an_image_moves_the_sum_by_at_most_one(secure: bool) -> None:
    images, labels, _, hints = images_and_hints(130)
    images[5], images[6] = 30.0, torch.nan
    small_radius = mechanism(noise=0.5, radius=1.0)
    unit = 1.0
    if secure:
        from dpsyngen.privacy.secure_noise import Grid

        unit = Grid.of(0.5, 1.0).step
    whole = vector(small_radius, images, labels, hints, secure=secure)
    if secure:
        assert torch.equal(whole, whole.round())
    for left_out, expected in ((5, 1.0), (6, 0.0), (7, None)):
        kept = np.arange(130) != left_out
        moved = (whole - vector(small_radius, images[kept], labels[kept], hints, secure=secure)).norm() * unit
        assert moved <= 1 + 1e-9
        if expected is not None:
            assert moved == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("secure", [False, True])
def test_the_sum_has_noise(secure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, _, hints = images_and_hints()
    seen = []
    monkeypatch.setattr(CovarianceMechanism, "modes", lambda self, vector, basis, shape: seen.append(vector))
    empty = [(torch.zeros(0, *SHAPE), torch.zeros(0, dtype=torch.int64))]
    mechanism(noise=3.0).release(empty, hints, KEY.secure_stream("class_means") if secure else np.random.default_rng(0))
    assert kstest(seen[0] / 3.0, "norm").pvalue > 1e-3


def test_noise_is_told_from_signal() -> None:
    """Axes that are noise aren't released; those that stand out have their own variance, not that of the noise with it."""
    found = mechanism(noise=2.0, radius=10.0, size=3000, rank=5)
    basis, unit = np.eye(128), 10.0**2 / 3000
    edge = 2 * 2.0 * unit * math.sqrt(64)
    planted = np.diag([4 * edge, 2 * edge, 1.2 * edge] + [0.0] * 125)
    upper = np.triu_indices(128)
    truth = planted[upper] / unit * np.where(upper[0] == upper[1], 1, math.sqrt(2))
    draws = [
        found.modes(truth + 2.0 * np.random.default_rng(seed).standard_normal(len(truth)), basis, torch.Size(SHAPE)).variances.numpy()
        for seed in range(20)
    ]
    average = np.mean(draws, axis=0)
    np.testing.assert_allclose(average[:3], [4 * edge, 2 * edge, 1.2 * edge], rtol=0.08)
    assert (np.array(draws)[:, 3:] == 0).mean() > 0.6


def test_it_is_in_the_price() -> None:
    """With every image in every batch all mechanisms are Gaussian, and their mu^2 add up (Dong et al., arXiv 1905.02383)."""
    config = RunConfig(
        data=DataConfig(image_size=8, num_classes=3, expected_size=40), network=NetworkConfig(width=8),
        hints=HintsConfig(covariance_rank=3, covariance_share=0.3), private=PrivateConfig(batch_size=40, steps=10, epochs=None),
        privacy=PrivacyConfig(epsilon=5.0, delta=1e-3),
    )  # fmt: skip
    plan = PrivacyPlan.calibrate(config, 40)
    assert plan.class_means is not None and plan.covariance is not None
    parts = [10 / plan.noise_multiplier**2, 1 / plan.class_means.noise_multiplier**2, 1 / plan.covariance.noise_multiplier**2]
    assert gaussian_mu(plan.epsilon_after(10), plan.delta) == pytest.approx(sum(parts) ** 0.5, rel=5e-3)
    assert parts[2] == pytest.approx(0.3 * gaussian_mu(5.0, 1e-3) ** 2, rel=1e-6)
    assert [m.name for m in plan.mechanisms(3, means_releases=2)] == ["DP class means"] * 2 + ["DP covariance"] * 2 + ["DP-SGD"]
    assert PrivacyPlan.from_record(plan.record(), ()) == plan


def test_the_gaussian_denoiser_is_the_dense_closed_form() -> None:
    net = build_denoiser(RunConfig(
        data=DataConfig(image_size=8, num_classes=2), network=NetworkConfig(width=8), hints=HintsConfig(covariance_rank=3),
        stages=StagesConfig(tau1=-1, tau2=1.0, closed_form=True),
    ))  # fmt: skip
    assert isinstance(net, Denoiser)
    torch.manual_seed(0)
    modes = torch.linalg.qr(torch.randn(64, 3)).Q.T.unflatten(1, (1, 8, 8))
    variances = torch.tensor([9.0, 4.0, 0.5])
    net.set_class_means(torch.rand(2, 1, 8, 8))
    net.set_modes(modes, variances)
    v = modes.flatten(1).double()
    covariance = 0.25 * torch.eye(64).double() + v.T @ torch.diag(variances.double() - 0.25) @ v
    x, labels, sigma = torch.randn(4, 1, 8, 8) * 5, torch.tensor([0, 1, 1, 0]), torch.tensor([3.0, 8.0, 2.8, 0.5])
    found = net(x, sigma, labels)
    for row in range(3):  # above ln sigma = 1
        mean = net.class_means[labels[row]].flatten().double()
        gain = covariance @ torch.linalg.inv(covariance + sigma[row].double() ** 2 * torch.eye(64).double())
        expected = mean + gain @ (x[row].flatten().double() - mean)
        torch.testing.assert_close(found[row].flatten().double(), expected, rtol=1e-4, atol=1e-5)
    alone = net.by_network(x[3:], sigma[3:], labels[3:], None)
    torch.testing.assert_close(found[3:], alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(net(x[:3], sigma[:3], labels[:3]), found[:3])
    torch.testing.assert_close(net(x, sigma, labels, torch.zeros_like(x)), net.by_network(x, sigma, labels, torch.zeros_like(x)))


def test_a_run_whose_coarse_stage_is_in_closed_form(tmp_path, monkeypatch, capsys) -> None:
    from dpsyngen.pipeline import DPSynGenPipeline

    images = private_images(tmp_path / "images.npz")
    flags = ["--hints.covariance_rank=2", "--hints.covariance_share=0.5", "--hints.prototypes=2", "--stages.tau2=0", "--stages.closed_form=true"]
    for index, variant in enumerate(("finetune_all", "nonprivate")):
        run = tmp_path / str(index)
        call(train_main, *small(images, f"--stages.variant={variant}", *flags), "--run", run)
        call(sample_main, "--run", run, "--num-images", "8")
        pipeline = DPSynGenPipeline.from_pretrained(run / "model")
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.denoiser.denoiser.closed_form_above == 0
        with np.load(run / "samples/images.npz") as archive:
            np.testing.assert_array_equal(pipeline(num_images=8, seed=0, output_type="uint8").images, archive["images"])
    assert '"DP covariance"' in (tmp_path / "0/privacy.json").read_text()
    assert pipeline.denoiser.denoiser.variances.min() > 0
    capsys.readouterr()
    refused = refusal(train_main, monkeypatch, capsys, *small(images, "--stages.closed_form=true"), "--run", tmp_path / "2")
    assert "stages.closed_form" in refused
    refused = refusal(train_main, monkeypatch, capsys, *small(images, *flags, "--hints.covariance_share=0.95"), "--run", tmp_path / "2")
    assert "hints.covariance_share" in refused
