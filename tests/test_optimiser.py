"""Optimising under noise: Adam without the noise's variance, its settings, schedules, automatic clipping, in whole runs too."""

import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from running import KEY, call, launch, needs_full_device, private_images, refusal, small, stop_at_first_log, train_main, weights
from test_privacy_rules import dataset, ledger_of, plan_with, randomised, tiny_config
from torch import Tensor, nn

from dpsyngen.compute import Compute
from dpsyngen.config import PrivateConfig, SyntheticConfig
from dpsyngen.optimiser import NoiseCorrectedAdam, NoiseCorrection
from dpsyngen.phases import Phase, private_phase
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.price import price
from dpsyngen.privacy.randomness import PrivateKey


def optimised(optimizer_of, gradients: Tensor, start: Tensor) -> tuple[Tensor, torch.optim.Optimizer]:
    """Weights after each of the gradients [T, n], float32 [T, n]."""
    parameter = nn.Parameter(start.clone())
    optimizer, path = optimizer_of([parameter]), []
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
        path.append(parameter.detach().clone())
    return torch.stack(path), optimizer


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)])
def test_without_noise_it_is_adam(betas):
    torch.manual_seed(0)
    gradients, start = torch.randn(60, 50) * torch.logspace(-5, 2, 50), torch.randn(50)
    found, _ = optimised(lambda p: NoiseCorrectedAdam(p, 0.1, betas, NoiseCorrection(0.0, 1.0)), gradients, start)
    expected, _ = optimised(lambda p: torch.optim.Adam(p, 0.1, betas), gradients, start)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.9)])
def test_it_is_algorithm_1_of_the_paper(betas):
    """Tang et al., in float64: the variance taken out of the corrected average of squares, which is then raised to gamma'."""
    torch.manual_seed(0)
    (beta1, beta2), deviation, floor = betas, 0.3, 0.7
    gradients, start = deviation * torch.randn(200, 40) + torch.logspace(-3, 0, 40), torch.randn(40)
    found, _ = optimised(lambda p: NoiseCorrectedAdam(p, 0.01, betas, NoiseCorrection(deviation, floor)), gradients, start)
    theta, m, v, raised = start.double().numpy(), np.zeros(40), np.zeros(40), []
    for t, g in enumerate(gradients.double().numpy(), start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        shares = (1 - beta2) * beta2 ** np.arange(t) / (1 - beta2**t)
        gamma = floor * deviation**2 * math.sqrt(2 * (shares**2).sum())
        corrected = v / (1 - beta2**t) - deviation**2
        raised.append((corrected < gamma).mean())
        theta = theta - 0.01 * m / (1 - beta1**t) / np.sqrt(np.maximum(corrected, gamma))
    assert raised[-1] > 0.2 and (np.array(raised) < 0.95).all()
    np.testing.assert_allclose(found[-1].numpy(), theta, rtol=1e-4, atol=1e-4)


def test_second_moment_is_the_signals_though_the_noise_changes_on_the_way():
    torch.manual_seed(0)
    signal, noises = torch.linspace(0, 1, 4000), [0.5] * 300 + [2.0] * 30
    parameter = nn.Parameter(torch.zeros(4000))
    moments = {}
    for t, noise in enumerate(noises):
        optimizer = NoiseCorrectedAdam([parameter], 1e-3, (0.9, 0.99), NoiseCorrection(noise, 1.0))
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        parameter.grad = signal + noise * torch.randn(4000)
        optimizer.step()
        moments = optimizer.state_dict()["state"]
        if t in (0, 299, 329):
            estimate = moments[0]["exp_avg_sq"] / (1 - 0.99 ** (t + 1))
            error = (estimate - signal**2).mean().item()
            assert abs(error) < 5 * (estimate - signal**2).std().item() / 4000**0.5


@pytest.mark.parametrize(("beta2", "steps"), [(0.9, 1), (0.9, 7), (0.99, 300), (0.0, 3)])
def test_the_floor_is_in_standard_errors_of_the_estimate_under_noise_alone(beta2, steps):
    torch.manual_seed(0)
    path, optimizer = optimised(
        lambda p: NoiseCorrectedAdam(p, 1.0, (0.0, beta2), NoiseCorrection(0.2, 1e6)), 0.2 * torch.randn(steps, 20_000), torch.zeros(20_000)
    )
    estimate = optimizer.state_dict()["state"][0]["exp_avg_sq"] / (1 - beta2**steps)
    parameter = next(iter(optimizer.state))
    moved = (path[-1] - path[-2] if steps > 1 else path[-1]).abs() / parameter.grad.abs()  # 1 / sqrt(1e6 standard errors), since all lie below
    assert (1 / moved**2).median().item() / 1e6 == pytest.approx(estimate.std().item(), rel=0.05)


def test_a_parameter_without_a_gradient_is_left_alone():
    """As those of the networks whose turn it isn't: their counts of steps stay behind."""
    torch.manual_seed(0)
    gradients = torch.randn(10, 5)
    expected, _ = optimised(lambda p: NoiseCorrectedAdam(p, 0.1, (0.9, 0.99), NoiseCorrection(0.5, 1.0)), gradients, torch.zeros(5))
    parameters = [nn.Parameter(torch.zeros(5)) for _ in range(2)]
    optimizer = NoiseCorrectedAdam(parameters, 0.1, (0.9, 0.99), NoiseCorrection(0.5, 1.0))
    for turn in range(20):
        for index, parameter in enumerate(parameters):
            parameter.grad = gradients[turn // 2] if index == turn % 2 else None
        optimizer.step()
    assert torch.equal(parameters[0], expected[-1]) and torch.equal(parameters[1], expected[-1])


def test_it_is_told_the_noise_of_the_plan_at_hand(tmp_path):
    """The deviation that the plan's own noise has, exact or not; another plan's where a run goes on with another."""
    config = dataclasses.replace(tiny_config(), private=PrivateConfig(batch_size=8, steps=10, epochs=None, noise_correction=True, noise_floor=0.5))
    plans = plan_with(config, noise_multiplier=1.7, clipping_norm=0.3), plan_with(config, noise_multiplier=0.6, secure_noise=True)
    for index, plan in enumerate(plans):
        zero = {"a": torch.zeros(40_000, dtype=plan.sum_dtype)}
        noise = plan.privatise(zero, PrivateKey.fixed(KEY), 0, 0)["a"]
        assert noise.std().item() == pytest.approx(plan.noise_deviation, rel=0.02)
        place = tmp_path / str(index)
        place.mkdir()
        phase = private_phase(config, randomised(config), dataset(), plan, ledger_of(place, 0, hints="none"), Compute(torch.device("cpu")))
        optimizer = phase.optimizer()
        assert isinstance(optimizer, NoiseCorrectedAdam)
        assert optimizer.correction == NoiseCorrection(plan.noise_deviation, 0.5)


def test_phases_take_their_momentum_and_plain_adam_unless_asked():
    settings = SyntheticConfig(beta1=0.0, beta2=0.9)
    optimizer = Phase("synthetic", settings, 10, lambda step: {}, nn.Linear(1, 1)).optimizer()
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["betas"] == (0.0, 0.9)


def test_learning_rate_falls_along_a_cosine():
    def rates(shape: str) -> list[float]:
        settings = PrivateConfig(learning_rate=2.0, warmup=0.1, decay=0.5, decay_shape=shape)  # type: ignore[arg-type]
        phase = Phase("private", settings, 100, lambda step: {}, nn.Linear(1, 1))
        return [phase.learning_rate(step) for step in range(100)]

    linear, cosine = rates("linear"), rates("cosine")
    assert linear[:51] == cosine[:51]
    assert cosine[50:] == pytest.approx([1 + math.cos(math.pi * (step - 50) / 50) for step in range(50, 100)])
    assert all(later < earlier for earlier, later in pairwise(cosine[50:]))


def test_a_plan_holds_its_clipping_and_one_from_before_there_were_two_clips_at_the_norm():
    config = tiny_config(hints="class_means")
    plan = PrivacyPlan.calibrate(config, 40)
    record = json.loads(json.dumps(plan.record()))
    assert PrivacyPlan.from_record(record, ()) == plan and plan.clipping == "norm"
    assert record.pop("clipping_stability") is None and PrivacyPlan.from_record(record, ()) == plan
    automatic = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, clipping="automatic", clipping_stability=0.02))
    other = PrivacyPlan.calibrate(automatic, 40)
    assert (other.clipping, other.clipping_stability) == ("automatic", 0.02)
    assert PrivacyPlan.from_record(json.loads(json.dumps(other.record())), ()) == other
    assert dataclasses.replace(other, clipping_stability=None) == plan  # at the same price
    assert (price(plan)["clipping"], price(other)["clipping"]) == ("norm", "automatic")


