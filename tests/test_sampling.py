"""Samplers against closed-form denoisers; one seed per image; sample sets on disk."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dpsyngen.config import DataConfig, RunConfig, SamplingConfig
from dpsyngen.errors import InputError
from dpsyngen.guidance import Denoiser, guided
from dpsyngen.noise_levels import karras_grid
from dpsyngen.samples import describe_origin, model_sha256, read_samples, sample_grid, sampling_settings, write_samples
from dpsyngen.sampling import balanced_labels, ddim, generate, heun, image_noise

CPU = torch.device("cpu")
MEANS = torch.tensor([-0.4, 0.0, 0.3, 0.05])  # of three classes and the null class
STD = 0.2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gaussian(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """E[x0 | x] for x0 ~ N(m_y, s^2 I) and x = x0 + sigma n."""
    sigma, mean = sigma[:, None, None, None], MEANS[labels][:, None, None, None]
    return (sigma**2 * mean + STD**2 * x) / (sigma**2 + STD**2)


def two_points(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """E[x0 | x] for pixels that are -0.7 or 0.7 with probability one half each."""
    return 0.7 * torch.tanh(0.7 * x / sigma[:, None, None, None] ** 2)


def unused_noise() -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def starting_noise(n: int, sigma_max: float = 80.0) -> Tensor:
    return sigma_max * torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gaussian_ode(x: Tensor, sigma_max: float, labels: Tensor) -> Tensor:
    """The exact end of the probability flow ODE for `gaussian`: x - m shrinks in proportion to sqrt(s^2 + sigma^2)."""
    mean = MEANS[labels][:, None, None, None]
    return mean + (x - mean) * STD / math.sqrt(STD**2 + sigma_max**2)


@pytest.mark.parametrize(("sampler", "ratio"), [("ddim", 2), ("heun", 4)])
def test_order_of_convergence(sampler: str, ratio: int):
    x, labels = starting_noise(16, 5.0), torch.arange(16) % 3
    errors = []
    for steps in (20, 40, 80):
        sigmas = karras_grid(steps, 0.002, 5.0, 7.0)
        end = ddim(gaussian, x, sigmas, labels) if sampler == "ddim" else heun(gaussian, x, sigmas, labels, unused_noise)
        errors.append((end - gaussian_ode(x, 5.0, labels)).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert ratio / 1.35 < coarse / fine < ratio * 1.35, errors
    assert end.dtype == torch.float64


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_reaches_the_gaussian(sampler: str):
    x, labels = starting_noise(3000), torch.arange(3000) % 3
    sigmas = karras_grid(200 if sampler == "ddim" else 36, 0.002, 80.0, 7.0)
    end = ddim(gaussian, x, sigmas, labels) if sampler == "ddim" else heun(gaussian, x, sigmas, labels, unused_noise)
    for label in range(3):
        assert end[labels == label].mean().item() == pytest.approx(MEANS[label].item(), abs=0.015)
        assert end[labels == label].std().item() == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_reaches_both_points(sampler: str):
    x, labels = starting_noise(500), torch.zeros(500, dtype=torch.int64)
    sigmas = karras_grid(50, 0.002, 80.0, 7.0)
    end = ddim(two_points, x, sigmas, labels) if sampler == "ddim" else heun(two_points, x, sigmas, labels, unused_noise)
    torch.testing.assert_close(end.abs(), torch.full_like(end, 0.7), atol=1e-3, rtol=0)
    assert (end.sign() == x.sign()).all()  # the flow of a symmetric distribution keeps the sign


def test_churn_keeps_the_distribution_and_forgets_the_start():
    generator = torch.Generator().manual_seed(1)
    x, labels = starting_noise(3000), torch.zeros(3000, dtype=torch.int64)

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64)

    sigmas = karras_grid(60, 0.002, 80.0, 7.0)
    end = heun(gaussian, x, sigmas, labels, noise, s_churn=20.0)
    assert end.mean().item() == pytest.approx(MEANS[0].item(), abs=0.01)
    assert end.std().item() == pytest.approx(STD, rel=0.03)
    assert torch.corrcoef(torch.stack([end.flatten(), x.flatten()]))[0, 1].abs() < 0.5  # 1 without churn


def test_churn_follows_its_settings():
    x, labels, sigmas = starting_noise(2), torch.zeros(2, dtype=torch.int64), karras_grid(10, 0.002, 80.0, 7.0)
    seen: list[float] = []

    def recording(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        seen.append(sigma[0].item())
        return gaussian(x, sigma, labels)

    heun(recording, x, sigmas, labels, lambda: torch.ones_like(x), s_churn=2.0, s_min=1.0, s_max=30.0)
    first = seen[::2]  # Algorithm 2 evaluates at the raised level, then at the following one
    assert len(seen) == 2 * 10 - 1
    for level, sigma in zip(first, sigmas.tolist()[:-1], strict=True):
        assert level == pytest.approx(sigma * (1.2 if 1.0 <= sigma <= 30.0 else 1.0))
    seen.clear()
    heun(recording, x, sigmas, labels, lambda: torch.ones_like(x), s_churn=1000.0)
    assert seen[0] == pytest.approx(80 * math.sqrt(2))  # gamma is capped at sqrt(2) - 1
    plain = heun(gaussian, x, sigmas, labels, unused_noise)
    torch.testing.assert_close(heun(gaussian, x, sigmas, labels, lambda: torch.ones_like(x), s_churn=1000.0, s_min=90.0), plain)


def test_heun_matches_algorithm_2_written_out():
    """One step of the paper's pseudo-code, line by line, and the closing Euler step."""
    x, labels, noise = starting_noise(3, 2.0), torch.tensor([0, 1, 2]), starting_noise(3, 1.0).flip(0)
    gamma, s_noise = min(0.5 / 2, math.sqrt(2) - 1), 1.01
    t_hat = 2.0 + gamma * 2.0

    def d(x: Tensor, t: float) -> Tensor:
        return (x - gaussian(x.float(), torch.full((3,), t), labels).double()) / t

    x_hat = x + math.sqrt(t_hat**2 - 2.0**2) * (s_noise * noise)
    trial = x_hat + (0.5 - t_hat) * d(x_hat, t_hat)
    after_one = x_hat + (0.5 - t_hat) * (0.5 * d(x_hat, t_hat) + 0.5 * d(trial, 0.5))
    x_hat = after_one + math.sqrt((0.5 * (1 + gamma)) ** 2 - 0.5**2) * (s_noise * noise)
    end = x_hat - 0.5 * (1 + gamma) * d(x_hat, 0.5 * (1 + gamma))
    sigmas = torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(heun(gaussian, x, sigmas, labels, lambda: noise, s_churn=0.5, s_noise=s_noise), end, rtol=1e-6, atol=1e-6)


