"""privacy.secure_noise: exact sums, exactly rounded noise, cryptographic streams; against multiple precision and closed forms."""

import dataclasses
import json
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from running import KEY as DIGITS
from running import call, lines, needs_full_device, private_images, refusal, small, stop_at_first_log, train_main, weights
from scipy.special import ndtri
from scipy.stats import binomtest, chisquare, kstest
from test_privacy_rules import KEY, dataset, gradients, plan_with, randomised, step_of, tiny_config

from dpsyngen.compute import Compute
from dpsyngen.config import NetworkConfig, PrivacyConfig, PrivateConfig
from dpsyngen.errors import InputError
from dpsyngen.loss import Draws, denoising_loss, draw
from dpsyngen.noise_levels import stages_of
from dpsyngen.privacy.class_means import ClassMeansMechanism
from dpsyngen.privacy.journal import Journal, Spending
from dpsyngen.privacy.layer_gradients import OuterProducts
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.per_example import PerExampleGradients, recording
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.randomness import SecureStream, poisson_sample, secure_poisson_sample
from dpsyngen.privacy.report import privacy_report
from dpsyngen.privacy.secure_noise import EXACT_ROWS, Grid, exact_magnitude, refuse_inexact_sums, rounded_gaussian
from dpsyngen.run_directory import RunDirectory

STEP = 0.3 * 1.7 * 2.0**-20


class Chosen(SecureStream):
    """A stream whose first values are given."""

    def __init__(self, values, extension=0):
        super().__init__(bytes(32))
        self.values, self.extension = np.array(values, dtype=np.uint64), extension

    def uint64(self, count):
        values, self.values = self.values[:count], self.values[count:]
        return values

    def more(self):
        return self.extension


def phi(k, exponent):
    """The probability below -(k + 1/2) / 2^exponent."""
    return mpmath.ncdf(-(mpmath.mpf(k) + 0.5) / 2**exponent)


def reference(tail, extension, exponent):
    """The number of boundaries k + 1/2, k >= 0, that 2^exponent |N| has passed, where U = Phi(-|N|) has the bits tail, extension, extension."""
    with mpmath.workprec(600):
        u = mpmath.mpf((((tail << 64) | extension) << 64) | extension) / mpmath.mpf(2) ** 192
        low, high = 0, 40 * 2**exponent
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if u < phi(middle, exponent) else (low, middle)
        return low


@pytest.mark.parametrize("exponent", [2, 20])
def test_rounded_gaussian_is_exact_on_chosen_bits(exponent):
    """Next to boundaries, in the tails, all zeros and all ones; `extension` decides where 64 bits don't."""
    tails = [0, 1, 2, 3, 1000, 2**20, 2**40, 2**63 - 1, 2**63 - 2, 2**62, 0x123456789ABCDEF]
    with mpmath.workprec(200):
        boundaries = [int(mpmath.floor(phi(int(x * 2**exponent), exponent) * 2**64)) for x in (0, 0.3, 1, 2.7, 4.9, 5.1, 7)]
    tails += [tail + offset for tail in boundaries for offset in (-1, 0, 1)]
    for extension in (1, 2**64 - 1):
        expected = [reference(tail, extension, exponent) for tail in tails]
        signed = [*tails, *(tail + 2**63 for tail in tails)]
        for slack in (2.0**-40, 2.0**-30):
            found = rounded_gaussian(Chosen(signed, extension), len(signed), exponent, slack)
            assert found.tolist() == [*expected, *(-z for z in expected)]
    undecided = boundaries[1]  # a boundary lies between this value and the next, so further bits decide
    assert exact_magnitude(undecided, Chosen([], 2**64 - 1), exponent) == exact_magnitude(undecided, Chosen([], 0), exponent) - 1


def test_fast_and_exact_path_agree():
    """With an endless slack every draw is decided in multiple precision, from the same bits."""
    fast = rounded_gaussian(KEY.secure_stream("gradient_noise"), 300, 20)
    assert torch.equal(fast, rounded_gaussian(KEY.secure_stream("gradient_noise"), 300, 20, slack=math.inf))
    assert torch.equal(fast, rounded_gaussian(KEY.secure_stream("gradient_noise"), 300_000, 20)[:300])