ALL = [
    "--privacy.clipping=automatic", "--privacy.clipping_stability=0.05", "--private.noise_correction=true", "--private.noise_floor=0.5",
    "--private.beta1=0.5", "--private.beta2=0.9", "--private.decay=0.5", "--private.decay_shape=cosine", "--synthetic.beta1=0",
]  # fmt: skip


def test_train_py_with_all_of_it(tmp_path):
    found = launch("train", *small(private_images(tmp_path / "images.npz"), *ALL), "--run", tmp_path / "run")
    assert found.returncode == 0, found.stderr
    mechanism = json.loads((tmp_path / "run/privacy.json").read_text())["mechanisms"][-1]
    assert (mechanism["clipping"], mechanism["clipping_stability"], mechanism["clipping_norm"]) == ("automatic", 0.05, 1.0)
    assert "clipping automatic" in (tmp_path / "run/model/README.md").read_text()


IN_TURN = ["--stages.variant=custom", "--stages.holder=routed",
           "--stages.custom=[{name: fine, source: private, upper: 0}, {name: rest, source: private, lower: 0}]"]  # fmt: skip


@needs_full_device
@pytest.mark.parametrize(
    "variant", [["--stages.variant=finetune_all", "--stages.replay=0.5", "--synthetic.steps=0"], IN_TURN], ids=["replay", "in turn"]
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(variant, tmp_path, monkeypatch, capsys):
    flags = [*ALL, *variant, "--private.steps=7", "--compute.checkpoint_every=3", f"--privacy.unsafe_fixed_key={KEY}", "--tracking.log_every=5"]
    arguments = small(private_images(tmp_path / "images.npz"), *flags)
    stop_at_first_log(tmp_path / "cut")
    assert "No space left" in refusal(train_main, monkeypatch, capsys, *arguments, "--run", tmp_path / "cut")
    (tmp_path / "cut/metrics.jsonl").unlink()
    said = refusal(train_main, monkeypatch, capsys, *arguments, "--privacy.clipping=norm", "--run", tmp_path / "cut")
    assert "another config (privacy.clipping" in said
    for run in ("cut", "whole"):
        call(train_main, *arguments, "--run", tmp_path / run)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
