"""What the K draws of an image vary: strata of sigma, opposite noise, augmentation; and that the guarantee doesn't notice."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from running import WEIGHTS, launch, private_images, small
from scipy.stats import binomtest, chisquare, kstest, truncnorm
from test_privacy_rules import KEY, dataset, gradients, plan_with, randomised, step_of, tiny_config
from torch import Tensor

from dpsyngen.augmentation import moved
from dpsyngen.cli import load_run_config, read_config
from dpsyngen.compute import Compute, Piece
from dpsyngen.config import PrivateConfig, RunConfig, SyntheticConfig
from dpsyngen.denoiser import Denoiser
from dpsyngen.errors import InputError
from dpsyngen.loss import Draws, DrawSource, Variation, denoising_loss, draw
from dpsyngen.noise_levels import stages_of
from dpsyngen.ordinary_step import Lesson, OrdinaryStep, nonprivate_batches
from dpsyngen.sigma_draws import Mixture, SigmaDraw, TruncatedNormal, Uniform, stratified

K = 4
EVERYTHING = {"sigma_stratified": True, "antithetic": True, "augment_flip": True, "augment_shift": 2}
OPTIONS = {
    "nothing": {},
    "stratified": {"sigma_stratified": True},
    "antithetic": {"antithetic": True},
    "flipped": {"augment_flip": True},
    "shifted": {"augment_shift": 3},
    "everything": EVERYTHING,
}
SOURCES = {"default": KEY.substream, "secure": KEY.secure_stream}


def config_with(options: dict[str, int], hints: str = "none", **settings: int) -> RunConfig:
    config = tiny_config(copies=K, hints=hints, **settings)
    return dataclasses.replace(config, private=dataclasses.replace(config.private, **options))


def rows_of(source: str, options: dict[str, int], images: int, *, copies: int = K, sigma_draw: SigmaDraw = Uniform(0.0, 1.0)) -> Draws:  # noqa: B008
    variation = Variation.of(PrivateConfig(noise_multiplicity=copies, **options))
    labels = torch.zeros(images * copies, dtype=torch.int64)
    return draw(SOURCES[source]("draws"), sigma_draw, labels, (1, 2, 2), label_dropout=0.1, null_label=3, copies=copies, variation=variation)


def moved_by_hand(image: np.ndarray, mirrored: bool, down: int, right: int) -> np.ndarray:
    """One image [C, H, W]: mirrored, then shifted over a border repeated without end."""
    image = image[:, :, ::-1] if mirrored else image
    far = 10
    padded = np.pad(image, ((0, 0), (far, far), (far, far)), mode="edge")
    return padded[:, far - down : far - down + image.shape[1], far - right : far - right + image.shape[2]]


def rows_by_hand(rng: DrawSource, sigma_draw: SigmaDraw, images: Tensor, labels: Tensor, options: PrivateConfig) -> Iterator[tuple[Tensor, Draws]]:
    """For each of some images its K rows and their draws, one number of the stream after another in the order that is documented."""
    count, pairs = len(images), K // 2 if options.antithetic else K
    uniform = rng.random(count * pairs).reshape(count, pairs)
    dropped = rng.random(count * K).reshape(count, K) < 0.1
    noise = torch.from_numpy(rng.standard_normal((count * pairs, *images.shape[1:]), dtype=np.float32)).view(count, pairs, *images.shape[1:])
    mirrored = rng.random(count * K).reshape(count, K) < 0.5 if options.augment_flip else np.zeros((count, K), dtype=bool)
    width = 2 * options.augment_shift + 1
    shift = np.zeros((count, K, 2)) if width == 1 else rng.random(2 * count * K).reshape(count, K, 2) * width // 1 - options.augment_shift
    for i in range(count):
        x, sigma, n, label = [], [], [], []
        for k in range(K):
            pair = k // (K // pairs)
            u = (pair + uniform[i, pair]) / pairs if options.sigma_stratified else uniform[i, pair]
            sigma.append(math.exp(sigma_draw.log_sigma(np.array(u))))
            n.append(noise[i, pair] * (-1 if options.antithetic and k % 2 else 1))
            label.append(3 if dropped[i, k] else int(labels[i]))
            x.append(moved_by_hand(images[i].numpy(), mirrored[i, k], *shift[i, k].astype(int)).copy())
        yield torch.from_numpy(np.stack(x)), Draws(torch.tensor(sigma), torch.stack(n), torch.tensor(label))


def flat(gradients: Iterator[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


# Strata of sigma.


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("antithetic", [False, True])
def test_an_image_has_one_sigma_in_each_stratum_and_all_together_follow_the_draw(source: str, antithetic: bool) -> None:
    strata = 8
    drawn = rows_of(source, {"sigma_stratified": True, "antithetic": antithetic}, 2000, copies=strata * (2 if antithetic else 1))
    uniform = drawn.sigma.double().log().numpy().reshape(2000, strata, -1)[:, :, 0]
    assert (np.floor(uniform * strata) == np.arange(strata)).all()
    within = uniform * strata - np.arange(strata)
    assert min(kstest(column, "uniform").pvalue for column in within.T) > 1e-4
    correlation = np.corrcoef(np.concatenate([within[:-1].T, within[1:].T]))[~np.eye(2 * strata, dtype=bool)]
    assert np.abs(correlation).max() < 5 / 2000**0.5  # between strata of an image, and between images
    assert kstest(uniform.ravel()[::7], "uniform").pvalue > 1e-3


def test_strata_of_a_lognormal_and_of_a_mixture() -> None:
    lognormal = TruncatedNormal(-3.0, math.inf, -1.2, 1.2)
    log_sigma = rows_of("default", {"sigma_stratified": True}, 3000, sigma_draw=lognormal).sigma.double().log().numpy()
    assert kstest(log_sigma[::3], truncnorm(-1.5, np.inf, loc=-1.2, scale=1.2).cdf).pvalue > 1e-3
    mixed = Mixture((Uniform(3.0, 4.0), lognormal, Uniform(-9.0, -7.0)), (1.0, 1.0, 2.0))  # not in the order of ln sigma
    log_sigma = rows_of("default", {"sigma_stratified": True}, 3000, sigma_draw=mixed).sigma.double().log().numpy().reshape(-1, K)
    assert ((log_sigma[:, 0] > 3) & (log_sigma[:, 1] > -3) & (log_sigma[:, 2] < -7) & (log_sigma[:, 3] < -7)).all()
    assert kstest(log_sigma[:, 0] - 3, "uniform").pvalue > 1e-3
    assert kstest((log_sigma[:, 2:].ravel()[::3] + 9) / 2, "uniform").pvalue > 1e-3


def test_the_average_over_an_image_varies_less_with_strata_and_keeps_its_mean() -> None:
    """Of ln sigma, which is linear in the uniform: 1 / (12 K) is the variance of K independent ones, 1 / (12 K^3) of one per stratum."""
    means = {name: rows_of("default", OPTIONS[name], 4000).sigma.double().log().view(-1, K).mean(dim=1) for name in ("nothing", "stratified")}
    assert means["nothing"].var() == pytest.approx(1 / (12 * K), rel=0.1)
    assert means["stratified"].var() == pytest.approx(1 / (12 * K**3), rel=0.1)
    assert means["stratified"].mean() == pytest.approx(0.5, abs=5 * (12 * K**3 * 4000) ** -0.5)


def test_the_largest_uniform_stays_below_one() -> None:
    for strata in range(1, 100):
        uniform = stratified(np.full(strata, 1 - 2.0**-53), strata)
        assert uniform.max() < 1
        assert np.isfinite(TruncatedNormal(-math.inf, math.inf, -1.2, 1.2).log_sigma(uniform)).all()


# Opposite noise.


@pytest.mark.parametrize("source", SOURCES)
def test_opposite_noise_comes_in_pairs_of_an_image_with_one_sigma(source: str) -> None:
    drawn = rows_of(source, {"antithetic": True}, 1000)
    sigma, noise = drawn.sigma.view(1000, K // 2, 2), drawn.noise.view(1000, K // 2, 2, -1)
    assert torch.equal(sigma[..., 0], sigma[..., 1])
    assert torch.equal(noise[:, :, 0], -noise[:, :, 1])
    assert kstest(noise[:, :, 0].flatten().numpy(), "norm").pvalue > 1e-3
    assert kstest(sigma[..., 0].double().log().flatten().numpy(), "uniform").pvalue > 1e-3
    dropped = (drawn.labels == 3).view(-1, 2).double()
    assert torch.corrcoef(dropped.T)[0, 1].abs() < 5 / 2000**0.5  # what else there is varies from row to row


# Augmentation.


def test_moves_are_what_padding_and_cutting_gives() -> None:
    x = torch.from_numpy(np.random.default_rng(0).random((50, 3, 6, 8), dtype=np.float32))
    for mirrored, down, right in itertools.product((0, 1), (-3, 0, 1, 6, 9), (-8, -2, 0, 5)):
        found = moved(x, torch.tensor([[mirrored, down, right]]).expand(50, 3))
        assert torch.equal(found[7], torch.from_numpy(moved_by_hand(x[7].numpy(), bool(mirrored), down, right).copy()))
    moves = torch.from_numpy(np.random.default_rng(1).integers([0, -2, -2], [2, 3, 3], (50, 3)))
    found = moved(x, moves)
    for i in range(50):
        assert torch.equal(found[i], moved(x[i : i + 1], moves[i : i + 1])[0])


@pytest.mark.parametrize("source", SOURCES)
def test_moves_are_equally_likely_and_independent_from_row_to_row(source: str) -> None:
    moves = rows_of(source, EVERYTHING, 2000).moves
    assert moves is not None
    mirrored, down, right = moves.numpy().T
    assert binomtest(int(mirrored.sum()), len(mirrored), 0.5).pvalue > 1e-4
    assert chisquare(np.bincount(5 * (down + 2) + right + 2 + 25 * mirrored, minlength=50)).pvalue > 1e-4
    together = np.concatenate([moves[:-1].T.numpy(), moves[1:].T.numpy()])
    assert np.abs(np.corrcoef(together)[~np.eye(6, dtype=bool)]).max() < 5 / len(moves) ** 0.5
    only_flips = rows_of(source, {"augment_flip": True}, 10).moves
    assert only_flips is not None and not only_flips[:, 1:].any()


# The private step.


@pytest.mark.parametrize("source", SOURCES)
def test_without_options_and_with_augmentation_alone_all_else_is_drawn_as_it_always_was(source: str) -> None:
    for options in ({}, {"augment_flip": True, "augment_shift": 1}):
        rng, found = SOURCES[source]("draws"), rows_of(source, options, 5)
        assert torch.equal(found.sigma, torch.from_numpy(np.exp(rng.random(20)).astype(np.float32)))
        assert torch.equal(found.labels, torch.from_numpy(np.where(rng.random(20) < 0.1, 3, 0)))
        assert torch.equal(found.noise, torch.from_numpy(rng.standard_normal((20, 1, 2, 2), dtype=np.float32)))
        assert (found.moves is None) == (not options)


@pytest.mark.parametrize("name", OPTIONS)
def test_private_step_is_what_a_loop_over_rows_made_by_hand_computes(name: str, tmp_path: Path) -> None:
    """One image after another with plain autograd: the mean loss of its K rows, its gradient, clipped to C; then the sum over images."""
    config, count, size = config_with(OPTIONS[name], batch_size=40, chunk_size=4), 10, 4
    step = step_of(tmp_path, config, plan_with(config, noise_multiplier=0.0), dataset(40).slice(0, count))
    images, labels = step.dataset.batch(np.arange(count))
    single = []
    for chunk, start in enumerate(range(0, count, size)):
        inside = slice(start, start + size)
        rng = KEY.substream("draws", attempt=0, step=0, chunk=chunk)
        for x, draws in rows_by_hand(rng, step.sigma_draw, images[inside], labels[inside], config.private):
            loss = denoising_loss(step.denoiser, x, draws).mean()
            single.append(flat(iter(torch.autograd.grad(loss, list(step.denoiser.parameters())))))
    whole = torch.stack(single)
    norms = whole.norm(dim=1)
    limit = norms.median().item()  # half of the images are clipped
    object.__setattr__(step, "plan", plan_with(config, noise_multiplier=0.0, clipping_norm=limit))
    found = flat(iter(gradients(step).values())) * 40
    expected = (whole * (limit / norms).clamp(max=1)[:, None]).sum(dim=0)
    assert (found - expected).norm() < 3e-4 * expected.norm()


@pytest.mark.parametrize("bf16", [False, True])
def test_removing_an_image_moves_the_sum_by_at_most_c_whatever_its_rows_are(bf16: bool, tmp_path: Path) -> None:
    """All images in the batch, no noise, the last image alone in its chunk: with and without it the sums differ by its clipped gradient."""
    norm, config = 0.05, config_with(EVERYTHING, batch_size=40, chunk_size=3)
    sums = []
    for size in (37, 36):
        step = step_of(tmp_path, config, plan_with(config, noise_multiplier=0.0, clipping_norm=norm), dataset(40).slice(0, size))
        object.__setattr__(step, "compute", Compute(torch.device("cpu"), bf16=bf16))
        sums.append(flat(iter(gradients(step).values())) * 40)
    assert 0.9 * norm < (sums[0] - sums[1]).norm().item() <= norm * (1 + 1e-4)


@pytest.mark.parametrize("secure", [False, True])
def test_an_images_rows_are_made_of_that_image_alone(secure: bool, tmp_path: Path) -> None:
    """With another image in one place of a chunk, with the same draws, no other image's gradient changes by a bit."""
    config = config_with(EVERYTHING, batch_size=40, chunk_size=8)
    before, after = dataset(8), dataset(8)
    after.images[3] = 255 - after.images[3]
    found = []
    for images in (before, after):
        step = step_of(tmp_path, config, plan_with(config, secure_noise=secure), images)
        record, losses = step._pieces([Piece(0, np.arange(8), slice(0, 8))], 0)
        found.append([losses, record.norms(), *(record.tensor(name).flatten(1) for name in record.gradients)])
    for one, other in zip(*found, strict=True):
        same = (one == other).view(8, -1).all(dim=1)
        assert same[[0, 1, 2, 4, 5, 6, 7]].all()
    assert not torch.equal(found[0][0][3], found[1][0][3])