@pytest.mark.parametrize("exponent", [2, 3, 4])
def test_cells_have_the_rounded_gaussians_probabilities(exponent):
    draws, reach = 200_000, 4 * 2**exponent
    found = rounded_gaussian(KEY.secure_stream("gradient_noise", step=exponent), draws, exponent).numpy()
    below = np.array([float(mpmath.ncdf((k - 0.5) / 2**exponent)) for k in range(-reach, reach + 2)])
    probabilities = np.diff(np.concatenate([[0], below[1:-1], [1]]))
    counts = np.bincount((np.clip(found, -reach, reach) + reach).astype(int), minlength=2 * reach + 1)
    assert chisquare(counts, draws * probabilities).pvalue > 1e-3


def test_ndtri_errs_by_far_less_than_the_slack():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(3e-7, 0.5, 500), np.exp(rng.uniform(math.log(3e-7), math.log(0.5), 1000))])
    with mpmath.workprec(150):
        found = torch.special.ndtri(torch.from_numpy(points)).tolist()
        errors = [abs(float((mpmath.ncdf(x) - u) / mpmath.npdf(x))) for x, u in zip(found, points.tolist(), strict=True)]
    assert max(errors) < 2.0**-48


def test_rounding_commutes_with_whole_numbers():
    """S + Z is the ideal mechanism's output S + 2^e N, rounded: what makes the noise post-processing."""
    bits = KEY.secure_stream("gradient_noise").uint64(2000)
    noise = rounded_gaussian(KEY.secure_stream("gradient_noise"), 2000, 20).numpy()
    ideal = np.where(bits >> np.uint64(63), 1, -1) * ndtri((bits & np.uint64(2**63 - 1)) * 2.0**-64) * 2.0**20
    for total in (0, 1, -1, 10**9, -(2**52)):
        assert [math.floor(total + Fraction(x) + Fraction(1, 2)) for x in ideal] == [total + int(z) for z in noise]


def test_noise_has_its_deviation_and_the_divisor_is_fixed():
    plan = plan_with(tiny_config(), noise_multiplier=1.7, clipping_norm=0.3, secure_noise=True)
    zero = {"a": torch.zeros(200, 100, dtype=torch.float64), "b": torch.zeros(5000, dtype=torch.float64)}
    noise = plan.privatise(zero, KEY, 0, 0)
    assert kstest(torch.cat([t.flatten() for t in noise.values()]).numpy() * 8 / (1.7 * 0.3), "norm").pvalue > 1e-3
    units = torch.cat([t.flatten() for t in noise.values()]).double() * 8 / STEP  # in float32 the smaller ones are still next to whole numbers
    small = units[units.abs() < 2**16]
    assert len(small) > 500 and (small - small.round()).abs().max() < 2**-6
    shifted = plan.privatise({name: total + 2.0**30 for name, total in zero.items()}, KEY, 0, 0)
    for name in zero:
        torch.testing.assert_close(shifted[name] - noise[name], torch.full_like(noise[name], 2.0**30 * STEP / 8), rtol=1e-5, atol=0)
    assert noise["a"].dtype == torch.float32
    with pytest.raises(TypeError, match="float64"):
        plan.privatise({"a": torch.zeros(3)}, KEY, 0, 0)


@pytest.mark.parametrize("noise_multiplier", [0.01, 0.3, 0.5, 1.0, 1.7, 100.0])
def test_grid_units_keep_contributions_below_two_to_the_twenty(noise_multiplier):
    grid = Grid.of(noise_multiplier, 0.3)
    assert grid.step * 2.0**grid.exponent == pytest.approx(noise_multiplier * 0.3, rel=1e-15)
    assert 0.3 / grid.step <= 2**20 * (1 + 1e-15)
    refuse_inexact_sums(2**33 - 1)
    with pytest.raises(InputError, match=r"privacy\.secure_noise"):
        refuse_inexact_sums(2**33)


