"""Rule 11: public gradients are added after clipping, noise and normalisation, never change epsilon, and know nothing of the private images."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from running import KEY, call, files, lines, needs_full_device, private_images, small, train_main
from test_privacy_rules import dataset, randomised
from test_resume import FIXED, TEN, interrupt
from torch import Tensor

from dpsyngen.compute import Compute
from dpsyngen.config import (
    ComputeConfig,
    DataConfig,
    HintsConfig,
    NetworkConfig,
    PrivacyConfig,
    PrivateConfig,
    RunConfig,
    StageConfig,
    StagesConfig,
    SyntheticConfig,
)
from dpsyngen.data import ImageDataset, SyntheticImages
from dpsyngen.hints import synthetic_hints
from dpsyngen.loss import denoising_loss, draw
from dpsyngen.noise_levels import stages
from dpsyngen.phases import private_phase, replayed, synthetic_phase
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.run_directory import RunDirectory

OTHER_KEY = "cd" * 32
STAGES = (
    StageConfig("grain", "synthetic", upper=0.0, family="salt_and_pepper", options={"density": 0.2}, replay=0.5),
    StageConfig("unused", "synthetic", lower=-1.0, weight=5.0, replay=0.0),
    StageConfig("layout", "synthetic", lower=0.0, weight=2.0, sigma_draw="uniform"),
    StageConfig("all", "private"),
)


def config_of(replay: float, *, key: str = KEY, norm: float = 1.0, secure: bool = False, private: str = "private", hints: str = "none") -> RunConfig:
    custom = tuple(dataclasses.replace(stage, source=private) if stage.name == "all" else stage for stage in STAGES)
    return RunConfig(
        data=DataConfig(image_size=8, num_classes=3, expected_size=40),
        network=NetworkConfig(width=8),
        stages=StagesConfig("custom", custom=custom, replay=replay, replay_batch_size=7),
        hints=HintsConfig(kind=hints),  # type: ignore[arg-type]
        synthetic=SyntheticConfig(batch_size=5, noise_multiplicity=2, steps=4, epochs=None),
        private=PrivateConfig(batch_size=8, noise_multiplicity=2, steps=10, epochs=None),
        privacy=PrivacyConfig(epsilon=5.0, delta=1e-3, clipping_norm=norm, unsafe_fixed_key=key, secure_noise=secure),
        compute=ComputeConfig(chunk_size=3),
    )


def gradients(tmp_path: Path, config: RunConfig, images: ImageDataset, step: int = 0) -> dict[str, Tensor]:
    """What the private phase of a run leaves for the optimiser, from the same weights in any case."""
    place = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
    run, compute, denoiser = RunDirectory(place), Compute(torch.device("cpu")), randomised(config)
    run.key.parent.mkdir(parents=True)
    plan = PrivacyPlan.calibrate(config, 40) if config.is_private else None
    ledger = Ledger.open(
        config, plan, run, compute, images.fingerprint, reached=0, has_class_means=False, weights="start", computed_by=None
    )  # fmt: skip
    logged = private_phase(config, denoiser, images, plan, ledger, compute).gradient(step)
    assert set(logged) == ({"replay_loss"} if config.stages.replays else set())
    return {name: parameter.grad for name, parameter in denoiser.named_parameters() if parameter.grad is not None}


def difference(found: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    assert found.keys() == other.keys()
    return torch.cat([(found[name] - other[name]).flatten().double() for name in sorted(found)])


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return difference(gradient, {name: torch.zeros_like(g) for name, g in gradient.items()})


def public_gradient(config: RunConfig, step: int) -> Tensor:
    """The gradient that step `step` replays, before it is clipped: worked out image by image, with plain autograd."""
    denoiser, total = randomised(config), 0.0
    grain, _, layout, _ = stages(config)
    size, first = 7, 4 * 5  # the synthetic phase had 4 steps of 5 images
    places = [first + size * step + position for position in range(size)]
    owners = {place: grain if place % 3 == 0 else layout for place in places}  # one third, two thirds
    for chunk in range(3):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((config.seed, 4 + step, chunk))))
        inside = places[3 * chunk : 3 * chunk + 3]
        for stage in (grain, layout):
            mine = [place for place in inside if owners[place] is stage]
            if not mine:
                continue
            images = torch.cat([SyntheticImages(stage.family, stage.options, (1, 8, 8), config.seed).batch([place]) for place in mine])
            hints = synthetic_hints(images, config.hints, rng) if config.hints.kind != "none" else None
            labels = torch.from_numpy(rng.integers(3, size=len(mine))).repeat_interleave(2)
            draws = draw(rng, stage.sigma_draw, labels, (1, 8, 8), label_dropout=0.1, null_label=3)
            for row in range(len(labels)):
                hint = None if hints is None else hints[row // 2][None]
                loss = denoising_loss(denoiser, images[row // 2][None], draws.rows(slice(row, row + 1)), hint).sum()
                total = total + stage.replay * loss / (size * 2)
    found = torch.autograd.grad(total, [parameter for _, parameter in sorted(denoiser.named_parameters())])
    return torch.cat([gradient.flatten() for gradient in found]).double()


@pytest.mark.parametrize("case", ["plain", "clipped", "secure", "hinted", "nonprivate"])
def test_the_public_gradient_is_added_to_the_finished_private_one(case: str, tmp_path: Path) -> None:
    """With the same key, weights and step: what replay changes is its weight times the public gradient, clipped as a whole to C."""
    given = {"clipped": {"norm": 1e-3}, "secure": {"secure": True}, "hinted": {"hints": "class_means"}, "nonprivate": {"private": "nonprivate"}}
    options = given.get(case, {})
    for step in (0, 2):
        without, with_it = (gradients(tmp_path, config_of(weight, **options), dataset(), step) for weight in (0.0, 2.0))  # type: ignore[arg-type]
        public = public_gradient(config_of(2.0, **options), step)  # type: ignore[arg-type]
        assert (public.norm() > options.get("norm", 1)) == (case == "clipped")
        expected = 2 * public * min(1, options.get("norm", 1) / public.norm())
        assert (difference(with_it, without) - expected).norm() < 1e-5 * (expected.norm() + flat(without).norm())
        assert expected.norm() > 1e-3 * flat(without).norm()


@pytest.mark.parametrize("secure", [False, True])
def test_the_private_gradient_is_the_same_bits_with_replay_and_without(secure: bool, tmp_path: Path) -> None:
    seen: dict[float, dict[str, Tensor]] = {}
    for weight in (0.0, 1e-30):  # too small to change a bit, but replayed all the same
        seen[weight] = gradients(tmp_path, config_of(weight, secure=secure), dataset(), 1)
    assert seen[0.0].keys() == seen[1e-30].keys()
    assert all(torch.equal(gradient, seen[1e-30][name]) for name, gradient in seen[0.0].items())


def test_the_public_gradient_depends_on_no_private_image_and_not_on_the_key(tmp_path: Path) -> None:
    added = []
    for images, key in ((dataset(), KEY), (dataset(30, seed=5), KEY), (dataset(), OTHER_KEY)):
        without, with_it = (gradients(tmp_path, config_of(weight, key=key), images) for weight in (0.0, 1.0))
        added.append(difference(with_it, without))
    assert 0.1 < added[0].norm() <= 1.001
    for other in added[1:]:
        assert (other - added[0]).norm() < 1e-4


def test_without_synthetic_stages_there_is_nothing_to_replay(tmp_path: Path) -> None:
    images = dataset()
    given = [gradients(tmp_path, dataclasses.replace(config_of(0.0), stages=StagesConfig("dpdm", replay=weight)), images) for weight in (0.0, 1.0)]
    assert all(torch.equal(given[0][name], given[1][name]) for name in given[0])


def test_replay_changes_no_number_of_the_guarantee(tmp_path: Path) -> None:
    plans = [PrivacyPlan.calibrate(config_of(weight), 40) for weight in (0.0, 3.0)]
    assert plans[0] == plans[1]
    images, reports = private_images(tmp_path / "images.npz"), []
    for weight in (0, 3):
        flags = ["--stages.variant=finetune_all", f"--stages.replay={weight}", "--stages.replay_batch_size=8"]
        call(train_main, *small(images, *flags), "--run", tmp_path / f"run-{weight}")
        reports.append((tmp_path / f"run-{weight}/privacy.json").read_text())
        logged = [line for line in lines(tmp_path / f"run-{weight}/metrics.jsonl") if line["phase"] == "private"]
        assert all(set(line) == {"phase", "step", "epsilon"} | ({"replay_loss"} if weight else set()) for line in logged)
    assert reports[0] == reports[1]
    assert 9.9 < json.loads(reports[0])["epsilon"] <= 10


def test_replay_goes_on_in_the_public_sequence_where_the_synthetic_phase_ends() -> None:
    """Its first step is what one more step of the synthetic phase would have been, so nothing is drawn twice."""
    config = dataclasses.replace(config_of(1.0), stages=StagesConfig("finetune_all", replay=1.0, replay_batch_size=None))
    denoiser, compute = randomised(config), Compute(torch.device("cpu"))
    synthetic, again = synthetic_phase(config, denoiser, compute), replayed(config, denoiser, compute)
    assert synthetic is not None and synthetic.steps == 4

    def of(step: int, phase: object) -> Tensor:
        phase(step)  # type: ignore[operator]
        return flat({name: parameter.grad for name, parameter in denoiser.named_parameters() if parameter.grad is not None})

    assert torch.equal(of(0, again), of(4, synthetic.gradient))
    assert torch.equal(of(3, again), of(7, synthetic.gradient))
    assert not torch.equal(of(0, again), of(0, synthetic.gradient))


def test_a_public_gradient_that_is_not_finite_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, bad = config_of(1.0), torch.full((64,), float("nan"))
    without = gradients(tmp_path, config_of(0.0), dataset())
    monkeypatch.setattr(SyntheticImages, "batch", lambda self, places: bad.expand(len(places), -1).view(-1, 1, 8, 8))
    assert difference(gradients(tmp_path, config, dataset()), without).abs().max() == 0


@needs_full_device
def test_an_interrupted_run_replays_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TEN, FIXED, "--stages.variant=finetune_all", "--stages.replay=1", "--stages.replay_batch_size=8", "--synthetic.steps=0"]
    arguments = small(private_images(tmp_path / "images.npz"), *flags)
    call(train_main, *arguments, "--tracking.log_every=7", "--run", tmp_path / "whole")
    capsys.readouterr()
    interrupt(tmp_path / "cut", arguments, monkeypatch, capsys, step=7)
    call(train_main, *arguments, "--tracking.log_every=7", "--run", tmp_path / "cut")
    found = [{name: content for name, (content, _) in files(tmp_path / run).items() if "private/" not in name} for run in ("whole", "cut")]
    assert found[0] == found[1]


