"""python -m dpsyngen.sweep: a grid of runs launched as a user would, killed, resumed, with a cell that fails; and what it refuses."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import ENVIRONMENT, TINY, call, evaluate_main, files, private_images, refusal, sample_main, small, train_main, weights

from dpsyngen.errors import InputError
from dpsyngen.field_types import plain
from dpsyngen.run_directory import RunDirectory
from dpsyngen.sweep import cells as running_cells
from dpsyngen.sweep.__main__ import main
from dpsyngen.sweep.cells import Job, environments, locked
from dpsyngen.sweep.grid import Axis, build_cells
from dpsyngen.sweep.plots import _draw_cells
from dpsyngen.sweep.table import names_of, notes_on, write_table

GRID = ["--grid", "privacy.epsilon=1,10", "--grid", "stages.tau1=-4,-3"]
NAMES = [f"privacy.epsilon={epsilon}.0,stages.tau1={tau}.0" for epsilon in (1, 10) for tau in (-4, -3)]


def arguments(path: Path) -> list[str]:
    images, tests = private_images(path / "images.npz"), private_images(path / "tests.npz", seed=1)
    quick = ["--stages.variant=dpdm", "--hints.kind=none", "--private.batch_size=200", f"--data.test_path={tests}"]
    return [str(argument) for argument in [*small(images, *quick), *GRID, "--to", "sweep"]]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dpsyngen.sweep", *arguments]


def table(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run_at_hand(path: Path, number: int, *scripts: Callable[[list[str]], None]) -> None:
    """A cell of the grid as the sweep would run it, but in this process, which takes a tenth of the time."""
    cells = build_cells([TINY], arguments(path)[2:-6], [Axis.parse(axis) for axis in GRID[1::2]])
    run_job(Job(cells[number].config, RunDirectory(path / "sweep" / cells[number].name)), *scripts)


def run_job(job: Job, *scripts: Callable[[list[str]], None]) -> None:
    job.prepare()
    for main_of_script in scripts:
        call(main_of_script, *(["--config", job.run.config] if main_of_script is train_main else []), "--run", job.run.path)


def test_a_killed_sweep_goes_on_past_a_failing_cell_and_tries_it_again(tmp_path, monkeypatch, capsys):
    """Of four cells the second is killed, fails, and is tried again; the last lacks its evaluation. From a directory that isn't the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given, sweep = arguments(tmp_path), Path("sweep")
    for number in (0, 2):
        run_at_hand(tmp_path, number, train_main, sample_main, evaluate_main)
    run_at_hand(tmp_path, 3, train_main, sample_main)
    with subprocess.Popen(command(*given), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (sweep / NAMES[1] / "privacy.json").exists():
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -9
    first = files(sweep / NAMES[0])
    assert [row["status"] for row in table(sweep)] == ["finished", "unfinished", "finished", "unfinished"]
    (sweep / NAMES[1] / "model").touch()  # where training wants a directory
    capsys.readouterr()

    with pytest.raises(SystemExit, match="1"):
        main(given)
    said = capsys.readouterr()
    complaint = f"{sweep / NAMES[1]}: failed: train.py: {sweep / NAMES[1]}/model: expected a place that can be written (Not a directory)\n"
    assert said.err == complaint
    assert "3 of 4 cells are finished" in said.out and "choosing a setting by private results costs privacy" in said.out
    rows = table(sweep)
    assert [row["status"] for row in rows] == ["finished", "failed", "finished", "finished"]
    assert [(row["privacy.epsilon"], row["stages.tau1"]) for row in rows] == [("1.0", "-4.0"), ("1.0", "-3.0"), ("10.0", "-4.0"), ("10.0", "-3.0")]
    assert rows[1]["failure"] in complaint and rows[1]["epsilon"] == rows[1]["cas_logistic_regression"] == ""

    (sweep / NAMES[1] / "model").unlink()
    main(given)
    assert "4 of 4 cells are finished" in capsys.readouterr().out
    assert files(sweep / NAMES[0]) == first
    for name, row in zip(NAMES, table(sweep), strict=True):
        assert (row["status"], row["failure"]) == ("finished", "")
        report = json.loads((sweep / name / "privacy.json").read_text())
        assert (float(row["epsilon"]), report["steps_begun"]) == (report["epsilon"], 3)  # a killed run replays what it had begun
        evaluation = json.loads((sweep / name / "evaluation.json").read_text())
        assert float(row["cas_logistic_regression"]) == evaluation["metrics"]["cas_logistic_regression"]["value"]
    written = (sweep / "table.md").read_text()
    assert "Choosing a setting by private results costs privacy" in written and "computed against private images" in written
    assert {path.name for path in (sweep / "plots").iterdir()} == {"cas_logistic_regression.png"}
    assert len({weights(sweep / name) for name in NAMES}) == 4


@pytest.mark.parametrize(
    ("grid", "complaint"),
    [
        ([], "--grid: expected at least one field"),
        (["privacy.epsilonn=1"], "--privacy.epsilonn: expected the name of a field"),
        (["privacy.epsilon=1,ten"], "--privacy.epsilon: expected a number, got 'ten'"),
        (["private.steps=1.5"], "--private.steps: expected an integer or null, got 1.5"),
        (["privacy.epsilon="], "--grid privacy.epsilon: expected values"),
        (["privacy.epsilon=1,,2"], "--grid privacy.epsilon: expected values"),
        (["privacy.epsilon"], "--grid privacy.epsilon: expected FIELD=VALUE"),
        (["privacy.epsilon=1", "privacy.epsilon=2"], "--grid privacy.epsilon: expected each field once, got it twice"),
        (["privacy.epsilon=1,1.0"], "expected each combination once, got a value twice"),
        (["seed=1,2"], "--grid seed: expected a field that no flag sets as well, got --seed too"),
        (["name=a,b"], "--grid name: expected a field that decides a result"),
        (["stages.tau1=-1,3"], "--stages.tau1: expected a finite number below stages.tau2 = 2.0, got 3.0"),
        (["private.epochs=1,2", "private.steps=1"], "expected either this or private.epochs to be set"),
        (["synthetic.options={exponent: 2},{exponent: 3}"], "--grid synthetic.options: expected a field, got a group of fields"),
        (["synthetic.options.a={b: 2},{b: 3}"], "--grid synthetic.options.a: expected a field, got a group of fields"),
    ],
)  # fmt: skip
def test_bad_grids_are_refused_before_anything_runs(grid, complaint, tmp_path, monkeypatch, capsys):
    flags = [f"--grid={axis}" for axis in grid]
    said = refusal(main, monkeypatch, capsys, "--config", TINY, "--seed=3", *flags, "--to", tmp_path / "sweep")
    assert complaint in said
    assert not (tmp_path / "sweep").exists()


def cells_file(path: Path, cells: str, more: str = "") -> Path:
    file = path / "cells.yaml"
    file.write_text(f"base: {TINY}\n{more}\ncells: {cells}\n")
    return file


def test_named_cells_of_a_file_are_run_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    images, sweep = private_images(tmp_path / "images.npz"), tmp_path / "sweep"
    data = f"{{source: npz, path: {images}, test_path: {images}, image_size: 8, num_classes: 3, expected_size: 200}}"
    file = cells_file(tmp_path, "{'coarse, tau2 = 1': {stages: {variant: coarse, tau2: 1}}, dpdm: {stages: {variant: dpdm}}}",
                      f"name: two\ndata: {data}\nhints: {{kind: none}}\nevaluation: {{classifier_seeds: 2}}")  # fmt: skip
    cells = build_cells([], ["--private.steps=2"], [], file)
    assert [(cell.config.stages.variant, cell.config.stages.tau2, cell.config.private.steps) for cell in cells] == [("coarse", 1, 2), ("dpdm", 2, 2)]
    assert cells[1].name == "dpdm" and cells[0].name.startswith("coarse,_tau2_=_1-")
    for cell in cells:
        run_job(Job(cell.config, RunDirectory(sweep / cell.name)), train_main, sample_main, evaluate_main)
    before = files(sweep / "dpdm")

    call(main, "--cells", file, "--private.steps=2", "--to", sweep)
    assert "2 of 2 cells are finished" in capsys.readouterr().out
    assert files(sweep / "dpdm") == before
    rows = table(sweep)
    assert next(iter(rows[0])) == "cell"
    assert [(row["cell"], row["run"]) for row in rows] == [("coarse, tau2 = 1", cells[0].name), ("dpdm", "dpdm")]
    assert all(float(row["cas_logistic_regression_std"]) >= 0 for row in rows)
    assert "# Sweep of two\n\n| cell | run | status |" in (sweep / "table.md").read_text()
    assert {path.name for path in (sweep / "plots").iterdir()} == {"cas_logistic_regression.png"}


def test_chart_of_cells_has_a_row_each_in_the_order_of_the_file_with_its_deviation():
    rows = [{"cell": name, "privacy.epsilon": epsilon, "cas_mlp": value, "cas_mlp_std": deviation}
            for name, epsilon, value, deviation in [("b", 1, 0.5, 0.1), ("b", 10, 0.6, 0.2), ("a", 1, 0.7, None), ("a", 10, None, None)]]  # fmt: skip
    figure = _draw_cells(rows, "cas_mlp", "CAS (%)", ["privacy.epsilon"])
    [axes] = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["b", "a"] and axes.yaxis_inverted()
    points = [(round(x), round(y)) for line in axes.lines if line.get_marker() == "o" for x, y in zip(*line.get_data(), strict=True)]
    assert points == [(50, 0), (70, 1), (60, 0)]
    ends = [sorted(round(float(x)) for x, _ in segment) for bars in axes.collections for segment in bars.get_segments()]
    assert ends == [[40, 60], [70, 70], [40, 80]]


@pytest.mark.parametrize(
    ("cells", "flags", "complaint"),
    [
        ("", [], "cells.yaml: cells: expected names of cells with the fields that each sets, got null"),
        ("{}", [], "cells.yaml: cells: expected names of cells"),
        ("[dpdm]", [], "cells.yaml: cells: expected names of cells"),
        ("{1: {}}", [], "cells.yaml: cells: expected a name for each cell (numbers in quotes), got 1"),
        ("{' ': {}}", [], "cells.yaml: cells: expected a name for each cell"),
        ("{a: {}, a: {}}", [], "cells.yaml: line 3: expected YAML, but: expected every key to be one name, given once, got 'a' twice"),
        ("{a: dpdm}", [], "cells.yaml: cells: a: expected a mapping of fields, got 'dpdm'"),
        ("{a: {}, b: {stages: {tau3: 1}}}", [], "cells.yaml: cells: b: stages.tau3: expected the name of a field"),
        ("{a: {}, b: {stages: {tau1: one}}}", [], "cells.yaml: cells: b: stages.tau1: expected a number, got 'one'"),
        ("{a: {stages: {tau2: -5}}}", [], "cells.yaml: cells: a: stages.tau1: expected a finite number below stages.tau2 = -5.0, got -3.0"),
        ("{a: {name: b}, b: {}}", [], "cells.yaml: cells: expected fields that decide a result, got name"),
        ("{a: {base: x.yaml}}", [], "cells.yaml: cells: a: base: expected the name of a field"),
        ("{a: {seed: 2}}", ["--seed=3"], "cells.yaml: cells: a: expected fields that neither a flag nor --grid sets as well, got --seed too"),
        ("{a: {private: {steps: 2}}}", ["--grid=private.epochs=1,2"], "cells: a: expected fields that neither a flag nor --grid sets as well"),
        ("{a: {synthetic: {options: {exponent: 2}}}}", ["--synthetic.options.exponent=3"], "cells: a: expected fields that neither a flag"),
        ("{a: {}}", ["--grid=private.steps=1,one"], "cells.yaml: cells: a: --private.steps: expected an integer or null, got 'one'"),
        ("{a: {}}", ["--select=fid"], "--cells: expected --grid beside --select"),
    ],
)  # fmt: skip
def test_bad_cells_are_refused_before_anything_runs(cells, flags, complaint, tmp_path, monkeypatch, capsys):
    assert complaint in refusal(main, monkeypatch, capsys, "--cells", cells_file(tmp_path, cells), *flags, "--to", tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_file_of_cells_is_no_configuration(tmp_path, monkeypatch, capsys):
    file = cells_file(tmp_path, "{a: {}}")
    said = refusal(train_main, monkeypatch, capsys, "--config", file)
    assert said == f"{file}: cells: expected a file of one configuration; python -m dpsyngen.sweep --cells {file} runs one with cells"
    assert "cells.yaml: expected a YAML file" in refusal(main, monkeypatch, capsys, "--cells", tmp_path / "none" / "cells.yaml")


def test_cells_lie_in_directories_of_their_own_whatever_they_are_called(tmp_path):
    names = ["..", ".", "plots", "table.csv", "-x", "a/b", "a b", "a  b", "é", "dpdm", "x" * 300, "x" * 299]
    cells = build_cells([], ["--synthetic.options.exponent=3"], [Axis.parse("seed=1,2")],
                        cells_file(tmp_path, json.dumps({name: {"synthetic": {"options": {"rule": name}}} for name in names})))  # fmt: skip
    assert [cell.config.synthetic.options for cell in cells] == [{"exponent": 3, "rule": name} for name in names for _ in range(2)]
    alone = build_cells([], [], [], cells_file(tmp_path, json.dumps({name: {} for name in names})))
    for some in (cells, alone):
        taken = {cell.name for cell in some} | {"lock", "plots", "table.csv", "table.md"}
        assert len(taken) == len(some) + 4
        assert not any(name.startswith((".", "-")) or "/" in name or len(name) > 140 for name in taken)
    assert alone[9].name == "dpdm" and cells[18].name == "dpdm,seed=1"


def test_a_metric_that_its_column_misnames_is_named_in_full(tmp_path):
    [cell] = build_cells([], [], [], cells_file(tmp_path, "{a: {}}"))
    job = Job(cell.config, RunDirectory(tmp_path))
    metrics = {"fid": {"name": "FID-classifier", "value": 1.0}, "cas_mlp": {"value": 0.5}}
    for name, found in [("FID-classifier", {"fid": "FID-classifier"}), ("FID", {})]:
        metrics["fid"]["name"] = name
        (tmp_path / "evaluation.json").write_text(json.dumps({"metrics": metrics, "private": "not private"}))
        assert names_of([job]) == found
        assert ("the column fid is FID-classifier" in notes_on([job])) is bool(found)


def test_other_refusals(tmp_path, monkeypatch, capsys):
    given = ["--config", TINY, "--grid=seed=1,2", "--to", tmp_path]
    for value in ("0", "-1", "two"):
        assert refusal(main, monkeypatch, capsys, *given, f"--parallel={value}") == f"--parallel: expected an integer > 0, got {value!r}"
    folder = ["--data.source=folder", f"--data.path={tmp_path}"]
    assert "data.test_path: expected real images to evaluate against" in refusal(main, monkeypatch, capsys, *given, *folder)
    with locked(tmp_path), pytest.raises(InputError, match="another sweep is at work"):  # noqa: SIM117 - the order matters
        with locked(tmp_path):
            pass
    [cell, _] = build_cells([TINY], [], [Axis.parse("seed=1,2")])
    Job(cell.config, RunDirectory(tmp_path / cell.name)).prepare()
    assert "holds a run with another config (data.held_out 0, not 5)" in refusal(main, monkeypatch, capsys, *given, "--data.held_out=5")


def test_cells_are_named_by_their_values_alone():
    small_grid = build_cells([TINY], [], [Axis.parse("sampling.guidance=1,2")])
    larger = build_cells([TINY], [], [Axis.parse("sampling.guidance=1,2,3")])
    assert [cell.name for cell in larger[:2]] == [cell.name for cell in small_grid] == ["sampling.guidance=1.0", "sampling.guidance=2.0"]
    odd = build_cells([TINY], [], [Axis.parse("evaluation.classifiers=[mlp, cnn],[mlp]"), Axis.parse("synthetic.options.exponent=2,3")])
    assert [cell.config.evaluation.classifiers for cell in odd] == [("mlp", "cnn")] * 2 + [("mlp",)] * 2
    assert [cell.config.synthetic.options["exponent"] for cell in odd] == [2, 3, 2, 3]
    nested = build_cells([TINY], ["--synthetic.family=mixture"], [Axis.parse("synthetic.options.dead_leaves.weight=1,2")])
    assert [cell.values for cell in nested] == [{"synthetic.options.dead_leaves.weight": weight} for weight in (1, 2)]
    assert len({cell.name for cell in odd}) == 4 and all("/" not in cell.name and " " not in cell.name for cell in odd)
    long = build_cells([TINY], [], [Axis.parse(f"data.description={'x/' * 300}a,{'x/' * 300}b")])
    assert len({cell.name for cell in long}) == 2 and max(len(cell.name) for cell in long) < 140


def test_stages_of_ones_own_are_values_of_a_grid():
    """Written as on the command line, without what is left at its default; a directory's name is their hash."""
    first, second = "[{name: a, source: synthetic, upper: 0.0}, {name: b, source: private}]", "[{name: b, source: private, weight: 2.0}]"
    cells = build_cells([], ["--stages.variant=custom"], [Axis.parse(f"stages.custom={first},{second}")])
    assert [plain(cell.values["stages.custom"]) for cell in cells] == [first, second]
    assert [len(cell.config.stages.custom) for cell in cells] == [2, 1]
    assert len({cell.name for cell in cells}) == 2 and all(re.fullmatch(r"[\w.,=+-]+", cell.name) for cell in cells)


def test_children_get_a_device_each_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(running_cells, "_cuda_devices", lambda: ["2", "5"])
    assert [place["CUDA_VISIBLE_DEVICES"] for place in environments(None, "auto")] == ["2", "5"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in environments(3, "cuda")] == ["2", "5", "2"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert len(environments(None, "cpu")) == len(environments(None, "cuda:1")) == 1
    assert [place["OMP_NUM_THREADS"] for place in environments(2, "cpu")] == [str(max(1, (os.cpu_count() or 1) // 2))] * 2


def test_table_escapes_what_markdown_and_csv_would_misread(tmp_path):
    row = {"data.description": 'a|b, "c"', "private.steps": None, "run": "x", "status": "failed", "epsilon": 0.123456789, "failure": "no | such"}
    write_table(tmp_path, [row], "Sweep", ["a note"])
    assert table(tmp_path)[0] == {"data.description": 'a|b, "c"', "private.steps": "", "run": "x", "status": "failed", "epsilon": "0.123456789",
                                  "failure": "no | such"}  # fmt: skip
    assert '| a\\|b, "c" | null | x | failed | 0.1235 | no \\| such |' in (tmp_path / "table.md").read_text()
