"""Stages at lower resolution: blocks of pixels, the closed-form denoiser, what is trained, whole runs, and what is refused."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from running import KEY, TINY, WEIGHTS, call, private_images, refusal, sample_main, small, train_main
from safetensors.torch import load_file
from test_privacy_rules import plan_with, tiny_config
from torch import Tensor, nn

from dpsyngen.augmentation import moved
from dpsyngen.cli import read_config
from dpsyngen.compute import Compute
from dpsyngen.config import DataConfig, HintsConfig, RunConfig, StageConfig, StagesConfig
from dpsyngen.data import ImageDataset
from dpsyngen.denoiser import Denoiser, RoutedDenoiser, build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.loss import Draws, denoising_loss
from dpsyngen.networks.padded import Padded
from dpsyngen.noise_levels import mixture, stages_of
from dpsyngen.pipeline import DPSynGenPipeline
from dpsyngen.planning import plan_run
from dpsyngen.privacy.journal import Journal
from dpsyngen.privacy.private_step import PrivateStep
from dpsyngen.privacy.randomness import PrivateKey
from dpsyngen.resolution import pooled, upsampled

DATA_STD, DETAIL_STD = 0.5, 0.2
HALF = """
stages:
  variant: custom
  holder: routed
  custom:
    - {name: fine, source: synthetic, upper: -0.5}
    - {name: middle, source: private, lower: -0.5, upper: 1.5, downsampling: 2, pretrained: true, weight: 2, family: salt_and_pepper}
    - {name: coarse, source: synthetic, lower: 1.5, downsampling: 2}
