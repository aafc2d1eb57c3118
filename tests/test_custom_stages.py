"""Stages of one's own: several private ones in one network or in turn, none at all, and what is refused."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from running import KEY, TINY, WEIGHTS, call, files, lines, needs_full_device, private_images, refusal, sample_main, small, train_main
from safetensors.torch import load_file
from test_privacy_rules import dataset, plan_with, randomised, tiny_config
from test_resume import FIXED, TEN, interrupt
from torch import Tensor, nn

from dpsyngen.cli import read_config
from dpsyngen.compute import Compute
from dpsyngen.config import PrivacyConfig, RunConfig, StageConfig, StagesConfig
from dpsyngen.denoiser import RoutedDenoiser, build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.loss import Draws, denoising_loss
from dpsyngen.noise_levels import mixture, stages_of
from dpsyngen.ordinary_step import Lesson, OrdinaryStep, synthetic_batches
from dpsyngen.phases import private_phase
from dpsyngen.pipeline import DPSynGenPipeline
from dpsyngen.planning import plan_run
from dpsyngen.privacy.journal import Journal
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.private_step import PrivateStep
from dpsyngen.privacy.randomness import PrivateKey
from dpsyngen.run_directory import RunDirectory

ROUTED = """
stages:
  variant: custom
  holder: routed
  custom:
    - {name: coarse, source: synthetic, lower: 1, sigma_draw: uniform, family: salt_and_pepper}
    - {name: middle, source: private, lower: -1, upper: 1, weight: 2}
    - {name: fine, source: private, upper: -1, sigma_draw: uniform}
"""
SHARED = """
stages:
  variant: custom
  custom:
    - {name: synthetic, source: synthetic, p_mean: 0}
    - {name: low, source: private, upper: -1}
    - {name: high, source: private, lower: -2, weight: 3}
"""
PUBLIC = """
stages:
  variant: custom
  custom: [{name: low, source: synthetic, upper: 0}, {name: high, source: synthetic, lower: 0, family: salt_and_pepper}]