# Contributions.


def record_of(*parts):
    record = PerExampleGradients(examples=len(parts[0].left if isinstance(parts[0], OuterProducts) else parts[0]))
    for index, part in enumerate(parts):
        record.add(str(index), part)
    return record


def norm_of(sums):
    return torch.cat([t.flatten() for t in sums.values()]).norm().item()


@pytest.mark.parametrize(("noise_multiplier", "stability"), [(0.3, None), (1.0, None), (3.0, None), (10.0, None), (30.0, None), (1.0, 0.01)])
def test_truncated_contribution_is_at_most_c_for_any_magnitude(noise_multiplier, stability):
    generator = torch.Generator().manual_seed(0)
    step = Grid.of(noise_multiplier, 0.3).step
    normal = torch.randn(1, 100_003, generator=generator)
    for gradient in (normal, torch.ones(1, 1_000_003), torch.full((1, 300_003), -3.3), torch.tensor([[1.0, 0.0, 0.0]])):
        for scale in (1e-20, 1e-3, 1.0, 1e10, 1e18):
            for dtype in (torch.float32, torch.bfloat16):
                sums = record_of((scale * gradient).to(dtype), scale * normal[:, :77]).truncated_sum(0.3, step, 1, stability)
                assert all(t.dtype == torch.float64 and torch.equal(t, t.trunc()) for t in sums.values())
                assert norm_of(sums) * step <= 0.3 if scale > 1e-19 else norm_of(sums) == 0


def test_automatic_clipping_is_that_of_the_plain_sum():
    """Truncated to the grid, as the plan asks for it."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(40, 3000, generator=generator) * torch.logspace(-6, 3, 40)[:, None]
    gradients[3] = math.nan
    products = OuterProducts(torch.randn(40, 2, 30, generator=generator), torch.randn(40, 2, 40, generator=generator))
    record = record_of(gradients, products)
    plain = plan_with(tiny_config(), noise_multiplier=1.7, clipping_norm=0.3, clipping_stability=0.01)
    exact = dataclasses.replace(plain, secure_noise=True).clip_and_sum(record, 40)
    for name, total in plain.clip_and_sum(record, 40).items():
        torch.testing.assert_close(exact[name] * STEP, total.double(), rtol=1e-5, atol=40 * STEP)


def test_truncation_is_toward_zero():
    sums = record_of(torch.tensor([[1.9, -1.9, 0.6, -0.6, 2.0]])).truncated_sum(100.0, 1.0, 1)
    assert sums["0"].tolist() == [1, -1, 0, 0, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_non_finite_and_padding_count_as_zero(bad):
    good = torch.tensor([[0.3, -0.4]])
    alone = record_of(good).truncated_sum(1.0, STEP, 1)["0"]
    found = record_of(torch.cat([torch.tensor([[bad, 1.0]]), good, good, torch.tensor([[1.0, bad]])])).truncated_sum(1.0, STEP, 2)["0"]
    assert torch.equal(found, alone)


def test_sums_are_the_same_bits_in_any_order_and_any_chunks():
    """Of forty images: every other one of its own size, and the rest along one axis, where they reach the largest sums there can be."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(40, 3000, generator=generator) * torch.logspace(-6, 3, 40)[:, None]
    gradients[::2] *= 1e-3
    gradients[:, 7] += 1e3
    for noise_multiplier in (0.5, 1.7):
        step = Grid.of(noise_multiplier, 0.3).step
        whole = record_of(gradients).truncated_sum(0.3, step, 40)["0"]
        expected = sum(record_of(row[None]).truncated_sum(0.3, step, 1)["0"].to(torch.int64) for row in gradients)
        assert torch.equal(whole.to(torch.int64), expected)
        for size in (1, 7, EXACT_ROWS, 33):
            order = torch.randperm(40, generator=generator)
            parts = [record_of(gradients[part]).truncated_sum(0.3, step, len(part))["0"] for part in order.split(size)]
            assert torch.equal(sum(parts), whole)


