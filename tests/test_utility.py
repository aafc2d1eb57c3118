"""python -m benchmarks.utility: its rows, what they are said to cost, one run of a tiny row, its table; and what it refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from running import ROOT, TINY, call, evaluate_main, files, lines, private_images, refusal, sample_main, small, train_main
from torch import nn

from benchmarks.utility.__main__ import PAGE, RESULTS, ROWS, main
from benchmarks.utility.flops import cost_of
from benchmarks.utility.page import BEGINS, ENDS, table
from benchmarks.utility.results import read_results
from benchmarks.utility.rows import read_rows
from benchmarks.utility.teacher import main as teacher_main
from dpsyngen.cli import read_config
from dpsyngen.denoiser import build_denoiser
from dpsyngen.noise_levels import karras_grid
from dpsyngen.run_directory import RunDirectory
from dpsyngen.sweep.cells import Job


def test_rows_of_the_ladder_take_minutes_and_choose_nothing_by_test_images():
    rows = read_rows(ROWS)
    ladder = [row for row in rows.values() if "-eps" not in row.name]
    assert len(ladder) <= 12
    for row in ladder:
        config, cost = row.config, cost_of(row.config)
        assert (config.data.source, config.data.held_out, config.data.expected_size, config.evaluation.reference) == (
            "mnist", 5000, 55_000, "held_out")  # fmt: skip
        assert (config.privacy.epsilon, config.name) == (10, "ladder")
        assert 2e12 < cost.training < 3e13
    assert len({row.hash for row in rows.values()}) == len(rows)
    for name in set(rows) - {row.name for row in ladder}:
        config = rows[name].config
        dataset, _, epsilon = name.partition("-eps")
        assert (config.data.source.partition("_")[0], config.privacy.epsilon) == (dataset, float(epsilon))
        assert (config.evaluation.reference, config.data.held_out, config.data.expected_size) == ("test", 0, 60_000)
        assert (len(config.evaluation.classifiers), config.evaluation.classifier_seeds) == (3, 3)


def test_the_committed_results_are_those_on_the_page():
    rows, results = read_rows(ROWS), read_results(RESULTS)
    assert f"{BEGINS}\n\n{table(rows, results)}\n{ENDS}" in PAGE.read_text()


def test_flops_of_the_lean_network_are_those_of_its_layers():
    config = read_config([ROOT / "configs/mnist/dp_syngen.yaml"])
    denoiser, counted = build_denoiser(config), 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * output.numel() * layer.weight[0].numel()

    for layer in denoiser.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        denoiser(torch.zeros(1, 1, 28, 28), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    tokens, channels = 49, 2 * config.network.width
    assert cost_of(config).forward == counted + 2 * 2 * tokens**2 * channels  # q k and (q k) v


SIZES = "--private.batch_size=256", "--sampling.num_images=10000"


def test_rows_are_counted_as_the_phases_compute_them():
    dpdm = cost_of(read_config([ROOT / "configs/mnist/dpdm.yaml"]))
    assert (dpdm.synthetic, dpdm.replayed, dpdm.drawn) == (0, 0, 60_000 * 50)
    assert dpdm.private == pytest.approx(300 * 60_000 * 32, rel=1e-3)
    assert dpdm.training == 3 * dpdm.forward * dpdm.private
    flags = ["--sampling.sampler=heun", "--sampling.steps=18", "--sampling.guidance=2", "--synthetic.steps=7", "--private.steps=5", *SIZES]
    recipe = ROOT / "configs/mnist/dp_syngen.yaml"
    staged = cost_of(read_config([recipe], flags))
    assert (staged.synthetic, staged.replayed, staged.private, staged.drawn) == (7 * 128, 5 * 128, 5 * 256 * 2, 10_000 * 35 * 2)
    closed = ["--stages.closed_form=true", "--hints.covariance_rank=8", "--stages.tau2=1.7", "--sampling.steps=20", "--sampling.sigma_max=40"]
    levels = karras_grid(20, 0.002, 40, 7)[:-1]
    assert cost_of(read_config([recipe], [*closed, *SIZES])).drawn == 10_000 * int((levels <= math.exp(1.7)).sum()) < 10_000 * 20


def test_rows_and_evaluations_at_half_resolution_count_as_such():
    flags = ["--data.image_size=32", "--synthetic.steps=6", "--private.steps=5", *SIZES, "--sampling.steps=20", "--sampling.sigma_max=40"]
    config = read_config([ROOT / "configs/mnist/dp_syngen.yaml", ROOT / "configs/examples/half_resolution.yaml"], flags)
    custom = tuple(replace(stage, downsampling=2) for stage in config.stages.custom)
    cost, half = cost_of(config), cost_of(replace(config, stages=replace(config.stages, custom=custom))).forward
    assert 0.2 * cost.forward < half < 0.3 * cost.forward
    cleaning = 6 * 128 // 4  # the draws of a stage of weight 1 in 4
    assert cost.training == 3 * (cleaning * cost.forward + (3 * cleaning + 5 * 256 * 2) * half)
    fine = int((karras_grid(20, 0.002, 40, 7)[:-1].log() < -0.5).sum())
    assert cost.sampling == 10_000 * (fine * cost.forward + (20 - fine) * half) and 0 < fine < 20


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Arguments that take rows, results, page and runs from tmp_path."""
    images = private_images(tmp_path / "images.npz")
    common = {
        "data.source": "npz", "data.path": str(images), "data.test_path": str(images), "data.image_size": 8, "data.num_classes": 3,
        "data.expected_size": 200, "data.public": True, "evaluation.classifier_seeds": 2, "stages.variant": "dpdm",
    }  # fmt: skip
    rows = {"plain": {"shows": "nothing", "configs": [str(TINY)], "set": common | {"hints.kind": "none"}},
            "hinted": {"shows": "little", "on": "plain", "set": {"hints.kind": "class_means"}}}  # fmt: skip
    (tmp_path / "rows.yaml").write_text(json.dumps({"rows": rows}))
    (tmp_path / "page.md").write_text(f"before\n{BEGINS}\nold\n{ENDS}\nafter\n")
    names = {"rows": "rows.yaml", "results": "results.jsonl", "page": "page.md", "to": "runs"}
    return [f"--{name}={tmp_path / file}" for name, file in names.items()]