"""


def with_stages(config: RunConfig, *custom: StageConfig, holder: str = "shared") -> RunConfig:
    return dataclasses.replace(config, stages=StagesConfig("custom", holder=holder, custom=custom))  # type: ignore[arg-type]


def overlay(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "stages.yaml"
    file.write_text(text)
    return file


def arguments(tmp_path: Path, text: str, *flags: object) -> list[object]:
    return ["--config", TINY, "--config", overlay(tmp_path, text), *small(private_images(tmp_path / "images.npz"), *flags)[2:]]


# Several private stages in one network.


def test_sigma_of_each_row_comes_from_the_mixture_and_the_image_is_clipped_over_all_its_rows(tmp_path: Path) -> None:
    """One image of K rows, some in either stage, without noise: its gradient is that of the mean over all, and C long."""
    low, high = StageConfig("low", "private", upper=-1.0, sigma_draw="uniform"), StageConfig("high", "private", lower=1.0, weight=3.0)
    config = with_stages(tiny_config(batch_size=40, copies=64), low, high)
    plan, key = plan_with(config, noise_multiplier=0.0, clipping_norm=0.01), PrivateKey.fixed(KEY)
    journal = Journal(tmp_path / "journal.jsonl")
    journal.open_attempt("test", "start")
    denoiser, images = randomised(config), dataset(1)
    PrivateStep(denoiser, mixture(stages_of(config, "private")), images, plan, key, journal, config, Compute(torch.device("cpu")))(0)
    found = torch.cat([parameter.grad.flatten() for parameter in denoiser.parameters() if parameter.grad is not None]) * 40

    rng = key.substream("draws", attempt=0, step=0, chunk=0)
    uniform = rng.random(64)
    first = uniform < 1 / 4
    assert 5 < first.sum() < 30
    parts = stages_of(config, "private")
    below, above = parts[0].sigma_draw.log_sigma(uniform * 4 % 1), parts[1].sigma_draw.log_sigma(np.clip(uniform - 1 / 4, 0, 1) / (3 / 4))
    log_sigma = np.where(first, below, above)
    dropped = torch.from_numpy(rng.random(64) < 0.1)
    noise = torch.from_numpy(rng.standard_normal((64, 1, 8, 8), dtype=np.float32))
    x, label = images.batch(np.arange(1))
    draws = Draws(torch.from_numpy(np.exp(log_sigma).astype(np.float32)), noise, torch.where(dropped, 3, label))
    loss = denoising_loss(denoiser, x.expand(64, -1, -1, -1), draws).mean()
    expected = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(denoiser.parameters()))])
    assert expected.norm() > 0.01
    assert 0.9 * 0.01 < found.norm() <= 0.01
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=1e-3, atol=1e-5)


# Several private stages in turn.


def routed_phase(tmp_path: Path, config: RunConfig, size: int, name: str) -> tuple[RoutedDenoiser, object]:
    torch.manual_seed(1)
    denoiser = build_denoiser(config)
    assert isinstance(denoiser, RoutedDenoiser)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    run, compute = RunDirectory(tmp_path / name), Compute(torch.device("cpu"))
    run.key.parent.mkdir(parents=True)
    plan = PrivacyPlan.calibrate(config, 40)
    ledger = Ledger.open(config, plan, run, compute, lambda: "data", reached=0, has_class_means=False, weights="start", computed_by=None)
    return denoiser, private_phase(config, denoiser, dataset(size), plan, ledger, compute)


def test_private_stages_of_their_own_networks_take_turns_by_weight_and_not_by_data(tmp_path: Path) -> None:
    fixed = dataclasses.replace(tiny_config(), privacy=PrivacyConfig(epsilon=5.0, delta=1e-3, unsafe_fixed_key=KEY))
    private = StageConfig("a", "private", upper=0.0), StageConfig("b", "private", lower=0.0, upper=1.0, weight=3.0)
    config, orders = with_stages(fixed, *private, StageConfig("c", "synthetic", lower=1.0), holder="routed"), []
    for size in (40, 1):
        denoiser, phase = routed_phase(tmp_path, config, size, f"run-{size}")
        order = []
        for step in range(8):
            phase.gradient(step)  # type: ignore[attr-defined]
            trained = [name for name in "abc" if any(parameter.grad is not None for parameter in denoiser.expert(name).parameters())]
            assert len(trained) == 1
            assert all(parameter.grad is not None for parameter in denoiser.expert(trained[0]).parameters())
            order += trained
        orders.append(order)
        journalled = [entry["step"] for entry in lines(tmp_path / f"run-{size}/private/journal.jsonl") if "step" in entry]
        assert journalled == list(range(8))
    assert orders[0] == orders[1]
    assert orders[0].count("a") == 2 and orders[0].count("b") == 6


@needs_full_device
def test_turns_go_on_after_an_interruption_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the network of a stage that private images don't teach stays as it was."""
    given = arguments(tmp_path, ROUTED, *[flag for flag in TEN if "variant" not in str(flag)], FIXED, "--synthetic.steps=0")
    call(train_main, *given, "--tracking.log_every=7", "--run", tmp_path / "whole")
    capsys.readouterr()
    interrupt(tmp_path / "cut", given, monkeypatch, capsys, step=7)
    call(train_main, *given, "--tracking.log_every=7", "--run", tmp_path / "cut")
    found = [{name: content for name, (content, _) in files(tmp_path / run).items() if "private/" not in name} for run in ("whole", "cut")]
    assert found[0] == found[1]
    start = build_denoiser(read_config([tmp_path / "whole/config.yaml"])).state_dict()
    trained = {name.removeprefix("denoiser."): tensor for name, tensor in load_file(tmp_path / "whole" / WEIGHTS).items()}
    moved = {name.split(".")[1] for name in start if not torch.equal(trained[name], start[name])}
    assert moved == {"middle", "fine"}


# Whole runs.


@pytest.mark.parametrize(("text", "hints"), [(ROUTED, "class_means"), (SHARED, "none")])
def test_a_run_with_several_private_stages(text: str, hints: str, tmp_path: Path) -> None:
    call(train_main, *arguments(tmp_path, text, f"--hints.kind={hints}"), "--run", tmp_path / "run")
    report = json.loads((tmp_path / "run/privacy.json").read_text())
    assert 9.9 < report["epsilon"] <= 10 and report["steps_begun"] == 3
    call(sample_main, "--run", tmp_path / "run", "--num-images", "5", "--seed=3", "--sampling.sigma_max=2")
    pipeline = DPSynGenPipeline.from_pretrained(tmp_path / "run/model")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(num_images=5, seed=3, output_type="uint8").images
    call(sample_main, "--run", tmp_path / "run", "--num-images", "5", "--seed=3", "--out", tmp_path / "drawn")
    with np.load(tmp_path / "drawn/images.npz") as archive:
        assert np.array_equal(archive["images"], drawn)