def test_outer_products_that_cancel_are_truncated_like_their_matrices():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(20, 2, 30, generator=generator), torch.randn(20, 2, 40, generator=generator)
    left[:, 1], right[:, 1] = -left[:, 0], right[:, 0] * (1 + 1e-6)  # all but a millionth of the first term
    left[7, 0, 0] = math.inf
    products = OuterProducts(left, right)
    exact = torch.bmm(left.double().transpose(1, 2), right.double())
    exact[7] = 0
    for norm, unit in ((0.3, STEP), (1e-6, 1e-6 * 2.0**-20)):
        singles = [record_of(OuterProducts(left[i : i + 1], right[i : i + 1])).truncated_sum(norm, unit, 1)["0"] for i in range(20)]
        assert all(torch.equal(single, single.trunc()) and single.norm() * unit <= norm for single in singles)
        assert torch.equal(record_of(products).truncated_sum(norm, unit, 20)["0"], sum(singles))
    loose = record_of(products).truncated_sum(1e9, STEP, 20)["0"]
    torch.testing.assert_close(loose * STEP, exact.sum(dim=0), rtol=0, atol=20 * STEP)


@pytest.mark.parametrize("backbone", ["lean", "unet"])
@pytest.mark.parametrize("bf16", [False, True])
def test_an_images_gradient_depends_on_no_companion_and_no_place(backbone, bf16):
    """To the last bit, among the same number of rows: what makes the sum's sensitivity exact."""
    config = dataclasses.replace(tiny_config(), network=NetworkConfig(backbone=backbone, width=16))
    denoiser, rng, compute = randomised(config), np.random.default_rng(0), Compute(torch.device("cpu"), bf16=bf16)
    images, labels = (tensor.repeat_interleave(2, dim=0) for tensor in dataset().batch(np.arange(12)))
    draws = draw(rng, stages_of(config, "private")[0].sigma_draw, labels, (1, 8, 8), label_dropout=0.1, null_label=3)

    def contributions(order):
        rows = [2 * image + copy for image in order for copy in (0, 1)]
        with recording(denoiser, len(order), 2) as record:
            with compute.autocast():
                losses = denoising_loss(denoiser, images[rows], Draws(draws.sigma[rows], draws.noise[rows], draws.labels[rows]))
            losses.view(-1, 2).mean(dim=1).sum().backward()
        return {image: [record.norms()[place], *(record.tensor(name)[place] for name in record.gradients)] for place, image in enumerate(order)}

    first = contributions(range(8))
    for order in ([7, 3, 5, 1, 0, 2, 4, 6], [8, 9, 0, 10, 11, 1, 9, 8]):
        for image, found in contributions(order).items():
            assert image not in first or all(torch.equal(a, b) for a, b in zip(first[image], found, strict=True))


# Streams.


def test_secure_streams_differ_by_every_part_of_their_name_and_extend_on_the_side():
    names = [{}, {"attempt": 1}, {"step": 1}, {"chunk": 1}]
    first = [int(KEY.secure_stream("draws", **name).uint64(1)[0]) for name in names] + [int(KEY.secure_stream("batch").uint64(1)[0])]
    stream = KEY.secure_stream("draws")
    assert len({*first, stream.more()}) == 6  # a first value and a first extension are different bits
    assert int(stream.uint64(1)[0]) == first[0]
    whole = KEY.secure_stream("draws").uint64(200_000)
    assert (np.concatenate([[first[0]], stream.uint64(70_000), stream.uint64(129_999)]).astype(np.uint64) == whole).all()
    assert kstest(KEY.secure_stream("draws").random(20_000), "uniform").pvalue > 1e-3
    assert kstest(KEY.secure_stream("draws").standard_normal((25, 1000)).ravel(), "norm").pvalue > 1e-3