def test_hints_stay_or_are_moved_with_their_image(tmp_path: Path) -> None:
    """One step's gradient against rows by hand whose hint is moved by hand, and with the setting off the class mean as it is."""
    means = torch.from_numpy(np.random.default_rng(5).uniform(-1, 1, (3, 1, 8, 8)).astype(np.float32))
    null = means.mean(dim=0, keepdim=True)
    found = {}
    for hints_moved in (False, True):
        config = config_with(EVERYTHING | {"augment_hints": hints_moved}, batch_size=40, chunk_size=8, hints="class_means")
        step = step_of(tmp_path, config, plan_with(config, noise_multiplier=0.0, clipping_norm=1e6), dataset(5))
        step.denoiser.set_class_means(means)
        found[hints_moved] = flat(iter(gradients(step).values())) * 40
        images, labels = step.dataset.batch(np.arange(5))
        moves = draw(KEY.substream("draws"), step.sigma_draw, labels.repeat_interleave(K), (1, 8, 8), label_dropout=0.1, null_label=3, copies=K,
                     variation=Variation.of(config.private)).moves  # fmt: skip
        assert moves is not None
        loss = torch.zeros(())
        for i, (x, draws) in enumerate(rows_by_hand(KEY.substream("draws"), step.sigma_draw, images, labels, config.private)):
            hint = torch.cat([means, null])[draws.labels]
            if hints_moved:
                by_hand = [moved_by_hand(m.numpy(), *map(int, move)).copy() for m, move in zip(hint, moves[K * i : K * i + K], strict=True)]
                hint = torch.from_numpy(np.stack(by_hand))
            loss = loss + denoising_loss(step.denoiser, x, draws, hint).mean()
        expected = flat(iter(torch.autograd.grad(loss, list(step.denoiser.parameters()))))
        assert (found[hints_moved] - expected).norm() < 3e-4 * expected.norm()
    assert (found[True] - found[False]).norm() > 0.1 * found[False].norm()