def test_guidance_formula_and_cost():
    calls: list[int] = []

    def counting(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(x))
        return gaussian(x, sigma, labels)

    x, sigma, labels = torch.randn(5, 1, 2, 2), torch.rand(5) + 0.1, torch.tensor([0, 1, 2, 0, 1])
    conditional, null = gaussian(x, sigma, labels), gaussian(x, sigma, torch.full((5,), 3))
    for scale in (0.0, 0.5, 1.0, 3.0):
        out = guided(counting, scale, 3)(x, sigma, labels)
        torch.testing.assert_close(out, null + scale * (conditional - null))
    assert calls == [5, 10, 5, 10]
    assert guided(counting, 1.0, 3) is counting


def test_guidance_moves_the_mean():
    """Between Gaussians of one variance, guidance by w samples from the Gaussian with mean m_null + w (m_y - m_null)."""
    labels = balanced_labels(1500, 3)
    images = generate(gaussian, SamplingConfig(guidance=1.5), labels, 0, (1, 2, 2), 3, CPU) / 127.5 - 1
    for label in range(3):
        expected = MEANS[3] + 1.5 * (MEANS[label] - MEANS[3])
        assert images[labels == label].mean() == pytest.approx(expected.item(), abs=0.02)


def test_labels_are_balanced():
    assert balanced_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert balanced_labels(3, 0).tolist() == [0, 0, 0]
    counts = np.bincount(balanced_labels(10007, 10))
    assert counts.max() - counts.min() == 1
    assert balanced_labels(5, 10).dtype == np.int64


def test_noise_of_an_image_is_its_own():
    together = image_noise(5, range(10), (1, 4, 4))
    first, second = together(), together()
    alone = image_noise(5, [7], (1, 4, 4))
    assert torch.equal(alone()[0], first[7]) and torch.equal(alone()[0], second[7])
    assert not torch.equal(first, second)
    assert len(torch.unique(torch.cat([first, second]))) == 2 * first.numel()
    other_seeds = [image_noise(seed, range(2), (1, 4, 4))() for seed in (0, 1, 2**32, 2**32 + 5, 2**80)]
    assert len(torch.unique(torch.stack(other_seeds))) == 5 * 32  # also seeds that agree in their lowest 32 bits
    many = image_noise(0, range(2000), (1, 4, 4))()
    assert many.dtype == torch.float32
    assert many.mean().abs() < 0.03 and (many.std() - 1).abs() < 0.02