def test_secure_poisson_sample_is_independent_with_probability_q():
    population, q, draws = 50, 0.3, 4000
    stream = KEY.secure_stream("batch")
    member = np.zeros((draws, population), dtype=bool)
    for row in range(draws):
        member[row, secure_poisson_sample(stream, population, q)] = True
    assert binomtest(int(member.sum()), draws * population, q).pvalue > 1e-4
    joint = np.cov(member.T.astype(float)) - np.diag(np.full(population, q * (1 - q)))
    assert np.abs(joint[~np.eye(population, dtype=bool)]).max() < 6 * q * (1 - q) / draws**0.5
    assert secure_poisson_sample(Chosen([2**62 - 1, 2**62, 0, 2**64 - 1]), 4, 0.25).tolist() == [0, 2]
    large = secure_poisson_sample(stream, 3 * 2**20, 1e-3)
    assert abs(len(large) - 3146) < 6 * 56 and (np.diff(large) > 0).all() and large[-1] < 3 * 2**20
    assert secure_poisson_sample(stream, 7, 1.0).tolist() == list(range(7))
    assert secure_poisson_sample(stream, 0, 0.5).tolist() == []


# Class means.


class Revealed(ClassMeansMechanism):
    """Shows the noisy sums and counts instead of the means."""

    def means(self, sums, counts):
        return torch.from_numpy(np.concatenate([sums, counts[:, None]], axis=1))

    def release(self, batches, rng):
        found = []
        object.__setattr__(self, "means", lambda sums, counts: found.append(type(self).means(self, sums, counts)) or torch.zeros(sums.shape))
        super().release(batches, rng)
        return found[0]


@pytest.mark.parametrize("noise_multiplier", [0.4, 3.0])
def test_class_means_move_by_at_most_one_and_by_whole_units(noise_multiplier):
    mechanism = Revealed(noise_multiplier, 3, -1.0, 5.0, count_weight=0.3, count_floor=2.0)
    step = Grid.of(noise_multiplier, 1.0).step
    images, labels = dataset().batch(np.arange(40))
    images[39] = 1.0  # bright: uses the whole sensitivity
    units = [
        mechanism.release([(images[a:b], labels[a:b]) for a, b in cuts], KEY.secure_stream("class_means")) / step
        for cuts in ([(0, 40)], [(20, 40), (0, 13), (13, 20)], [(0, 39)])
    ]
    torch.testing.assert_close(units[0], units[0].round(), rtol=0, atol=1e-6)
    assert torch.equal(units[0], units[1])
    assert 0.99 < (units[0] - units[2]).norm() * step <= 1
    noise = mechanism.release([(images[:0].expand(0, 1, 8, 8), labels[:0])], KEY.secure_stream("class_means"))
    assert kstest(noise.numpy().ravel() / noise_multiplier, "norm").pvalue > 1e-3


# The step and the run.


class _Seen(Compute):
    """Keeps what this process would send to the others."""

    def sum_over_processes(self, tensors):
        object.__setattr__(self, "sent", {name: tensor.clone() for name, tensor in tensors.items()})
        return tensors


def sums_of(tmp_path, plan, config, images, rank=0, processes=1):
    step = step_of(tmp_path, config, plan, images, rank, processes)
    object.__setattr__(step, "compute", _Seen(torch.device("cpu"), rank, processes))
    rows = []
    step.denoiser.backbone.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    return gradients(step), step.compute.sent, rows


def test_processes_send_whole_numbers_that_add_up_to_the_same_bits(tmp_path):
    config = tiny_config(batch_size=20, chunk_size=4)
    plan = plan_with(config, secure_noise=True)
    _, whole, rows = sums_of(tmp_path, plan, config, dataset())
    parts = [sums_of(tmp_path, plan, config, dataset(), rank, 3)[1] for rank in range(3)]
    for name, total in whole.items():
        assert torch.equal(total, total.round()) and torch.equal(sum(part[name] for part in parts), total)
    assert len(rows) > 2 and set(rows) == {8}  # every chunk has the same shape, whatever was drawn


def test_one_image_moves_the_sum_by_at_most_c(tmp_path):
    config = tiny_config(batch_size=40, chunk_size=4)
    for stability in (None, 1e-3):
        plan = plan_with(config, clipping_norm=0.05, clipping_stability=stability, secure_noise=True)
        sums = [sums_of(tmp_path, plan, config, dataset(40).slice(0, size))[1] for size in (38, 37)]
        difference = {name: sums[0][name] - sums[1][name] for name in sums[0]}
        assert 0.9 * 0.05 < norm_of(difference) * Grid.of(1.0, 0.05).step <= 0.05