def test_neither_processes_nor_chunks_at_once_change_the_gradient(tmp_path: Path) -> None:
    config = config_with(EVERYTHING, batch_size=20, chunk_size=4)
    plan = plan_with(config)
    whole = gradients(step_of(tmp_path, config, plan, dataset()))
    several = dataclasses.replace(config, compute=dataclasses.replace(config.compute, chunks_at_once=3))
    for name, gradient in gradients(step_of(tmp_path, several, plan, dataset())).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)
    batch = plan.draw_batch(KEY, 0, 0, 40)
    assert len(batch) > 8
    drawn = []
    for processes in (1, 3):
        steps = [step_of(tmp_path, config, plan, dataset(), rank, processes) for rank in range(processes)]
        pieces = [(step, piece) for step in steps for together in step.compute.deal(batch, config.compute) for piece in together]
        drawn.append(Draws.cat([step._rows(piece, 0)[1] for step, piece in pieces]))
    assert all(torch.equal(one, other) for one, other in zip(*(vars(draws).values() for draws in drawn), strict=True))


# Ordinary steps.


def test_unprotected_images_are_varied_in_the_same_way_and_programmatic_ones_not_augmented() -> None:
    config, images = config_with(EVERYTHING, chunk_size=8), dataset()
    denoiser, stage = randomised(config), stages_of(config, "private")[0]
    assert isinstance(denoiser, Denoiser)
    lesson = Lesson(stage, denoiser, nonprivate_batches(images, denoiser))
    OrdinaryStep((lesson,), 8, config.private, config, Compute(torch.device("cpu")), public=True)(5)
    found = flat(parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((config.seed, 5, 0))))
    chosen = images.batch(rng.integers(40, size=8))
    losses = [denoising_loss(denoiser, x, draws).mean() for x, draws in rows_by_hand(rng, stage.sigma_draw, *chosen, config.private)]
    expected = flat(iter(torch.autograd.grad(torch.stack(losses).mean(), list(denoiser.parameters()))))
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert Variation.of(SyntheticConfig(sigma_stratified=True, antithetic=True)) == Variation(sigma_stratified=True, antithetic=True)