@pytest.mark.parametrize("settings", [{"sampler": "ddim"}, {"sampler": "heun"}, {"sampler": "heun", "s_churn": 5.0}, {"guidance": 1.7}])
def test_image_is_the_same_in_any_batch(settings: dict):
    labels = balanced_labels(23, 3)
    whole = generate(gaussian, SamplingConfig(steps=6, batch_size=100, **settings), labels, 4, (3, 4, 4), 3, CPU)
    parts = generate(gaussian, SamplingConfig(steps=6, batch_size=5, **settings), labels, 4, (3, 4, 4), 3, CPU)
    fewer = generate(gaussian, SamplingConfig(steps=6, batch_size=100, **settings), labels[:9], 4, (3, 4, 4), 3, CPU)
    other = generate(gaussian, SamplingConfig(steps=6, batch_size=100, **settings), labels, 5, (3, 4, 4), 3, CPU)
    assert whole.shape == (23, 4, 4, 3) and whole.dtype == np.uint8
    assert np.array_equal(whole, parts) and np.array_equal(whole[:9], fewer)
    assert not np.array_equal(whole, other)


DISTRIBUTED = """
import sys
import numpy as np, torch
from accelerate import PartialState
from dpsyngen.config import SamplingConfig
from dpsyngen.sampling import balanced_labels, generate
sys.path.insert(0, sys.argv[1])
from test_sampling import gaussian
torch.set_num_threads(1)
state = PartialState(cpu=True)
assert state.num_processes == 2
images = generate(gaussian, SamplingConfig(steps=6, batch_size=4, s_churn=5.0), balanced_labels(11, 3), 4, (1, 4, 4), 3, state.device,
                  rank=state.process_index, processes=2)
np.save(f"{sys.argv[2]}/{state.process_index}.npy", images)
state.destroy_process_group()
"""


def test_image_is_the_same_on_any_number_of_processes(tmp_path: Path):
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(script), str(root / "tests"), str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    alone = generate(gaussian, SamplingConfig(steps=6, batch_size=100, s_churn=5.0), balanced_labels(11, 3), 4, (1, 4, 4), 3, CPU)
    for rank in range(2):
        assert np.array_equal(np.load(tmp_path / f"{rank}.npy"), alone)