def test_empty_batch_is_pure_noise(tmp_path):
    config = tiny_config()
    found, _, rows = sums_of(tmp_path, plan_with(config, secure_noise=True), config, dataset(0))
    assert rows == []
    assert kstest(torch.cat([gradient.flatten() for gradient in found.values()]).numpy() * 8, "norm").pvalue > 1e-3


def test_plan_draws_everything_from_the_stream_it_promises(tmp_path):
    config = tiny_config(batch_size=20, chunk_size=4)
    plain = plan_with(config)
    secure = dataclasses.replace(plain, secure_noise=True)
    batch = secure_poisson_sample(KEY.secure_stream("batch", attempt=1, step=2), 40, 0.5)
    assert secure.draw_batch(KEY, 1, 2, 40).tolist() == batch.tolist()
    assert secure.draw_source(KEY, 1, 2, 3).random(1) == KEY.secure_stream("draws", attempt=1, step=2, chunk=3).random(1)
    with pytest.raises(InputError, match="fewer than"):
        dataclasses.replace(secure, batch_size=1, expected_size=2**60).draw_batch(KEY, 0, 0, 2**33)
    batch = poisson_sample(KEY.substream("batch", attempt=1, step=2), 40, 0.5)
    assert plain.draw_batch(KEY, 1, 2, 40).tolist() == batch.tolist()
    assert plain.draw_source(KEY, 1, 2, 3).random(1) == KEY.substream("draws", attempt=1, step=2, chunk=3).random(1)
    _, sums, rows = sums_of(tmp_path, plain, config, dataset())
    assert sum(rows) == 2 * len(plain.draw_batch(KEY, 0, 0, 40)) and all(total.dtype == torch.float32 for total in sums.values())


def test_plan_and_ledger_take_the_setting_from_the_config(tmp_path):
    config = tiny_config(hints="class_means")
    config = dataclasses.replace(config, privacy=PrivacyConfig(secure_noise=True), private=PrivateConfig(batch_size=8, steps=0, epochs=None))
    plan = PrivacyPlan.calibrate(config, 40)
    assert plan.secure_noise
    journal = Journal(tmp_path / "journal.jsonl")
    journal.open_attempt("test", "start")
    for given, kind in ((plan, SecureStream), (dataclasses.replace(plan, secure_noise=False), np.random.Generator)):
        assert isinstance(Ledger(config, given, RunDirectory(tmp_path), KEY, journal).begin_class_means(), kind)


@needs_full_device
def test_a_run_with_secure_noise_finishes_says_so_and_resumes_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    flags = ["--privacy.secure_noise", "true", "--stages.variant=dpdm", "--hints.kind=class_means", "--private.steps=5"]
    arguments = small(private_images(tmp_path / "images.npz"), *flags, f"--privacy.unsafe_fixed_key={DIGITS}", "--tracking.log_every=5")
    stop_at_first_log(tmp_path / "cut")
    assert "No space left" in refusal(train_main, monkeypatch, capsys, *arguments, "--run", tmp_path / "cut")
    (tmp_path / "cut" / "metrics.jsonl").unlink()
    for run in ("cut", "whole"):
        call(train_main, *arguments, "--run", tmp_path / run)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert lines(tmp_path / "cut" / "metrics.jsonl") == lines(tmp_path / "whole" / "metrics.jsonl")

    report = json.loads((tmp_path / "whole" / "privacy.json").read_text())
    assert report["status"] == "finished" and report["noise"].startswith("secure")


def test_report_names_the_generator():
    config = tiny_config()
    for secure, generator in ((True, "AES-256"), (False, "Philox")):
        report = privacy_report(plan_with(config, secure_noise=secure), Spending(3, 0), config, status="running", guaranteed=True)
        assert generator in report["randomness"] and ("noise" in report) == secure
