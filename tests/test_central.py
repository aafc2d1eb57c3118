"""The central phase: it learns from released class means alone, costs nothing, and goes on where it was stopped."""

import dataclasses
import shutil
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from running import KEY, call, files, lines, needs_full_device, private_images, refusal, small, train_main, weights
from test_privacy_rules import dataset, randomised
from test_replay import OTHER_KEY, config_of, flat, gradients
from test_resume import interrupt
from torch import Tensor

from dpsyngen.cli import read_config
from dpsyngen.compute import Compute
from dpsyngen.config import CentralConfig, HintsConfig, RunConfig, StageConfig, StagesConfig
from dpsyngen.data import deformed
from dpsyngen.denoiser import Denoiser
from dpsyngen.errors import InputError
from dpsyngen.loss import denoising_loss, draw
from dpsyngen.noise_levels import central_stages
from dpsyngen.ordinary_step import central_batches
from dpsyngen.phases import central_phase
from dpsyngen.planning import print_plan
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.randomness import PrivateKey
from dpsyngen.sigma_draws import TruncatedNormal

CLASSES, PARTS = 3, 2
CPU = torch.device("cpu")
STAGES = (
    StageConfig("low", "private", upper=0.5, sigma_draw="uniform"),
    StageConfig("high", "private", lower=-0.5, weight=2.0, p_mean=-5.0),
    StageConfig("grain", "synthetic", upper=0.0),
)


def config_with(central: CentralConfig, *, at_once: int = 1) -> RunConfig:
    config = config_of(0.0)
    return dataclasses.replace(
        config, hints=HintsConfig(prototypes=PARTS), stages=StagesConfig("custom", custom=STAGES), central=central,
        compute=dataclasses.replace(config.compute, chunks_at_once=at_once),
    )  # fmt: skip


