"""DESIGN's rules of the guarantee, each by what must hold if it is kept."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, kstest
from torch import Tensor, nn

from dpsyngen.compute import Compute
from dpsyngen.config import ComputeConfig, DataConfig, HintsConfig, NetworkConfig, PrivacyConfig, PrivateConfig, RunConfig, TrackingConfig
from dpsyngen.data import ImageDataset
from dpsyngen.denoiser import Denoiser, build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.loss import Draws, denoising_loss, draw
from dpsyngen.networks.safety import refuse_mixing
from dpsyngen.noise_levels import mixture, stages_of
from dpsyngen.privacy.accounting import SubsampledGaussianMechanism, epsilon_of, gaussian_mu
from dpsyngen.privacy.class_means import ClassMeansMechanism
from dpsyngen.privacy.journal import Journal
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.per_example import OuterProducts, PerExampleGradients, recording
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.private_step import PrivateStep
from dpsyngen.privacy.randomness import PrivateKey, destroy, poisson_sample
from dpsyngen.run_directory import RunDirectory

KEY = PrivateKey.fixed("ab" * 32)


def tiny_config(*, batch_size: int = 8, copies: int = 2, chunk_size: int = 3, diagnostics: bool = False, hints: str = "none") -> RunConfig:
    return RunConfig(
        data=DataConfig(image_size=8, num_classes=3, expected_size=40),
        network=NetworkConfig(width=8),
        hints=HintsConfig(kind=hints),  # type: ignore[arg-type]
        private=PrivateConfig(batch_size=batch_size, noise_multiplicity=copies, steps=10, epochs=None),
        privacy=PrivacyConfig(epsilon=5.0, delta=1e-3),
        compute=ComputeConfig(chunk_size=chunk_size),
        tracking=TrackingConfig(log_private_diagnostics_without_dp=diagnostics),
    )


def dataset(size: int = 40, seed: int = 0) -> ImageDataset:
    rng = np.random.default_rng(seed)
    return ImageDataset(rng.integers(0, 256, (size, 1, 8, 8), dtype=np.uint8), rng.integers(0, 3, size), ("a", "b", "c"))


def randomised(config: RunConfig) -> Denoiser:
    denoiser = build_denoiser(config)
    assert isinstance(denoiser, Denoiser)
    torch.manual_seed(1)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    return denoiser


def step_of(tmp_path: Path, config: RunConfig, plan: PrivacyPlan, images: ImageDataset, rank: int = 0, processes: int = 1) -> PrivateStep:
    journal = Journal(tmp_path / f"journal-{rank}.jsonl")
    journal.open_attempt("test", "start")
    compute = Compute(torch.device("cpu"), rank, processes)
    return PrivateStep(randomised(config), mixture(stages_of(config, "private")), images, plan, KEY, journal, config, compute)


def gradients(step: PrivateStep, number: int = 0) -> dict[str, Tensor]:
    step(number)
    return {name: parameter.grad.clone() for name, parameter in step.denoiser.named_parameters() if parameter.grad is not None}


def plan_with(config: RunConfig, **changes: float) -> PrivacyPlan:
    plan = PrivacyPlan(5.0, 1e-3, 40, config.private.batch_size, 10, config.private.noise_multiplicity, 1.0, 1.0, None)
    return PrivacyPlan(**{**plan.__dict__, **changes})


# Rule 2: Poisson batches, empty ones included.


def test_poisson_inclusion_is_independent_with_probability_q() -> None:
    population, q, draws = 50, 0.3, 4000
    rng = np.random.default_rng(0)
    member = np.zeros((draws, population), dtype=bool)
    for turn in range(draws):
        member[turn, poisson_sample(rng, population, q)] = True
    sizes = member.sum(axis=1)
    assert binomtest(int(member.sum()), draws * population, q).pvalue > 1e-4
    assert sizes.var() == pytest.approx(population * q * (1 - q), rel=0.1)  # a shuffled batch would have no variance
    joint = np.cov(member.T.astype(float)) - np.diag(np.full(population, q * (1 - q)))
    off = joint[~np.eye(population, dtype=bool)]
    assert np.abs(off).max() < 6 * q * (1 - q) / draws**0.5  # neighbours in the walk as well as distant units


def test_poisson_sample_costs_the_batch_not_the_population() -> None:
    indices = poisson_sample(np.random.default_rng(0), 10**9, 4096 / 10**9)
    assert abs(len(indices) - 4096) < 6 * 64
    assert (np.diff(indices) > 0).all()
    assert indices[-1] < 10**9
    assert kstest(indices / 10**9, "uniform").pvalue > 1e-3
    assert (poisson_sample(np.random.default_rng(0), 7, 1.0) == np.arange(7)).all()


def test_batch_is_drawn_at_the_declared_rate_whatever_the_size() -> None:
    plan, population = plan_with(tiny_config()), 400  # ten times the declared size
    drawn = sum(len(plan.draw_batch(KEY, 0, step, population)) for step in range(50))
    assert binomtest(drawn, 50 * population, 8 / 40).pvalue > 1e-3


def test_empty_batch_is_a_step_of_pure_noise(tmp_path: Path) -> None:
    config = tiny_config()
    plan = plan_with(config)
    step = step_of(tmp_path, config, plan, dataset(0))
    noisy = gradients(step)
    assert set(noisy) == {name for name, _ in step.denoiser.named_parameters()}
    found = torch.cat([gradient.flatten() for gradient in noisy.values()])
    assert kstest((found * 8).numpy(), "norm").pvalue > 1e-3  # noise N(0, (1 * 1)^2) over q N = 8
    assert step.journal.spending.steps == 1


# Rule 3: the contribution of one image.


@pytest.mark.parametrize(("copies", "chunk_size", "bf16", "stability"), [
    (1, 4, False, None), (4, 3, False, None), (4, 3, True, None), (4, 3, True, 1e-3),
])  # fmt: skip
def test_removing_an_image_moves_the_sum_by_at_most_c(
    tmp_path: Path, copies: int, chunk_size: int, bf16: bool, stability: float | None
) -> None:
    """All images in the batch, no noise, the last image alone in its chunk: with and without it the sums differ by its clipped gradient."""
    config = tiny_config(batch_size=40, copies=copies, chunk_size=chunk_size)
    norm = 0.05
    plan = plan_with(config, noise_multiplier=0.0, clipping_norm=norm, clipping_stability=stability)
    sums = []
    for size in (37, 36):
        step = step_of(tmp_path, config, plan, dataset(40).slice(0, size))
        object.__setattr__(step, "compute", Compute(torch.device("cpu"), bf16=bf16))
        sums.append(torch.cat([g.flatten() for g in gradients(step).values()]) * 40)
    difference = (sums[0] - sums[1]).norm().item()
    assert 0.9 * norm < difference <= norm * (1 + 1e-4)


@pytest.mark.parametrize("backbone", ["lean", "unet"])
def test_private_step_is_what_a_loop_over_images_computes(tmp_path: Path, backbone: str) -> None:
    """One image after another with plain autograd: the mean of its K losses, its gradient, clipped to C, or automatically; then the sum."""
    config, count, size = tiny_config(batch_size=40, copies=3, chunk_size=4), 10, 4
    config = dataclasses.replace(config, network=NetworkConfig(backbone, width=8))  # type: ignore[arg-type]
    step = step_of(tmp_path, config, plan_with(config, noise_multiplier=0.0), dataset(40).slice(0, count))
    parameters = list(step.denoiser.parameters())
    images, labels = step.dataset.batch(np.arange(count))
    single = []
    for image in range(count):
        rows = labels[image // size * size :][:size].repeat_interleave(3)
        rng = KEY.substream("draws", attempt=0, step=0, chunk=image // size)
        draws = draw(rng, step.sigma_draw, rows, (1, 8, 8), label_dropout=config.network.label_dropout,
                     null_label=step.denoiser.null_label)  # fmt: skip
        own = slice(3 * (image % size), 3 * (image % size) + 3)
        losses = denoising_loss(step.denoiser, images[image].expand(3, -1, -1, -1), Draws(draws.sigma[own], draws.noise[own], draws.labels[own]))
        single.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), parameters)]))
    whole = torch.stack(single)
    norms = whole.norm(dim=1)
    limit = norms.median().item()  # half of the images are clipped
    for stability, scale in ((None, (limit / norms).clamp(max=1)), (0.3 * limit, limit / (norms + 0.3 * limit))):
        object.__setattr__(step, "plan", plan_with(config, noise_multiplier=0.0, clipping_norm=limit, clipping_stability=stability))
        found = torch.cat([gradient.flatten() for gradient in gradients(step).values()]) * 40
        expected = (whole * scale[:, None]).sum(dim=0)
        assert (found - expected).norm() < 3e-4 * expected.norm()


def test_clipping_comes_after_averaging_over_draws() -> None:
    record = PerExampleGradients(examples=2)
    record.add("w", torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    torch.testing.assert_close(record.clipped_sum(1.0)["w"], torch.tensor([0.6 + 0.3, 0.8 + 0.4]), rtol=2e-4, atol=0)
    layer = nn.Linear(1, 1, bias=False)
    x = torch.tensor([[10.0], [-10.0], [1.0], [0.0]])  # draws of one image that cancel, and of one that don't
    with recording(layer, 2, 2) as averaged:
        layer(x).view(2, 2).mean(dim=1).sum().backward()
    torch.testing.assert_close(averaged.gradients["weight"].flatten(), torch.tensor([0.0, 0.5]))


CLIPPINGS = pytest.mark.parametrize("stability", [None, 0.01, 1e-6])


@CLIPPINGS
def test_contribution_is_at_most_c_for_any_magnitude(stability: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-40, 1e-20, 1e-9, 1e-3, 1.0, 1e10, 1e18):
        record = PerExampleGradients(examples=1)
        record.add("a", scale * torch.randn(1, 1000, generator=generator))
        record.add("b", (scale * torch.randn(1, 77, generator=generator)).bfloat16())
        clipped = record.clipped_sum(0.3, stability)
        assert torch.cat([t.double() for t in clipped.values()]).norm() <= 0.3


@CLIPPINGS
def test_contribution_is_at_most_c_where_float32_sums_go_wrong(stability: float | None) -> None:
    """A million equal entries: summing their squares one after another in float32 loses a part in a thousand."""
    for value in (0.1, 1.0, 3.3):
        record = PerExampleGradients(examples=1)
        record.add("a", torch.full((1, 1_000_003), value))
        assert 0.999 * 0.3 < record.clipped_sum(0.3, stability)["a"].double().norm() <= 0.3


@CLIPPINGS
def test_contribution_is_at_most_c_in_bf16_whatever_the_norm_is_rounded_to(stability: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in range(1, 3000, 50):
        record = PerExampleGradients(examples=1)
        record.add("a", torch.randn(1, size, generator=generator).bfloat16())
        assert 0.97 * 0.01 < record.clipped_sum(0.01, stability)["a"].double().norm() <= 0.01


def test_outer_products_are_clipped_like_their_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = OuterProducts(torch.randn(4, 3, 8, generator=generator), torch.randn(4, 3, 6, generator=generator))
    records = PerExampleGradients(examples=4), PerExampleGradients(examples=4)
    for record, gradient in zip(records, (factors, factors.matrices()), strict=True):
        record.add("w", gradient)
        record.add("b", torch.ones(4, 5))
    limit = records[1].norms().median().item()
    found, expected = (record.clipped_sum(limit) for record in records)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


@CLIPPINGS
def test_contribution_is_at_most_c_where_outer_products_cancel(stability: float | None) -> None:
    """Terms of a size at which their rounding alone is longer than C."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        left, right = 1e4 * torch.randn(1, 1, 50, generator=generator), 1e4 * torch.randn(1, 1, 40, generator=generator)
        record = PerExampleGradients(examples=1)
        record.add("w", OuterProducts(torch.cat([left, -left, left / 3, -left], dim=1), torch.cat([right, right / 3, right, right], dim=1)))
        assert record.clipped_sum(0.01, stability)["w"].double().norm() <= 0.01