def test_generate_refuses_what_it_cannot_do():
    def diverged(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return x * math.nan

    with pytest.raises(InputError, match="not finite"):
        generate(diverged, SamplingConfig(steps=2), balanced_labels(2, 0), 0, (1, 4, 4), 0, CPU)
    with pytest.raises(InputError, match=r"sampling\.guidance"):
        generate(gaussian, SamplingConfig(steps=2, guidance=2.0), balanced_labels(2, 0), 0, (1, 4, 4), 0, CPU)


def test_sample_set_round_trip(tmp_path: Path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (23, 8, 8, 3), dtype=np.uint8), balanced_labels(23, 4)
    target = tmp_path / "new" / "samples"
    for _ in range(2):  # a second write replaces the first
        write_samples(target, images, labels, {"seed": 3})
        got_images, got_labels = read_samples(target)
        assert np.array_equal(got_images, images) and np.array_equal(got_labels, labels)
        assert got_labels.dtype == np.int64
        assert sorted(path.name for path in target.iterdir()) == ["grid.png", "images.npz", "provenance.json"]
    record = json.loads((target / "provenance.json").read_text())
    assert record["seed"] == 3 and record["images"]["shape"] == [23, 8, 8, 3]
    with Image.open(target / "grid.png") as picture:
        assert np.array_equal(np.asarray(picture), sample_grid(images, labels))


def test_a_failed_write_leaves_nothing_half_written(tmp_path: Path):
    images, labels = np.zeros((3, 8, 8, 1), dtype=np.uint8), balanced_labels(3, 3)
    write_samples(tmp_path, images, labels, {})
    with pytest.raises(TypeError):
        write_samples(tmp_path, images + 1, labels, {"not JSON": object()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "images.npz"]  # no provenance of other images
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="file"):
        write_samples(file, images, labels, {})


def test_bad_sample_sets_are_refused(tmp_path: Path):
    good = np.zeros((3, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(3)
    bad_sets: list[dict] = [
        {"images": good},
        {"images": good.astype(np.float32), "labels": labels},
        {"images": good[..., 0], "labels": labels},
        {"images": good.repeat(2, axis=3), "labels": labels},
        {"images": good[:0], "labels": labels[:0]},
        {"images": good, "labels": labels[:2]},
        {"images": good, "labels": labels.astype(np.float64)},
        {"images": good, "labels": labels - 1},
        {"images": np.array([None, {}]), "labels": labels},
    ]
    path = tmp_path / "images.npz"
    with pytest.raises(InputError, match="no such file"):
        read_samples(tmp_path)
    for arrays in bad_sets:
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=r"images\.npz: expected") as refusal:
            read_samples(tmp_path)
        assert "\n" not in str(refusal.value)
    np.savez_compressed(path, images=good, labels=labels)
    whole = path.read_bytes()
    for broken in (b"", b"not a zip", whole[: len(whole) // 2], whole[:60] + b"x" * 20 + whole[80:]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"images\.npz: expected"):
            read_samples(tmp_path)


def test_grid_has_a_row_per_class():
    labels = balanced_labels(36, 3)
    images = np.broadcast_to((50 * labels).astype(np.uint8)[:, None, None, None], (36, 32, 32, 1)).copy()
    grid = sample_grid(images, labels)
    assert grid.shape == (3 * 68 + 4, 10 * 68 + 4, 1)  # 32 pixels are enlarged to 64, with 4 between
    for row in range(3):
        tiles = grid[4 + 68 * row : 68 * (row + 1), 4:68]
        assert (tiles == 50 * row).all()
    assert (grid[:4] == grid[0, 0]).all()
    assert sample_grid(images, np.zeros(36, dtype=np.int64)).shape == (4 * 68 + 4, 10 * 68 + 4, 1)
    assert sample_grid(images[:2], labels[:2]).shape == (2 * 68 + 4, 68 + 4, 1)
    assert len(sample_grid(np.zeros((30, 128, 128, 3), np.uint8), np.arange(30))) == 20 * 132 + 4


def test_origin_is_public_json_and_tells_models_apart():
    model, config = nn.Linear(2, 3), RunConfig(data=DataConfig(source="npz", path="/secret/patients.npz"))
    origin = describe_origin(config, model)
    text = json.dumps(origin, allow_nan=False)
    assert origin["sampling"]["s_max"] == "inf" and origin["seed"] == 0 and origin["run"] == "run"
    assert "secret" not in text and str(config.data.expected_size) not in text
    before = model_sha256(model)
    assert before == model_sha256(model) == origin["model_sha256"]
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert model_sha256(model) != before


def test_settings_read_back_from_json_as_they_are_told():
    config = RunConfig(sampling=SamplingConfig(teacher_range=(-math.inf, math.inf)))
    settings = sampling_settings(config)
    assert settings["teacher_range"] == ["-inf", "inf"] and settings["s_max"] == "inf" and settings["steps"] == config.sampling.steps
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings
    assert set(settings) == {field.name for field in dataclasses.fields(SamplingConfig)}


def test_every_sampling_setting_reaches_the_sampler():
    """Changing any one setting that should matter changes the images; the number asked for, what a teacher does, and the batch size don't."""
    base = SamplingConfig(steps=6, s_churn=2.0, s_min=0.01, s_max=50.0)
    changes = {
        "sampler": "ddim", "steps": 7, "sigma_min": 0.1, "sigma_max": 60.0, "rho": 5.0, "s_churn": 1.0, "s_min": 5.0, "s_max": 4.0,
        "s_noise": 1.2, "guidance": 1.5,
    }  # fmt: skip
    of_a_teacher = {"attempts", "teacher_guidance", "teacher_temperature", "teacher_range"}
    assert set(changes) | of_a_teacher | {"num_images", "batch_size"} == {field.name for field in dataclasses.fields(SamplingConfig)}
    denoiser: Denoiser = gaussian

    def images(config: SamplingConfig) -> np.ndarray:
        return generate(denoiser, config, balanced_labels(6, 3), 0, (1, 8, 8), 3, CPU)

    reference = images(base)
    for name, value in changes.items():
        extra = {"s_churn": 0.0} if name == "sampler" else {}
        assert not np.array_equal(images(dataclasses.replace(base, **{name: value}, **extra)), reference), name
    assert np.array_equal(images(dataclasses.replace(base, num_images=1, batch_size=2)), reference)