"""


# Blocks of pixels.


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_what_is_upsampled_is_pooled_to_what_it_was(factor: int) -> None:
    z, x = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4 * factor, 4 * factor)
    torch.testing.assert_close(pooled(upsampled(z, factor), factor), z)
    detail = x - upsampled(pooled(x, factor), factor)
    torch.testing.assert_close(pooled(detail, factor), torch.zeros_like(z), rtol=0, atol=1e-6)
    torch.testing.assert_close((detail * upsampled(z, factor)).sum(), torch.tensor(0.0), rtol=0, atol=1e-4)


def test_pooled_noise_is_independent_and_as_many_times_weaker() -> None:
    torch.manual_seed(0)
    noise = pooled(3 * torch.randn(40_000, 1, 4, 4), 2).flatten(1)
    torch.testing.assert_close(noise.T.cov(), torch.eye(4) * 1.5**2, rtol=0, atol=0.06)


# The denoiser.


class Perfect(nn.Module):
    """The network that makes the denoiser exact for low-resolution images N(hint, covariance): it knows the noise level from c_noise."""

    def __init__(self, covariance: Tensor, hinted: bool) -> None:
        super().__init__()
        self.covariance, self.hinted = covariance, hinted

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        scaled, (n, _, side, _) = x[:, :1], x.shape
        out = torch.empty(n, side**2)
        for row, sigma in enumerate(torch.exp(4 * c_noise).tolist()):
            total = sigma**2 + DATA_STD**2
            gain = self.covariance @ torch.linalg.inv(self.covariance + sigma**2 * torch.eye(side**2))
            factor = (gain - DATA_STD**2 / total * torch.eye(side**2)) / (sigma * DATA_STD / total**0.5)
            out[row] = factor @ (scaled[row].flatten() * total**0.5)
        return out.view(n, 1, side, side)


@pytest.mark.parametrize("hinted", [False, True])
def test_a_perfect_network_for_pooled_images_gives_the_closed_form_of_gaussian_images(hinted: bool) -> None:
    """Images m + up(z) + detail, z Gaussian with any covariance, the detail white within the blocks."""
    torch.manual_seed(0)
    root = torch.randn(16, 16) / 4
    net = Denoiser(Perfect(root @ root.T, hinted), (1, 8, 8), 2, parameterisation="edm", sigma_data=DATA_STD, hinted=hinted, downsampling=2,
                   detail_std=DETAIL_STD)  # fmt: skip
    means = 2 * torch.rand(2, 1, 8, 8) - 1
    if hinted:
        net.set_class_means(means)
    up = upsampled(torch.eye(16).view(16, 1, 4, 4), 2).view(16, 64).T.double()
    covariance = up @ (root @ root.T).double() @ up.T + DETAIL_STD**2 * (torch.eye(64) - up @ up.T / 4)
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.05, 0.3, 1.0, 20.0]), torch.tensor([0, 1, 1, 0])
    found = net(x, sigma, labels)
    for row in range(4):
        m = means[labels[row]].flatten().double() if hinted else torch.zeros(64)
        expected = m + covariance @ torch.linalg.solve(covariance + sigma[row].double() ** 2 * torch.eye(64), x[row].flatten().double() - m)
        torch.testing.assert_close(found[row].flatten().double(), expected, rtol=1e-3, atol=1e-4)


def low(hinted: bool = False, image_size: int = 12) -> Denoiser:
    """A denoiser for means over 2 x 2 pixels with random weights."""
    config = dataclasses.replace(
        tiny_config(hints="class_means" if hinted else "none"), data=DataConfig(image_size=image_size, num_classes=3, expected_size=40),
        stages=StagesConfig("custom", holder="routed", custom=(StageConfig("all", "private", downsampling=2),)),
    )  # fmt: skip
    denoiser = build_denoiser(config)
    assert isinstance(denoiser, RoutedDenoiser)
    torch.manual_seed(1)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    return denoiser.expert("all")


def test_a_side_that_is_no_multiple_of_four_is_padded_and_cropped() -> None:
    net = low()
    assert isinstance(net.backbone, Padded) and net.network_shape == (1, 6, 6)
    x, c_noise, labels = torch.randn(3, 1, 6, 6), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    inner = net.backbone.backbone(nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), c_noise, labels)
    torch.testing.assert_close(net.backbone(x, c_noise, labels), inner[:, :, 1:7, 1:7])
    assert not isinstance(low(image_size=8).backbone, Padded)


@pytest.mark.parametrize("hinted", [False, True])
def test_the_loss_is_that_of_pooled_images_at_the_lower_noise_level(hinted: bool) -> None:
    net, n = low(hinted), 6
    if hinted:
        net.set_class_means(2 * torch.rand(3, 1, 12, 12) - 1)
    x, sigma, noise, labels = torch.randn(n, 1, 12, 12), torch.rand(n) + 0.1, torch.randn(n, 1, 6, 6), torch.randint(4, (n,))
    moves = torch.tensor([[0, 0, 1], [1, 0, 0], [0, -2, 1], [1, 1, 1], [0, 0, 0], [1, 2, -1]])
    still = Draws(sigma, noise, labels)
    found = denoising_loss(net, x, still)
    clean, level = pooled(x, 2), sigma / 2
    estimate = net.by_network(clean + level[:, None, None, None] * noise, level, labels)
    c_out = level * 0.5 / torch.sqrt(level**2 + 0.25)
    torch.testing.assert_close(found, ((estimate - clean) ** 2).mean(dim=(1, 2, 3)) / c_out**2)
    detail = torch.randn_like(x)
    detail -= upsampled(pooled(detail, 2), 2)
    torch.testing.assert_close(denoising_loss(net, x + detail, still), found)
    hint = moved(net.class_means[labels], moves) if hinted else None  # images and hints are moved by whole pixels of theirs
    expected = denoising_loss(net, moved(x, moves), still, hint)
    torch.testing.assert_close(denoising_loss(net, x, Draws(sigma, noise, labels, moves), hints_moved=hinted), expected)
    assert not torch.allclose(expected, found)


def test_a_private_step_at_half_resolution_is_what_a_loop_over_images_computes(tmp_path: Path) -> None:
    custom = (StageConfig("all", "private", downsampling=2, sigma_draw="uniform"),)
    config = dataclasses.replace(
        tiny_config(batch_size=40, copies=3, chunk_size=64), data=DataConfig(image_size=12, num_classes=3, expected_size=40),
        stages=StagesConfig("custom", holder="routed", custom=custom),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = ImageDataset(rng.integers(0, 256, (5, 1, 12, 12), dtype=np.uint8), rng.integers(0, 3, 5), ("a", "b", "c"))
    plan, key, net = plan_with(config, noise_multiplier=0.0, clipping_norm=0.3), PrivateKey.fixed(KEY), low()
    journal = Journal(tmp_path / "journal.jsonl")
    journal.open_attempt("test", "start")
    (stage,) = stages_of(config, "private")
    PrivateStep(net, mixture((stage,)), images, plan, key, journal, config, Compute(torch.device("cpu")))(0)
    found = torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None]) * 40

    rng = key.substream("draws", attempt=0, step=0, chunk=0)
    sigma = torch.from_numpy(np.exp(stage.sigma_draw.log_sigma(rng.random(15))).astype(np.float32))
    dropped = torch.from_numpy(rng.random(15) < 0.1)
    noise = torch.from_numpy(rng.standard_normal((15, 1, 6, 6), dtype=np.float32))
    x, labels = images.batch(np.arange(5))
    draws = Draws(sigma, noise, torch.where(dropped, 3, labels.repeat_interleave(3)))
    expected = torch.zeros_like(found)
    for image in range(5):
        loss = denoising_loss(net, x[image].expand(3, -1, -1, -1), draws.rows(slice(3 * image, 3 * image + 3))).mean()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
        expected += gradient * min(1.0, 0.3 * (1 - 1e-4) / gradient.norm().item())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


# Whole runs.


def overlay(tmp_path: Path, text: str = HALF) -> Path:
    file = tmp_path / "stages.yaml"
    file.write_text(text)
    return file


def arguments(tmp_path: Path, *flags: object) -> list[object]:
    data = small(private_images(tmp_path / "images.npz"), "--data.image_size=12", *flags)[2:]
    return ["--config", TINY, "--config", overlay(tmp_path), *data]


@pytest.mark.parametrize("hints", [("--hints.kind=none",), ("--hints.prototypes=2", "--private.augment_shift=1", "--private.augment_hints=true")])
def test_a_run_with_stages_at_half_resolution(hints: tuple[str, ...], tmp_path: Path) -> None:
    call(train_main, *arguments(tmp_path, *hints), "--run", tmp_path / "run")
    pipeline = DPSynGenPipeline.from_pretrained(tmp_path / "run/model")
    assert pipeline.denoiser.denoiser.expert("middle").network_shape == (1, 6, 6)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(num_images=5, seed=3, output_type="uint8").images
    call(sample_main, "--run", tmp_path / "run", "--num-images", "5", "--seed=3")
    with np.load(tmp_path / "run/samples/images.npz") as archive:
        assert archive["images"].shape == (5, 12, 12, 1) and np.array_equal(archive["images"], drawn)


def test_programmatic_images_teach_a_pretrained_network_its_range_first(tmp_path: Path) -> None:
    config = read_config([TINY, overlay(tmp_path)])
    before = [(stage.name, stage.lower, stage.upper, stage.family) for stage in stages_of(config, "synthetic")]
    assert before == [("fine", -math.inf, -0.5, "dead_leaves"), ("middle", -0.5, 1.5, "salt_and_pepper"), ("coarse", 1.5, math.inf, "dead_leaves")]
    assert [(stage.name, stage.family) for stage in stages_of(config, "private")] == [("middle", "")]
    call(train_main, *arguments(tmp_path, "--synthetic.steps=6", "--private.steps=0", "--hints.kind=none"), "--run", tmp_path / "run")
    start = build_denoiser(read_config([tmp_path / "run/config.yaml"])).state_dict()
    trained = {name.removeprefix("denoiser."): tensor for name, tensor in load_file(tmp_path / "run" / WEIGHTS).items()}
    assert {name.split(".")[1] for name in start if not torch.equal(trained[name], start[name])} == {"fine", "middle", "coarse"}


def test_the_plan_tells_resolutions_and_counts_less_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(tmp_path)
    call(train_main, *given, "--dry-run")
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"stage middle ln sigma in \[-0.5, 1.5\] from private images, [^,]*, at 1/2 of the resolution", said), said
    whole, half = (
        plan_run(dataclasses.replace(RunConfig(), hints=HintsConfig("none"), stages=StagesConfig("custom", holder="routed", custom=(stage,))))
        for stage in (StageConfig("all", "private"), StageConfig("all", "private", downsampling=2))
    )
    assert whole.parameters == half.parameters and half.memory < 0.6 * whole.memory


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stages.holder=shared"], "stage middle: downsampling: expected 1, since stages.holder is shared"),
        (["--data.image_size=8", "--stages.custom=[{name: a, source: private, downsampling: 3}]"], "stage a: downsampling: expected a divisor"),
        (["--data.image_size=8", "--stages.custom=[{name: a, source: private, downsampling: 4}]"], "leaves at least 4 pixels, got 4"),
        (["--stages.custom=[{name: a, source: private, downsampling: 0}]"], "stage a: downsampling: expected an integer >= 1"),
        (["--stages.custom=[{name: a, source: private, detail_std: -1}]"], "stage a: detail_std: expected a finite number >= 0"),
        (["--stages.custom=[{name: a, source: synthetic, pretrained: true}]"], "stage a: pretrained: expected false, since its source is synthetic"),
        (["--stages.closed_form=true", "--hints.covariance_rank=2"], "stage middle: downsampling: expected 1, since stages.closed_form"),
    ],
)
def test_resolutions_that_cannot_be_used_are_refused_before_anything_is_written(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(train_main, monkeypatch, capsys, *arguments(tmp_path, *flags), "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_in_a_shared_network_a_synthetic_stage_pretrains() -> None:
    with pytest.raises(InputError, match=r"stage a: pretrained: expected false, since stages\.holder is shared"):
        StagesConfig("custom", custom=(StageConfig("a", "private", pretrained=True),))