@CLIPPINGS
def test_contribution_is_at_most_c_for_outer_products_of_any_magnitude(stability: float | None) -> None:
    """Vectors so long, or scales so small or so large, that their product overflows float32 or keeps few bits."""
    generator = torch.Generator().manual_seed(0)
    for norm in (1e-6, 1.0, 1e6):
        for left in range(-44, 39, 2):
            for right in (-44, -39, -20, -1, 0, 1, 10, 13, 20, 38):
                record = PerExampleGradients(examples=1)
                record.add("w", OuterProducts(*(10.0**power * torch.randn(1, 2, 9, generator=generator) for power in (left, right))))
                assert record.clipped_sum(norm, stability)["w"].double().norm() <= norm


def test_automatic_clipping_brings_long_gradients_near_c_and_leaves_short_ones_short() -> None:
    """AUTO-S: g C / (||g|| + gamma)."""
    record = PerExampleGradients(examples=4)
    record.add("w", torch.tensor([[3e5, 4e5], [3e-3, 4e-3], [3e-8, 4e-8], [0.0, 0.0]]))
    for row in range(4):
        single = PerExampleGradients(examples=1)
        single.add("w", record.tensor("w")[row : row + 1])
        length = float(record.norms()[row])
        assert single.clipped_sum(2.0, 0.01)["w"].norm().item() == pytest.approx(2 * length / (length + 0.01), rel=2e-4)
    assert 2 * (1 + 1 / 3) < record.clipped_sum(2.0, 0.01)["w"].norm() * (1 + 2e-4) < 2 * (1 + 1 / 3 + 1e-5) * (1 + 2e-4)


