"""python -m dpsyngen.swap: two tiny runs with a network for each stage, swapped, resumed; and what it refuses."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import TINY, call, files, private_images, refusal, sample_main, small, train_main

from dpsyngen.cli import dump_config, load_run_config, read_config
from dpsyngen.denoiser import RoutedDenoiser, build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.run_directory import RunDirectory
from dpsyngen.samples import read_samples
from dpsyngen.saved_model import load_trained
from dpsyngen.swap.__main__ import main
from dpsyngen.swap.compose import Swap, choices, compose

NAMES = ["cleaning", "context", "coarse"]
SWAPS = ["none", *NAMES, "cleaning+context", "cleaning+coarse", "context+coarse", "cleaning+context+coarse"]


def stages(source: str, names: list[str] = NAMES, low: float = -1, high: float = 1) -> str:
    """As a flag; not in the order of their noise."""
    ranges = [f"upper: {low}", f"lower: {low}, upper: {high}", f"lower: {high}"]
    parts = [f"{{name: {name}, source: {source}, {bounds}}}" for name, bounds in zip(names, ranges, strict=True)]
    return f"--stages.custom=[{', '.join(parts[::-1])}]"


def flags(*more: str) -> list[str]:
    return ["--stages.variant=custom", "--stages.holder=routed", "--hints.kind=none", *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose three networks learnt from private images without protection, and one that never saw any."""
    path = tmp_path_factory.mktemp("runs")
    images = private_images(path / "images.npz")
    for name, source, seed in [("real", "nonprivate", 0), ("synthetic", "synthetic", 1)]:
        names = NAMES if name == "real" else ["fine", "middle", "rough"]
        given = small(images, *flags(stages(source, names), f"--seed={seed}", f"--name={name}", f"--data.test_path={images}"))
        call(train_main, *given, "--run", path / name)
    return path / "real", path / "synthetic"


def denoisers(runs: tuple[Path, Path]) -> list[RoutedDenoiser]:
    return [load_trained(run, load_run_config(run), torch.device("cpu")) for run in runs]


def test_each_stage_is_denoised_by_the_run_that_the_swap_names(runs):
    first, second = denoisers(runs)
    x, labels = torch.randn(60, 1, 8, 8), torch.arange(60) % 3
    sigma = torch.exp(torch.linspace(-5, 4, 60))
    ranges = {"cleaning": sigma.log() < -1, "context": (sigma.log() >= -1) & (sigma.log() < 1), "coarse": sigma.log() >= 1}
    own, theirs = first(x, sigma, labels), second(x, sigma, labels)
    for count in range(4):
        for chosen in itertools.combinations(NAMES, count):
            rows = sum((ranges[name] for name in chosen), torch.zeros(60, dtype=torch.bool))
            expected = torch.where(rows[:, None, None, None], theirs, own)
            assert torch.equal(compose(first, second, Swap(chosen))(x, sigma, labels), expected)


def test_every_choice_is_drawn_from_the_same_noise_and_evaluated(runs, tmp_path, capsys):
    """none is what sample.py draws from the first run, and all stages what it draws from the second with the first one's seed."""
    real, synthetic = runs
    to, given = tmp_path / "swap", ["--run", real, "--with", synthetic, "--to", tmp_path / "swap"]
    call(main, *given, "--swaps", "context,none")
    assert list(json.loads((to / "swap.json").read_text())["swaps"]) == ["none", "context"]
    before = files(to / "context")
    (to / "none" / "evaluation.json").unlink()  # as when it was killed there
    call(main, *given)
    assert "swaps finished: 8" in capsys.readouterr().out
    assert files(to / "context") == before
    for name, run in [("none", real), (SWAPS[-1], synthetic)]:
        call(sample_main, "--run", run, "--seed=0", "--out", tmp_path / "alone")
        for drawn, expected in zip(read_samples(to / name / "samples"), read_samples(tmp_path / "alone"), strict=True):
            assert np.array_equal(drawn, expected)
    record = json.loads((to / "swap.json").read_text())
    assert list(record["swaps"]) == SWAPS
    for name, swap in record["swaps"].items():
        evaluation = json.loads((to / name / "evaluation.json").read_text())
        metric = evaluation["metrics"]["cas_logistic_regression"]
        assert "+".join(swap["stages"]) == ("" if name == "none" else name)
        assert swap["metrics"]["cas_logistic_regression"]["value"] == metric["value"]
        assert "not covered by the privacy guarantee" in swap["metrics"]["cas_logistic_regression"]["private"]
        assert json.loads((to / name / "samples" / "provenance.json").read_text())["swapped"] == swap["stages"]
    assert len({read_samples(to / name / "samples")[0].tobytes() for name in SWAPS}) == 8
    assert [stage["name"] for stage in record["stages"]] == NAMES
    assert record["runs"]["run"]["epsilon"] is None and record["runs"]["with"]["epsilon"] == 0
    assert record["privacy"]["epsilon"] is None
    table = (to / "table.md").read_text()
    assert "| cleaning | context | coarse | CAS, logistic regression |" in table
    assert table.count("\n| ") == 10 and table.count("| real | synthetic | real | ") == 1
    assert "real: none: this run trains on the private images without any protection; synthetic: epsilon = 0" in table
    with Image.open(to / "swap.png") as picture:
        assert picture.width > 600 and picture.height > 500