def test_a_row_is_resumed_added_to_the_table_skipped_and_repeated(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    row = read_rows(tmp_path / "rows.yaml")["hinted"]
    runs = [tmp_path / "runs" / "hinted" / f"{row.hash}-{number}" for number in (1, 2)]
    for run, scripts in zip(runs, ((train_main, sample_main), (train_main, sample_main, evaluate_main)), strict=True):
        job = Job(row.config, RunDirectory(run))
        job.prepare()
        for script in scripts:
            call(script, *(["--config", job.run.config] if script is train_main else []), "--run", run)
    capsys.readouterr()

    main([*tiny, "--row", "hinted"])
    assert f"hinted: evaluate in {runs[0]}" in capsys.readouterr().out
    (result,) = lines(tmp_path / "results.jsonl")
    metric = json.loads((runs[0] / "evaluation.json").read_text())["metrics"]["cas_logistic_regression"]
    assert result["metrics"]["cas_logistic_regression"] == {key: metric[key] for key in ("value", "std", "accuracies")}
    assert result["epsilon"] == json.loads((runs[0] / "privacy.json").read_text())["epsilon"]
    assert result["noisy_images"] == {"synthetic": 0, "replayed": 0, "private": 3 * 16 * 2}
    assert list(result["minutes"]) == ["evaluate"] and result["minutes"]["evaluate"] > 0
    assert result["settings"] == row.settings and "hints.kind" not in row.settings and row.settings["stages.variant"] == "dpdm"
    assert result["reference"] == {"name": "test", "images": 200} and result["machine"]["threads"] == 1
    page = (tmp_path / "page.md").read_text()
    assert page.startswith(f"before\n{BEGINS}\n") and page.endswith(f"{ENDS}\nafter\n") and "old" not in page
    assert page.count("| `hinted` | npz | ") == 1 and "| 0 + 96 |" in page and f"{100 * metric['value']:.1f} ± " in page

    before = files(runs[0])
    main([*tiny, "--row", "hinted"])
    assert "hinted: has run with these settings" in capsys.readouterr().out
    main([*tiny, "--row", "hinted", "--again"])
    assert f"hinted: finished before in {runs[1]}" in capsys.readouterr().out
    assert [line["run"] for line in lines(tmp_path / "results.jsonl")] == [f"hinted/{row.hash}-1", f"hinted/{row.hash}-2"]
    assert (tmp_path / "page.md").read_text().count("| `hinted` | npz | ") == 2
    assert files(runs[0]) == before


def test_only_the_newest_settings_of_a_row_are_in_the_table(tiny, tmp_path):
    rows = read_rows(tmp_path / "rows.yaml")
    common = {
        "dataset": "mnist", "epsilon": 0.99951, "noisy_images": {"synthetic": 1000, "replayed": 24, "private": 2048}, "minutes": {"train": 1.26},
        "flops": {"training": 3e15, "sampling": 2e13}, "machine": {"device": "a|b", "threads": 2}, "reference": {"name": "held_out", "images": 5000},
        "metrics": {"cas_cnn": {"value": 0.9412, "std": 0.004}, "cas_mlp": {"value": 0.5}, "fid": {"value": 41.96, "name": "X"}},
    }  # fmt: skip
    results = [{"row": "gone", "hash": "1"}, {"row": "plain", "hash": "0"}, {"row": "plain", "hash": rows["plain"].hash}]
    shown = table(rows, [result | common for result in results]).splitlines()
    entries = "MNIST | 0.9996 | 1,024 + 2,048 | 3 | 0.02 | 1.3, ?, ? |  | 50.0 | 94.1 ± 0.4 | 42 | 5,000 held-out | a\\|b, 2 threads |"
    assert shown[2:4] == [f"| `plain` | {entries}", f"| `gone` | {entries}"]
    assert shown[5:] == ["- `plain`: nothing", "- The distance is X."]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([], "--row: expected either --row NAME, --all, --list or --table"),
        (["--all", "--list"], "--row: expected either"),
        (["--row", "none"], "--row none: expected one of plain, hinted"),
        (["--all", "--privacy.epsilon=x"], "rows.yaml: rows: plain: --privacy.epsilon: expected a number, got 'x'"),
        (["--all", "--data.public=false"], "rows.yaml: rows: plain: data.public: expected true"),
        (["--all", "--synthetic.cache=cache"], "rows.yaml: rows: plain: synthetic.cache: expected null"),
        (["--all", "--page=none.md"], "none.md: expected a page with"),
        (["--all", "--privacy.epsilon=1", f"--page={PAGE}"], "--privacy.epsilon: expected --results and --page beside it"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(given, complaint, tiny, tmp_path, monkeypatch, capsys):
    assert complaint in refusal(main, monkeypatch, capsys, *tiny, *given)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ("rows: []", "expected rows, a mapping"),
        ("rows: {a: {shows: x}}\nmore: 1", "expected rows, a mapping"),
        ("rows: {A/b: {shows: x}}", "rows: A/b: expected a name"),
        ("rows: {a: {set: {}}}", "rows: a: expected shows"),
        ("rows: {a: {shows: x, configs: tiny.yaml}}", "rows: a: configs: expected a list of files, got 'tiny.yaml'"),
        ("rows: {a: {shows: x, configs: [none.yaml]}}", "none.yaml: expected a YAML file"),
        ("rows: {a: {shows: x, on: b}, b: {shows: y}}", "rows: a: on: expected the name of a row above, got 'b'"),
        ("rows: {a: {shows: x, set: {privacy: {epsilon: 1}}}}", "rows: a: set: expected dotted fields"),
        ("rows: {a: {shows: x, set: {privacy.epsilonn: 1}}}", "rows: a: --privacy.epsilonn: expected the name of a field"),
    ],
)
def test_bad_rows_are_refused_by_name(rows, complaint, tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.yaml").write_text(rows)
    assert complaint in refusal(main, monkeypatch, capsys, *tiny, "--list")


def test_a_teacher_by_itself_is_right_where_labels_can_be_told(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 2400)
    stripes = np.arange(8)[None, :, None] // np.array([1, 2, 4])[labels, None, None] % 2 * 200 + rng.integers(0, 40, (2400, 8, 8))
    flags = ("--teacher.share=0.5", "--teacher.components=20", "--teacher.images=100", "--data.public=true", "--data.held_out=400",
             "--data.expected_size=2000")  # fmt: skip
    right = []
    for name, shown in (("told", labels), ("untold", rng.permutation(labels))):
        images = private_images(tmp_path / f"{name}.npz", images=stripes[..., None].astype(np.uint8), labels=shown)
        call(teacher_main, *small(images, *flags))
        printed = capsys.readouterr().out
        assert printed.startswith("right about ")
        right.append(float(printed.split()[2]))
    assert right[0] > 95 and abs(right[1] - 100 / 3) < 10
    for wrong in ("--teacher.share=0", "--data.public=false", "--data.held_out=0"):
        assert refusal(teacher_main, monkeypatch, capsys, *small(images, *flags, wrong)).startswith(wrong[2:].split("=")[0])