@pytest.mark.parametrize("hints", ["none", "class_means"])
def test_without_private_stages_only_class_means_are_paid_for(hints: str, tmp_path: Path) -> None:
    given = arguments(tmp_path, PUBLIC, f"--hints.kind={hints}")
    call(train_main, *given, "--run", tmp_path / "run")
    report = json.loads((tmp_path / "run/privacy.json").read_text())
    assert report["status"] == "finished" and report["steps_begun"] == 0
    assert [mechanism["name"] for mechanism in report["mechanisms"]] == ["DP class means"] * (hints == "class_means")
    assert report["epsilon"] == 0 if hints == "none" else 1 < report["epsilon"] < 5
    assert {line["phase"] for line in lines(tmp_path / "run/metrics.jsonl")} == {"synthetic"}
    model, other = (tmp_path / "run" / WEIGHTS).read_bytes(), tmp_path / "other"
    private_images(tmp_path / "images.npz", seed=1)
    call(train_main, *given, "--run", other)
    assert ((other / WEIGHTS).read_bytes() == model) == (hints == "none")  # nothing private is in it


def test_a_synthetic_batch_is_divided_by_weight_and_each_stage_has_its_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (StageConfig("a", "synthetic", upper=0.0, weight=1.0), StageConfig("b", "synthetic", family="salt_and_pepper", weight=3.0))
    config = with_stages(tiny_config(chunk_size=4), *parts)
    denoiser, places = randomised(config), {"a": [], "b": []}  # type: ignore[var-annotated]

    def watched(stage, batches):
        def batch(indices: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
            places[stage.name] += indices.tolist()
            return batches(indices, rng)

        return batch

    lessons = tuple(Lesson(stage, denoiser, watched(stage, synthetic_batches(config, stage))) for stage in stages_of(config, "synthetic"))
    step = OrdinaryStep(lessons, 10, config.synthetic, config, Compute(torch.device("cpu")), public=True)
    for number in range(4):
        step(number)
    assert sorted(places["a"] + places["b"]) == list(range(40))
    assert len(places["a"]) == 10


def test_the_plan_of_a_run_lists_its_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(train_main, *arguments(tmp_path, ROUTED), "--dry-run")
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "salt_and_pepper images, uniform in ln sigma from 1 to 4.38",
        "ln sigma in [-1, 1] from private images, lognormal of -1.2 and 1.2, 0.667",
        "uniform in ln sigma from -6.21 to -1, 0.333 of its phase",
    ):
        assert part in said
    found = plan_run(read_config([TINY, overlay(tmp_path, PUBLIC)]))
    assert (found.private_steps, found.privacy and found.privacy.steps) == (0, 0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stages.custom=[{name: a, source: private, upper: 0}]"], "--stages.custom: expected stages without gap or overlap, .* a gap from 0 on"),
        (["--stages.custom=[{name: train, source: private}]"], "stages.custom: expected a stage name that torch doesn't use itself, got train"),
        (["--stages.replay=1"], "--stages.replay: expected 0, since with stages.holder routed"),
        (["--stages.variant=dpdm"], "stages.custom: expected no stages, since stages.variant is dpdm"),
        (["--stages.custom=[{name: a, source: synthetic, family: nosuch}]"], "stages.custom: stage a: family: unknown generator 'nosuch'"),
        (["--sampling.sigma_min=0.5", "--sampling.sigma_max=2"], "stages.custom: stage coarse: sigma_draw: expected a range of ln sigma that begins"),
    ],
)
def test_stages_that_cannot_be_used_are_refused_before_anything_is_written(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ROUTED if not any("custom=" in flag for flag in flags) else "stages: {variant: custom, holder: routed}"
    found = refusal(train_main, monkeypatch, capsys, *arguments(tmp_path, text, *flags), "--run", tmp_path / "run")
    assert re.search(said, found), found
    assert not (tmp_path / "run").exists()


def test_nonprivate_stages_void_the_guarantee() -> None:
    config = RunConfig(stages=StagesConfig("custom", custom=(StageConfig("a", "synthetic"), StageConfig("b", "nonprivate"))))
    assert not config.is_private and config.private_steps(4096) == 300
    with pytest.raises(InputError, match="not both"):
        StagesConfig("custom", custom=(StageConfig("a", "private"), StageConfig("b", "nonprivate")))