def test_non_finite_outer_product_counts_as_zero() -> None:
    left, right = torch.ones(2, 1, 3), torch.ones(2, 1, 2)
    left[0, 0, 1] = float("nan")
    record = PerExampleGradients(examples=2)
    record.add("w", OuterProducts(left, right))
    torch.testing.assert_close(record.clipped_sum(10.0)["w"], torch.ones(3, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@CLIPPINGS
def test_non_finite_contribution_counts_as_zero(bad: float, stability: float | None) -> None:
    record = PerExampleGradients(examples=2)
    record.add("w", torch.tensor([[bad, 1e30], [0.3, 0.4]]))
    found, good = record.clipped_sum(1.0, stability)["w"], torch.tensor([0.3, 0.4]) / (1 if stability is None else 0.5 + stability)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, good, rtol=1e-5 if stability is None else 2e-4, atol=0) if bad != 1e30 else None
    assert (found - good).norm() <= 1


# Rule 4: noise once, fixed divisor.


def test_noise_is_added_once_with_deviation_sigma_c_and_divided_by_the_expected_size() -> None:
    plan = plan_with(tiny_config(), noise_multiplier=1.7, clipping_norm=0.3)
    zero = {"a": torch.zeros(200, 100), "b": torch.zeros(5000)}
    noise = torch.cat([t.flatten() for t in plan.privatise(zero, KEY, 0, 0).values()]).numpy()
    assert kstest(noise * 8 / (1.7 * 0.3), "norm").pvalue > 1e-3
    total = {"a": torch.ones(200, 100), "b": torch.ones(5000)}
    shifted = torch.cat([t.flatten() for t in plan.privatise(total, KEY, 0, 0).values()]).numpy()
    np.testing.assert_allclose(shifted - noise, 1 / 8, rtol=1e-4)


def test_noise_is_independent_between_parameters_and_steps() -> None:
    plan, zero = plan_with(tiny_config()), {"a": torch.zeros(5000), "b": torch.zeros(5000)}
    noise = [gradient for step in range(2) for gradient in plan.privatise(zero, KEY, 0, step).values()]
    off = np.corrcoef(torch.stack(noise).numpy())[~np.eye(4, dtype=bool)]
    assert np.abs(off).max() < 5 / 5000**0.5


def test_divisor_is_fixed_whatever_was_drawn(tmp_path: Path) -> None:
    """The same key draws other sizes at other steps; multiplied by q N each step is a sum of clipped gradients, never a mean."""
    config = tiny_config(batch_size=40)
    plan = plan_with(config, noise_multiplier=0.0, clipping_norm=1e-4)
    for size in (5, 20):
        total = torch.cat([g.flatten() for g in gradients(step_of(tmp_path, config, plan, dataset(40).slice(0, size))).values()])
        assert (total * 40).norm().item() == pytest.approx(size * 1e-4, rel=0.7)


def test_processes_share_one_batch_and_one_noise(tmp_path: Path) -> None:
    """Chunks dealt to three processes, their sums added, then noise: what one process gets."""
    config = tiny_config(batch_size=20)
    plan = plan_with(config)
    whole = gradients(step_of(tmp_path, config, plan, dataset()))
    silent = plan_with(config, noise_multiplier=0.0)
    sums: dict[str, Tensor] = {}
    for rank in range(3):
        step = step_of(tmp_path, config, silent, dataset(), rank, 3)
        object.__setattr__(step, "compute", _Alone(torch.device("cpu"), rank, 3))
        for name, gradient in gradients(step).items():
            sums[name] = sums.get(name, torch.zeros(())) + gradient * 20
    combined = plan.privatise(sums, KEY, 0, 0)
    for name, gradient in whole.items():
        torch.testing.assert_close(combined[name], gradient, rtol=1e-4, atol=1e-6)


class _Alone(Compute):
    """One of several processes whose sums the test adds up itself."""

    def sum_over_processes(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors


def test_chunks_computed_apart_or_together_are_the_same_computation(tmp_path: Path) -> None:
    config = tiny_config(batch_size=20, chunk_size=4)
    plan = plan_with(config)
    first = gradients(step_of(tmp_path, config, plan, dataset()))
    again = gradients(step_of(tmp_path, config, plan, dataset()))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for together in (2, 3, 100):
        several = dataclasses.replace(config, compute=dataclasses.replace(config.compute, chunks_at_once=together))
        for name, gradient in gradients(step_of(tmp_path, several, plan, dataset())).items():
            torch.testing.assert_close(gradient, first[name], rtol=1e-4, atol=1e-6)
    other = gradients(step_of(tmp_path, config, plan, dataset()), 1)
    assert not torch.equal(first["backbone.stem.weight"], other["backbone.stem.weight"])


# Rule 5: DP class means.


def means_mechanism(noise: float = 0.0) -> ClassMeansMechanism:
    return ClassMeansMechanism(noise, num_classes=3, centre=-1.0, radius=5.0, count_weight=0.3, count_floor=2.0)


def test_class_means_contribution_has_norm_at_most_one() -> None:
    images = torch.cat([torch.full((1, 1, 8, 8), v) for v in (-1.0, -0.9, 1.0, 1e9, float("nan"))])
    scaled, weight = means_mechanism().contributions(images)
    norms = np.sqrt((scaled**2).sum(axis=1) + weight**2)
    assert (norms <= 1 + 1e-12).all()
    assert norms[2] == pytest.approx(1)  # a bright image uses the whole sensitivity
    assert norms[4] == pytest.approx(0.3)


def test_class_means_without_noise_are_the_means() -> None:
    data = dataset()
    dim = ImageDataset(data.images // 4, data.labels, data.class_names)
    images, labels = dim.batch(np.arange(40))
    found = means_mechanism().release([dim.batch(np.arange(20)), dim.batch(np.arange(20, 40))], np.random.default_rng(0)).means
    for label in range(3):
        torch.testing.assert_close(found[label], images[labels == label].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_class_means_divide_by_noisy_counts_and_floor_them() -> None:
    mechanism = means_mechanism()
    weight = (1 - 0.09) ** 0.5 / 5.0
    sums = np.full((3, 4), 10 * 0.5 * weight)  # ten images of value -0.5
    for counted, effective in ((10, 10), (20, 20), (0, 2), (-50, 2)):
        found = mechanism.means(sums, np.full(3, counted * 0.3))
        torch.testing.assert_close(found, torch.full((3, 4), min(1.0, -1 + 5.0 / effective)))


def test_class_means_noise_reaches_the_counts() -> None:
    """500 equal images a class with norm R: what the mean's length says of the count has the count's noise (the sums' is a tenth)."""
    mechanism = ClassMeansMechanism(2.0, 3, 0.0, 1.0, count_weight=0.1, count_floor=10.0)
    batch = torch.full((1500, 1, 4, 4), 0.25), torch.arange(1500) % 3
    lengths = np.array([mechanism.release([batch], np.random.default_rng(seed)).means.flatten(1).sum(dim=1).numpy() / 4 for seed in range(40)])
    counts = 500 / lengths.ravel()
    assert kstest((counts - 500) * 0.1 / 2.0, "norm").pvalue > 1e-3


def test_price_of_full_batches_and_class_means_is_the_closed_form() -> None:
    """Where every image is in every batch all mechanisms are Gaussian, and their mu^2 = 1 / nu^2 add up (Dong et al., arXiv 1905.02383)."""
    plan = PrivacyPlan.calibrate(tiny_config(batch_size=40, hints="class_means"), 40)
    assert plan.class_means is not None
    mu = (10 / plan.noise_multiplier**2 + 1 / plan.class_means.noise_multiplier**2) ** 0.5
    assert gaussian_mu(plan.epsilon_after(10), plan.delta) == pytest.approx(mu, rel=5e-3)
    assert 0.995 * 5.0 <= plan.epsilon_after(10) <= 5.0


def test_class_means_noise_reaches_the_sums() -> None:
    empty = [(torch.zeros(0, 1, 64, 64), torch.zeros(0, dtype=torch.int64))]
    mechanism = ClassMeansMechanism(2.0, 3, 0.0, 1.0, 0.6, 10.0)
    found = mechanism.release(empty, np.random.default_rng(0)).means.numpy().ravel()
    assert kstest(found * 10 * 0.8 / 2, "norm").pvalue > 1e-3


# Rule 6: accounting.


def test_claim_is_void_where_rounding_errors_could_be_all_of_delta() -> None:
    million = (SubsampledGaussianMechanism(1000.0, 1.0, 1_000_000),)
    assert epsilon_of(million, 9e-10) == float("inf")
    assert epsilon_of(million, 1e-7) < 10


# Rule 8: the key.


def test_substreams_differ_by_every_part_of_their_name_and_by_key() -> None:
    parts = [{}, {"attempt": 1}, {"step": 1}, {"chunk": 1}]
    draws = [KEY.substream("draws", **part).integers(2**63) for part in parts]
    draws += [KEY.substream("batch").integers(2**63), PrivateKey.fixed("cd" * 32).substream("draws").integers(2**63)]
    assert len(set(draws)) == len(draws)
    assert KEY.substream("draws").integers(2**63) == draws[0]


def test_new_attempt_draws_everything_afresh(tmp_path: Path) -> None:
    config = tiny_config(batch_size=40)
    plan, zero = plan_with(config), {"a": torch.zeros(100)}
    half = plan_with(config, batch_size=20)
    assert not np.array_equal(half.draw_batch(KEY, 0, 0, 100), half.draw_batch(KEY, 1, 0, 100))
    assert not torch.equal(plan.privatise(zero, KEY, 0, 0)["a"], plan.privatise(zero, KEY, 1, 0)["a"])
    step = step_of(tmp_path, config, plan_with(config, noise_multiplier=0.0), dataset(10))
    first = gradients(step)
    step.journal.open_attempt("another computation", "start")
    again = gradients(step)
    assert not torch.equal(first["backbone.stem.weight"], again["backbone.stem.weight"])  # other sigma and noise


def test_fresh_keys_are_never_shared_and_never_shown() -> None:
    keys = {PrivateKey.fresh().secret for _ in range(100)}
    assert len(keys) == 100
    assert all(len(secret) == 32 for secret in keys)
    assert "ab" not in repr(KEY)
    assert PrivateKey.fresh().guaranteed
    assert not KEY.guaranteed


def test_key_file_is_secret_and_destroyed(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = PrivateKey.fresh()
    key.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert PrivateKey.load(path) == key
    with pytest.raises(FileExistsError):
        PrivateKey.fresh().save(path)
    destroy(path)
    assert not path.exists()
    destroy(path)


def test_destroyed_key_is_overwritten_first(tmp_path: Path) -> None:
    path, other_name = tmp_path / "key", tmp_path / "the same file"
    key = PrivateKey.fresh()
    key.save(path)
    os.link(path, other_name)
    destroy(path)
    assert set(other_name.read_bytes()) == {0}


# Rule 7: nothing unpaid leaves.


def test_private_step_returns_nothing_unless_asked(tmp_path: Path) -> None:
    config = tiny_config()
    assert step_of(tmp_path, config, plan_with(config), dataset())(0) == {}
    asked = tiny_config(diagnostics=True)
    diagnostics = {f"{name}_without_dp" for name in ("loss", "gradient_norm", "clipped_fraction", "drawn_batch_size")}
    assert set(step_of(tmp_path, asked, plan_with(asked), dataset())(0)) == diagnostics


# Rule 9: the journal.


def test_step_is_journalled_before_it_is_computed(tmp_path: Path) -> None:
    config = tiny_config(batch_size=40)
    step = step_of(tmp_path, config, plan_with(config, noise_multiplier=1.0), dataset())
    step.denoiser.backbone.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("crash")))
    with pytest.raises(RuntimeError, match="crash"):
        step(4)
    lines = [json.loads(line) for line in step.journal.path.read_text().splitlines()]
    assert lines[-1] == {"attempt": 0, "step": 4}
    assert step.journal.path.stat().st_mode & 0o777 == 0o600


def test_replay_is_free_only_with_the_same_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.open_attempt("same", "start")
    for step in range(5):
        journal.begin(step)
    again = Journal(path)
    again.open_attempt("same", "third", computed_by=0)
    assert again.attempt == 0
    for step in (3, 4, 5):  # from the checkpoint at 3
        again.begin(step)
    assert again.spending.steps == 6
    changed = Journal(path)
    changed.open_attempt("other", "third", computed_by=0)
    assert changed.attempt == 1
    assert changed.begun_since(3) == 0
    for step in (3, 4, 5):
        changed.begin(step)
    assert changed.spending.steps == 9
    back = Journal(path)
    back.open_attempt("same", "third", computed_by=0)
    assert back.attempt == 2  # never an old attempt's draws again


def test_line_cut_short_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.open_attempt("f", "start")
    journal.begin(0)
    with path.open("a") as file:
        file.write('{"attempt": 0, "st')
    again = Journal(path)
    assert again.spending.steps == 1
    again.begin(1)
    assert Journal(path).spending.steps == 2


def test_attempt_never_replays_on_weights_that_are_not_its_own(tmp_path: Path) -> None:
    """The same draws on other weights would let the difference of two noisy gradients cancel the noise."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.open_attempt("first", "start")
    journal.open_attempt("second", "fortieth", computed_by=0)
    journal.begin(40)
    for weights, computed_by in (("fortieth", 0), ("fortieth", None), ("fiftieth", 1)):
        own = Journal(path)
        own.open_attempt("second", weights, computed_by=computed_by)
        assert own.attempt == 1 and own.has_begun(40)
    before = path.read_bytes()
    for weights, computed_by in (("twentieth", 0), ("fiftieth", 0), ("start", None)):
        other = Journal(path)
        other.open_attempt("second", weights, computed_by=computed_by)
        assert other.attempt == 2 and not other.has_begun(40)
        path.write_bytes(before)


def ledger_of(tmp_path: Path, reached: int, has_class_means: bool = False, *, hints: str = "class_means", steps: int = 10) -> Ledger:
    config = tiny_config(hints=hints)
    config = dataclasses.replace(config, private=dataclasses.replace(config.private, steps=steps))
    run = RunDirectory(tmp_path)
    (tmp_path / "private").mkdir(exist_ok=True)
    plan = PrivacyPlan.calibrate(config, 40)
    return Ledger.open(config, plan, run, Compute(torch.device("cpu")), lambda: "data", reached=reached, has_class_means=has_class_means,
                       weights=f"step {reached}", computed_by=0 if reached > 0 else None)  # fmt: skip


def test_weights_that_spent_what_no_journal_records_are_refused(tmp_path: Path) -> None:
    for reached, has_class_means in ((3, True), (3, False), (0, True)):
        with pytest.raises(InputError, match="what was spent can't be told"):
            ledger_of(tmp_path, reached, has_class_means)


def test_steps_spent_in_vain_shorten_the_run_and_the_budget_ends_it(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, 0)
    assert ledger.last_step(10, 0) == 10
    ledger.begin_class_means()
    for step in range(6):
        ledger.journal.begin(step)
    assert ledger_of(tmp_path, 4, True).last_step(10, 4) == 10  # steps 4 and 5 are replayed
    again = ledger_of(tmp_path, 4, True)
    again.journal.open_attempt("other computation", "step 4", computed_by=0)
    assert again.last_step(10, 4) == 8  # steps 4 and 5 were paid for in vain
    for step in range(4, 8):
        again.journal.begin(step)
    again.journal.open_attempt("yet another", "step 4", computed_by=0)
    assert again.last_step(10, 4) == 4  # all ten are spent: the run ends where it stands


def test_second_release_of_the_means_is_refused_when_the_budget_has_no_room(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, 0)
    ledger.begin_class_means()
    for step in range(10):
        ledger.journal.begin(step)
    ledger.begin_class_means()  # a replay
    ledger.journal.open_attempt("other computation", "step 0")
    with pytest.raises(InputError, match="is spent"):
        ledger.begin_class_means()


# Rule 10: no layer mixes examples.


class _Mixing(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.scale = layer, nn.Linear(1, 1)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return self.layer(x) * self.scale.weight


class _Centre(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [(nn.BatchNorm2d(1), "BatchNorm2d"), (nn.InstanceNorm2d(1, track_running_stats=True), "InstanceNorm2d"), (_Centre(), "other images")],
)
def test_mixing_layers_are_refused(layer: nn.Module, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        refuse_mixing(_Mixing(layer), (1, 8, 8))


def test_probe_accepts_our_networks_and_leaves_them_as_they_were() -> None:
    net = build_denoiser(tiny_config())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    refuse_mixing(net, (1, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
