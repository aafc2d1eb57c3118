"""Several prototypes per class: DP k-means against brute force, its price, its sensitivity, and the labels that choose among them."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from running import call, private_images, refusal, sample_main, small, train_main
from scipy.stats import kstest
from torch import Tensor

from dpsyngen.cli import read_config
from dpsyngen.config import DataConfig, HintsConfig, NetworkConfig, PrivacyConfig, PrivateConfig, RunConfig, StagesConfig
from dpsyngen.denoiser import Denoiser, RoutedDenoiser, build_denoiser
from dpsyngen.privacy.accounting import gaussian_mu
from dpsyngen.privacy.class_means import ClassMeansMechanism
from dpsyngen.privacy.plan import PrivacyPlan

CLASSES, PARTS, SHAPE = 2, 3, (1, 6, 6)


def mechanism(noise: float = 0.0, rounds: int = 6, prototypes: int = PARTS) -> ClassMeansMechanism:
    return ClassMeansMechanism(noise, CLASSES, -1.0, 20.0, 0.3, 1.0, prototypes, rounds)


def parted_images(each: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images around PARTS centres in each class, in proportion 3 : 2 : 1; their classes, their centres' rows, the centres."""
    rng = torch.Generator().manual_seed(3)
    centres = torch.rand(CLASSES * PARTS, *SHAPE, generator=rng) * 1.4 - 0.7
    of_class = torch.tensor([0] * (each // 2) + [1] * (each // 3) + [2] * (each // 6))
    rows = torch.cat([of_class + PARTS * label for label in range(CLASSES)])[torch.randperm(CLASSES * each, generator=rng)]
    return centres[rows] + 0.05 * torch.randn(len(rows), *SHAPE, generator=rng), rows // PARTS, rows, centres


def lloyd(images: Tensor, labels: Tensor, start: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm image by image: the centres, that of an empty part the class mean, and how many images made each of them."""
    centres, means = start.clone(), [images[labels == label].mean(dim=0) for label in range(CLASSES)]
    for _ in range(rounds):
        members: list[list[Tensor]] = [[] for _ in centres]
        for image, label in zip(images, labels.tolist(), strict=True):
            own = range(label * PARTS, (label + 1) * PARTS)
            members[min(own, key=lambda row: float(((image - centres[row]) ** 2).sum()))].append(image)
        centres = torch.stack([torch.stack(part).mean(dim=0) if part else means[row // PARTS] for row, part in enumerate(members)])
    return centres, torch.tensor([len(part) for part in members], dtype=torch.float32)


def test_without_noise_it_is_lloyds_algorithm_within_each_class() -> None:
    images, labels, _, _ = parted_images()
    batches = [(images[:50], labels[:50]), (images[50:], labels[50:])]
    found = mechanism().release(batches, np.random.default_rng(0))
    start = mechanism()._first_prototypes(torch.stack([images[labels == label].mean(dim=0) for label in range(CLASSES)]))
    expected, counts = lloyd(images, labels, start, 5)
    torch.testing.assert_close(found.means, expected, rtol=1e-4, atol=1e-4)
    shares = counts.clamp(min=1).unflatten(0, (CLASSES, PARTS))
    torch.testing.assert_close(found.shares, (shares / shares.sum(dim=1, keepdim=True)).flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("without", [0, 7, 119])
def test_each_round_moves_by_at_most_one_whoever_is_left_out(without: int) -> None:
    """With what was released before given, one image's part in a round's vector has norm at most 1; a bright one reaches it."""
    images, labels, _, centres = parted_images()
    images[without] = 50.0
    rest = np.arange(len(images)) != without
    for prototypes in (None, centres):
        both = []
        for kept in (slice(None), rest):
            sums, counts, _ = mechanism()._round([(images[kept], labels[kept])], prototypes, np.random.default_rng(0), lambda own: own)
            both.append(np.concatenate([sums.ravel(), counts]))
        assert 0.99 < np.linalg.norm(both[0] - both[1]) <= 1 + 1e-9


def test_every_round_has_noise_on_sums_and_counts() -> None:
    noisy = mechanism(noise=3.0)
    empty = [(torch.zeros(0, 1, 40, 40), torch.zeros(0, dtype=torch.int64))]
    for prototypes in (None, torch.zeros(CLASSES * PARTS, 1, 40, 40)):
        draws = [noisy._round(empty, prototypes, np.random.default_rng(seed), lambda own: own)[:2] for seed in range(30)]
        for index in (0, 1):
            assert kstest(np.concatenate([draw[index].ravel() for draw in draws]) / 3.0, "norm").pvalue > 1e-3


def test_every_round_is_in_the_price() -> None:
    """With every image in every batch all mechanisms are Gaussian, and their mu^2 add up (Dong et al., arXiv 1905.02383)."""
    config = RunConfig(
        data=DataConfig(image_size=8, num_classes=3, expected_size=40), network=NetworkConfig(width=8), hints=HintsConfig(prototypes=2, rounds=5),
        private=PrivateConfig(batch_size=40, steps=10, epochs=None), privacy=PrivacyConfig(epsilon=5.0, delta=1e-3),
    )  # fmt: skip
    plan = PrivacyPlan.calibrate(config, 40)
    assert plan.class_means is not None and plan.class_means.rounds == 5
    means = 5 / plan.class_means.noise_multiplier**2
    assert gaussian_mu(plan.epsilon_after(10), plan.delta) == pytest.approx((10 / plan.noise_multiplier**2 + means) ** 0.5, rel=5e-3)
    assert means == pytest.approx(0.1 * gaussian_mu(5.0, 1e-3) ** 2, rel=1e-6)  # hints.share
    assert [m.name for m in plan.mechanisms(3, means_releases=2)] == ["DP class means"] * 10 + ["DP-SGD"]
    assert PrivacyPlan.from_record(plan.record(), ()) == plan


def test_parts_that_are_noise_are_the_class_means() -> None:
    images, labels, _, _ = parted_images()
    found = mechanism(noise=30.0, rounds=4).release([(images, labels)], np.random.default_rng(0)).means.unflatten(0, (CLASSES, PARTS))
    raw = 30.0 * 20.0 / (0.95 * 20)  # what noise on a part of twenty images comes to
    assert (found - found.mean(dim=1, keepdim=True)).abs().mean() < 0.1 < raw


def test_parts_are_kept_where_they_are_signal() -> None:
    """Against the best factor there is, which a look at the true parts tells."""
    rng, noisy = np.random.default_rng(0), mechanism(noise=0.3, prototypes=PARTS)
    truth = np.zeros((CLASSES * PARTS, 2000))
    truth[:, :1000] = rng.standard_normal((CLASSES * PARTS, 1)) * 0.05 * np.sign(rng.standard_normal(1000))
    counts = np.full(CLASSES * PARTS, 100 * 0.3)
    scale = 20.0 / 0.91**0.5 / 100
    found = noisy.means_of_parts((truth - noisy.centre) / scale + 0.3 * rng.standard_normal(truth.shape), counts).numpy()
    plain = np.mean((0.3 * scale) ** 2)
    assert np.mean((found - truth) ** 2) < 0.75 * plain


def prototyped(prototypes: int = PARTS, **stages: str) -> Denoiser | RoutedDenoiser:
    return build_denoiser(RunConfig(
        data=DataConfig(image_size=8, num_classes=4), network=NetworkConfig(width=8), hints=HintsConfig(prototypes=prototypes),
        stages=StagesConfig(**stages),  # type: ignore[arg-type]
    ))  # fmt: skip


def test_a_label_gives_class_and_hint() -> None:
    net = prototyped()
    seen: list[Tensor] = []

    class Recorder(torch.nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
            seen.extend([x[:, 1], labels])
            return torch.zeros(len(x), 1, 8, 8)

    net.backbone = Recorder()
    means = torch.rand(12, 1, 8, 8)
    shares = torch.tensor([0.5, 0.25, 0.25]).repeat(4)
    net.set_class_means(means, shares)
    net(torch.randn(3, 1, 8, 8), torch.ones(3), torch.tensor([0, 7, 12]))
    assert seen[1].tolist() == [0, 2, 4]
    torch.testing.assert_close(seen[0][:2], means[[0, 7], 0])
    torch.testing.assert_close(seen[0][2], (means * shares[:, None, None, None]).sum(dim=0)[0] / 4)
    assert net.condition(means[[4, 5, 9]] + 0.01, torch.tensor([1, 1, 3])).tolist() == [4, 5, 9]


@pytest.mark.parametrize("holder", ["shared", "routed"])
def test_samples_have_prototypes_by_their_shares_and_their_place(holder: str) -> None:
    net = prototyped(holder=holder, variant="coarse_cleaning")
    net.set_class_means(torch.rand(12, 1, 8, 8), torch.tensor([0.6, 0.3, 0.1]).repeat(4))
    classes = np.arange(4000) % 4
    labels = net.conditions_to_draw(classes)
    assert (labels // PARTS == classes).all()
    counts = np.bincount(labels, minlength=12).reshape(4, PARTS)
    assert np.abs(counts / 1000 - [0.6, 0.3, 0.1]).max() < 0.005
    assert np.array_equal(net.conditions_to_draw(classes[:77]), labels[:77])
    assert net.conditions_to_draw(np.array([4, 4])).tolist() == [12, 12]  # no class


def test_a_run_with_prototypes(tmp_path, monkeypatch, capsys) -> None:
    """Trained, drawn by the script and by the pipeline, told in the report."""
    from dpsyngen.pipeline import DPSynGenPipeline

    images = private_images(tmp_path / "images.npz")
    for index, stages in enumerate((["--stages.variant=finetune_all"], ["--stages.variant=nonprivate"])):
        run = tmp_path / str(index)
        call(train_main, *small(images, "--hints.prototypes=2", "--hints.rounds=3", *stages), "--run", run)
        call(sample_main, "--run", run, "--num-images", "8")
        pipeline = DPSynGenPipeline.from_pretrained(run / "model")
        pipeline.set_progress_bar_config(disable=True)
        with np.load(run / "samples/images.npz") as archive:
            np.testing.assert_array_equal(pipeline(num_images=8, seed=0, output_type="uint8").images, archive["images"])
    report = (tmp_path / "0/privacy.json").read_text()
    assert '"rounds": 3' in report and '"prototypes": 2' in report
    capsys.readouterr()
    refused = refusal(train_main, monkeypatch, capsys, *small(images, "--hints.prototypes=0"), "--run", tmp_path / "2")
    assert "hints.prototypes" in refused


def test_processes_share_every_round() -> None:
    """Images divided between two processes, whose sums are added up in each round, give both what one process gives."""
    images, labels, _, _ = parted_images()
    halves = [(images[:60], labels[:60]), (images[60:], labels[60:])]
    whole = mechanism(noise=0.5).release(halves, np.random.default_rng(0))
    sums: dict[int, dict[str, Tensor]] = {}
    turn = threading.Barrier(2)

    def process(rank: int) -> Tensor:
        def add(own: dict[str, Tensor]) -> dict[str, Tensor]:
            turn.wait()  # both are done with the sums of the round before
            sums[rank] = own
            turn.wait()
            return {name: sums[0][name] + sums[1][name] for name in own}

        return mechanism(noise=0.5).release([halves[rank]], np.random.default_rng(0), add).means

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(process, (0, 1)):
            torch.testing.assert_close(found, whole.means, rtol=1e-5, atol=1e-5)


def test_configs_take_the_number_of_prototypes() -> None:
    config = read_config([], ["--hints.prototypes", "8"])
    assert config.hints.rounds_made == config.hints.rounds
    assert dataclasses.replace(config.hints, prototypes=1).rounds_made == 1