# Configuration and script.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--private.antithetic=true", "--private.noise_multiplicity=3"),
         "--private.antithetic: expected false, since private.noise_multiplicity = 3 makes no pairs, got True"),
        (("--synthetic.antithetic=true", "--synthetic.noise_multiplicity=1"),
         "--synthetic.antithetic: expected false, since synthetic.noise_multiplicity = 1 makes no pairs, got True"),
        (("--private.augment_shift=-1",), "--private.augment_shift: expected an integer >= 0, got -1"),
        (("--private.augment_shift=15",), "--private.augment_shift: expected at most 14, half of data.image_size, got 15"),
        (("--private.augment_hints=true", "--hints.kind=none"), "--private.augment_hints: expected false, since hints.kind is none, got True"),
        (("--private.augment_flip=2",), "--private.augment_flip: expected true or false, got 2"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_config([], flags)
    assert str(caught.value) == said


def test_train_runs_with_everything(tmp_path: Path) -> None:
    settings = EVERYTHING | {"augment_hints": True}
    options = [f"--private.{name}={str(value).lower()}" for name, value in settings.items()]
    arguments = small(private_images(tmp_path / "images.npz", channels=3), *options, "--data.channels=3", "--stages.variant=finetune_all",
                      "--synthetic.sigma_stratified=true", "--synthetic.antithetic=true", "--stages.replay=1", "--privacy.secure_noise=true",
                      "--run", tmp_path / "run")  # fmt: skip
    result = launch("train", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    config = load_run_config(tmp_path / "run")
    assert {name: getattr(config.private, name) for name in settings} == settings
    assert config.synthetic.sigma_stratified and config.synthetic.antithetic
    assert (tmp_path / "run" / WEIGHTS).exists()