def released(config: RunConfig) -> Denoiser:
    """A denoiser with prototypes and shares."""
    denoiser = randomised(config)
    means = torch.rand(CLASSES * PARTS, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    denoiser.set_class_means(means, torch.tensor([0.75, 0.25]).repeat(CLASSES))
    return denoiser


def test_central_images_are_the_prototypes_by_their_shares() -> None:
    config = config_with(CentralConfig(deformation=0.0))
    denoiser = released(config)
    images, labels, hints = central_batches(config, denoiser)(np.arange(6000), np.random.default_rng(0))
    assert hints is None  # so each has its own as its hint
    assert (images - denoiser.class_means[labels]).abs().max() < 1.01 / 127.5  # as bytes
    counts = np.bincount(labels.numpy(), minlength=CLASSES * PARTS) / 6000
    assert np.abs(counts - [0.25, 1 / 12] * CLASSES).max() < 0.02


def test_a_deformed_image_depends_on_its_place_alone() -> None:
    images = released(config_with(CentralConfig())).class_means[:1].expand(20, -1, -1, -1)
    whole = deformed(images, np.arange(20), 0, 0.5)
    assert torch.equal(deformed(images[:3], np.array([4, 19, 0]), 0, 0.5), whole[[4, 19, 0]])
    assert len({image.numpy().tobytes() for image in whole}) == 20
    assert not torch.equal(deformed(images, np.arange(20), 1, 0.5), whole)
    distances = [(deformed(images, np.arange(20), 0, factor) - images).abs().mean() for factor in (0.25, 0.5, 1.0)]
    assert distances[0] < distances[1] < distances[2]


def test_sigma_is_drawn_in_the_private_stages_by_the_central_settings() -> None:
    low, high = central_stages(config_with(CentralConfig(p_mean=1.0, p_std=0.7)))
    assert (low.upper, high.lower, high.weight) == (0.5, -0.5, 2.0)
    assert (low.sigma_draw, high.sigma_draw) == (TruncatedNormal(-inf, 0.5, 1.0, 0.7), TruncatedNormal(-0.5, inf, 1.0, 0.7))
    with pytest.raises(InputError, match=r"^central\.sigma_draw: "):
        central_stages(config_with(CentralConfig(sigma_draw="weights", sigma_weights=((3.0, 1.0), (4.0, 1.0)))))


def by_hand(config: RunConfig, step: int) -> Tensor:
    """The gradient of a step of the central phase, image by image with plain autograd."""
    denoiser, total, settings = released(config), torch.zeros(()), config.central
    low, high = central_stages(config)
    places = np.arange(step * settings.batch_size, (step + 1) * settings.batch_size)
    for chunk in range(0, len(places), config.compute.chunk_size):
        numbers = (config.seed, config.synthetic.steps + step, chunk // config.compute.chunk_size)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))
        inside = places[chunk : chunk + config.compute.chunk_size]
        for stage, mine in ((low, inside[inside % 3 == 0]), (high, inside[inside % 3 != 0])):  # one third, two thirds
            if len(mine) == 0:
                continue
            images, labels, _ = central_batches(config, denoiser)(mine, rng)
            labels = labels.repeat_interleave(2)
            draws = draw(rng, stage.sigma_draw, labels, (1, 8, 8), label_dropout=0.1, null_label=CLASSES * PARTS)
            for row in range(len(labels)):
                total = total + denoising_loss(denoiser, images[row // 2][None], draws.rows(slice(row, row + 1))).sum() / (2 * len(places))
    found = torch.autograd.grad(total, [parameter for _, parameter in sorted(denoiser.named_parameters())])
    return torch.cat([gradient.flatten() for gradient in found]).double()


@dataclass(frozen=True)
class OneOfSeveral(Compute):
    """A process that keeps its part of a sum to itself."""

    def sum_over_processes(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors


@pytest.mark.parametrize(("processes", "at_once"), [(1, 1), (1, 2), (3, 1)])
def test_a_step_is_what_a_loop_over_images_computes_on_any_number_of_processes(processes: int, at_once: int) -> None:
    config = config_with(CentralConfig(batch_size=11, noise_multiplicity=2, steps=4), at_once=at_once)
    for step in (0, 3):
        parts = []
        for rank in range(processes):
            denoiser = released(config)
            phase = central_phase(config, denoiser, OneOfSeveral(CPU, rank, processes))
            assert phase is not None and phase.steps == 4
            assert set(phase.gradient(step)) == {"loss"}
            parts.append(flat({name: parameter.grad for name, parameter in denoiser.named_parameters() if parameter.grad is not None}))
        expected = by_hand(config, step)
        assert (sum(parts) - expected).norm() < 1e-5 * expected.norm()  # type: ignore[operator]


def test_it_changes_no_number_of_the_guarantee(tmp_path: Path) -> None:
    plans = [PrivacyPlan.calibrate(config_with(CentralConfig(steps=steps)), 40) for steps in (0, 500)]
    assert plans[0] == plans[1]
    images, reports = private_images(tmp_path / "images.npz"), []
    for steps in (0, 2):
        flags = ["--stages.variant=dpdm", f"--central.steps={steps}", "--central.batch_size=8", "--private.steps=2"]
        call(train_main, *small(images, *flags), "--run", tmp_path / f"run-{steps}")
        reports.append((tmp_path / f"run-{steps}/privacy.json").read_text())
    assert reports[0] == reports[1]
    logged = lines(tmp_path / "run-2/metrics.jsonl")
    assert [(line["phase"], line["step"]) for line in logged] == [("central", 1), ("central", 2), ("private", 1), ("private", 2)]
    assert 0 < logged[0]["epsilon"] == logged[1]["epsilon"] <= logged[2]["epsilon"]  # the class means are spent
    assert {path.name for path in (tmp_path / "run-2/previews").iterdir()} == {"central-000002.png", "private-000002.png"}
    assert "deformed copies of the class means" in (tmp_path / "run-2/model/README.md").read_text()


def test_the_private_gradient_is_the_same_bits_after_a_central_phase(tmp_path: Path) -> None:
    plain = config_of(0.0, hints="class_means")
    found = [gradients(tmp_path, config, dataset(), 1) for config in (plain, dataclasses.replace(plain, central=CentralConfig(steps=7)))]
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


@needs_full_device
def test_stopped_in_the_middle_it_ends_in_the_same_bytes_and_on_other_images_and_key_as_well(tmp_path, monkeypatch, capsys):
    """Stopped at step 3 of 5, two steps saved. On other images and with another key it still ends in the same weights: it reads neither."""
    images, other = private_images(tmp_path / "images.npz"), private_images(tmp_path / "other.npz", seed=1)
    flags = ["--stages.variant=dpdm", "--hints.prototypes=2", "--central.steps=5", "--central.batch_size=40", "--compute.checkpoints_kept=9"]
    arguments = small(images, f"--privacy.unsafe_fixed_key={KEY}", *flags)
    call(train_main, *arguments, "--tracking.log_every=3", "--run", tmp_path / "whole")
    capsys.readouterr()
    interrupt(tmp_path / "cut", arguments, monkeypatch, capsys, step=3)
    assert max((tmp_path / "cut/checkpoints").iterdir()).name == "100000005"
    shutil.copytree(tmp_path / "cut", tmp_path / "moved")

    call(train_main, *arguments, "--tracking.log_every=3", "--run", tmp_path / "cut")
    found = [{name: content for name, (content, _) in files(tmp_path / run).items() if "private/" not in name} for run in ("whole", "cut")]
    assert found[0] == found[1]

    (tmp_path / "moved/private/key").unlink()
    PrivateKey.fixed(OTHER_KEY).save(tmp_path / "moved/private/key")
    call(train_main, *arguments, f"--data.path={other}", "--tracking.log_every=3", "--run", tmp_path / "moved")
    for checkpoint in ("100000011", "200000001"):  # the end of the central phase, the beginning of the private one
        after = [(tmp_path / run / "checkpoints" / checkpoint / "tensors.safetensors").read_bytes() for run in ("whole", "moved")]
        assert after[0] == after[1]
    logged = [[line for line in lines(tmp_path / run / "metrics.jsonl") if line["phase"] == "central"] for run in ("whole", "moved")]
    assert logged[0] == logged[1] and [line["step"] for line in logged[0]] == [3, 5]
    assert weights(tmp_path / "moved") != weights(tmp_path / "whole")
    assert [entry.get("step", "attempt") for entry in lines(tmp_path / "moved/private/journal.jsonl")][:4] == ["attempt", "class_means", "attempt", 0]


def test_a_plan_and_a_length_in_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    config = read_config([], ["--central.epochs=2", "--central.batch_size=100", "--data.expected_size=5000", "--private.batch_size=50",
                              "--network.width=8", "--data.image_size=8", "--stages.variant=dpdm"])  # fmt: skip
    assert config.central.steps is None
    print_plan(config)
    assert "100 steps of 100 x 4 draws" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--central.steps=5", "--hints.kind=none"], "--central.steps: expected 0, since hints.kind is none"),
        (["--central.epochs=1", "--hints.kind=none"], "--central.epochs: expected 0, since hints.kind is none"),
        (["--central.steps=5", "--stages.variant=custom", "--stages.custom=[{name: a, source: synthetic}]"], "since no stage learns from private"),
        (["--central.epochs=1", "--data.expected_size=null"], "central.epochs: expected central.steps instead"),
        (["--central.deformation=3"], "--central.deformation: expected a number in [0, 2], got 3.0"),
        (["--central.steps=-1"], "--central.steps: expected an integer >= 0, got -1"),
        (["--central.steps=5", "--central.sigma_draw=weights", "--central.sigma_weights=[[3, 1], [4, 1]]", "--stages.variant=finetune_context"],
         "central.sigma_draw: "),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(flags, complaint, tmp_path, monkeypatch, capsys):
    images = private_images(tmp_path / "images.npz")
    assert complaint in refusal(train_main, monkeypatch, capsys, *small(images, *flags), "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()