def test_the_costs_of_both_runs_are_added_up(runs, tmp_path):
    for run, name, epsilon in [(runs[0], "a", 1.5), (runs[1], "b", 2.0)]:
        copied = tmp_path / name
        copied.mkdir()
        for part in ("config.yaml", "model"):
            (copied / part).symlink_to(run / part)
        report = {"status": "finished", "epsilon": epsilon, "delta": 1e-5}
        RunDirectory(copied).privacy.write_text(json.dumps(report))
    call(main, "--run", tmp_path / "a", "--with", tmp_path / "b", "--to", tmp_path / "swap", "--swaps", "none")
    record = json.loads((tmp_path / "swap" / "swap.json").read_text())
    assert [run["epsilon"] for run in record["runs"].values()] == [1.5, 2.0]
    assert (record["privacy"]["epsilon"], record["privacy"]["delta"]) == (3.5, 2e-5)


def test_choices():
    config = read_config([TINY], flags(stages("synthetic")))
    assert [swap.name for swap in choices(config, None)] == SWAPS
    assert [swap.name for swap in choices(config, "coarse + cleaning, none,none")] == ["none", "cleaning+coarse"]


def test_refusals(runs, tmp_path, monkeypatch, capsys):
    real, synthetic = runs

    def said(*arguments: object) -> str:
        return refusal(main, monkeypatch, capsys, *arguments, "--to", tmp_path / "swap")

    pair = ["--run", real, "--with", synthetic]
    expected = "--swaps: expected none or stages with + between them (cleaning, context, coarse), separated by commas, got "
    assert said(*pair, "--swaps=fine") == f"{expected}'fine'"
    assert said(*pair, "--swaps=") == f"{expected}''"
    assert said(*pair, "--private.steps=3").startswith("--private.steps: expected a field of sampling, evaluation or compute, or the seed")
    assert "is not a run directory" in said("--run", real, "--with", tmp_path)
    others = {
        "other": (flags(stages("nonprivate", low=-2)), "stages: expected boundaries at ln sigma = -1, 1 as in {run}, got -2, 1"),
        "shared": (["--stages.holder=shared"], "stages.holder: expected routed, a network for each stage, got shared"),
        "large": (flags(stages("nonprivate"), "--data.image_size=12"), "data.image_size: expected 8 as in {run}, got 12"),
        "unfinished": (flags(stages("nonprivate"), "--data.image_size=8", "--data.num_classes=3"), "training is not finished"),
    }
    for name, (given, complaint) in others.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump(["--data.num_classes=3", "--data.image_size=8", *given]))
        assert said("--run", real, "--with", tmp_path / name).startswith(f"{tmp_path / name}: {complaint.format(run=real)}")
    assert not (tmp_path / "swap").exists()
    call(main, *pair, "--to", tmp_path / "swap", "--swaps=none")
    capsys.readouterr()
    complaint = f"{tmp_path}/swap/swap.json: expected swaps of the same runs with the same settings, got others "
    assert said(*pair, "--sampling.steps=4").startswith(f"{complaint}(settings)")
    assert said("--run", synthetic, "--with", real).startswith(f"{complaint}(stages)")


def dump(overrides: list[str]) -> str:
    return dump_config(read_config([TINY], overrides))


def test_a_stage_called_none_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text(dump(flags(stages("synthetic", ["none", "b", "c"]))))
    said = refusal(main, monkeypatch, capsys, "--run", tmp_path, "--with", tmp_path)
    assert "expected stages of other names, since none stands for no stage" in said


def test_many_stages_need_a_choice():
    bounds = [None, *range(6), None]
    parts = ", ".join(f"{{name: s{i}, source: synthetic, lower: {'null' if low is None else low}, upper: {'null' if high is None else high}}}"
                      for i, (low, high) in enumerate(itertools.pairwise(bounds)))  # fmt: skip
    config = read_config([TINY], flags(f"--stages.custom=[{parts}]"))
    assert isinstance(build_denoiser(config), RoutedDenoiser)
    with pytest.raises(InputError, match="--swaps: expected a choice, since 7 stages can be swapped in 128 ways"):
        choices(config, None)
    assert [swap.name for swap in choices(config, "s6+s0,none")] == ["none", "s0+s6"]
