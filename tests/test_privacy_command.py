"""python -m dpsyngen.privacy: launched as a user would, and called as a function."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running import ENVIRONMENT, ROOT, call, refusal

from dpsyngen.privacy.__main__ import main

CONFIG = ("--config", ROOT / "configs" / "mnist" / "dp_syngen.yaml", "--private.batch_size=256", "--private.steps=200")


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dpsyngen.privacy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)


def priced(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    call(main, *arguments, "--json")
    return json.loads(capsys.readouterr().out)


def test_table_answers_what_noise_a_config_needs() -> None:
    result = launch(*CONFIG, "--privacy.epsilon", "1", "--accountant", "rdp")
    assert (result.returncode, result.stderr) == (0, "")
    words = " ".join(result.stdout.split())
    for shown in (
        "one image",
        "adding or removing",
        "60,000",
        "0.00426667",
        "200",
        "calibrated",
        "DP class means",
        "DP-SGD",
        "target 1",
        "Renyi",
        "mu =",
    ):
        assert shown in words, shown


def test_json_is_all_there_is_on_stdout_and_the_plot_is_a_picture(tmp_path: Path) -> None:
    result = launch(*CONFIG, "--json", "--plot", tmp_path / "epsilon.png")
    assert (result.returncode, result.stderr) == (0, "")
    assert 9.95 <= json.loads(result.stdout)["epsilon"] <= 10
    with Image.open(tmp_path / "epsilon.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    assert [file.name for file in tmp_path.iterdir()] == ["epsilon.png"]


def test_bad_flag_ends_in_one_line_and_status_2() -> None:
    result = launch(*CONFIG, "--privacy.epsilom", "1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("python -m dpsyngen.privacy: --privacy.epsilom: expected the name of a field")
    assert result.stderr.count("\n") == 1


def test_calibrated_noise_costs_what_it_was_calibrated_for(capsys: pytest.CaptureFixture[str]) -> None:
    calibrated = priced(capsys, *CONFIG, "--privacy.epsilon=1", "--accountant", "rdp")
    assert 0.995 <= calibrated["epsilon"] <= 1 < calibrated["renyi_epsilon"]
    assert all(mechanism["epsilon_alone"] < calibrated["epsilon"] for mechanism in calibrated["mechanisms"])
    *rounds, sgd = calibrated["mechanisms"]
    assert [means["name"] for means in rounds] == ["DP class means"] * 4  # of prototypes
    assert (sgd["name"], sgd["steps"], sgd["sampling_rate"]) == ("DP-SGD", 200, 256 / 60000)
    given = priced(capsys, *CONFIG, "--privacy.epsilon=1", "--noise_multiplier", sgd["noise_multiplier"])
    assert given == {name: value for name, value in calibrated.items() if name != "renyi_epsilon"}


def test_more_noise_costs_less(capsys: pytest.CaptureFixture[str]) -> None:
    prices = [priced(capsys, *CONFIG, "--hints.kind=none", "--noise-multiplier", noise)["epsilon"] for noise in (0.5, 1, 2)]
    assert prices == sorted(prices, reverse=True)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    page = capsys.readouterr().out
    assert page.startswith("usage: python -m dpsyngen.privacy")
    for option in ("--config", "--noise_multiplier", "--accountant", "--plot", "--json", "--privacy.epsilon"):
        assert option in page


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--privacy.epsilon", "1000"], "--privacy.epsilon: expected a number in [0.001, 100], got 1000.0"),
        (["--data.expected_size", "null"], "data.expected_size: expected a number, since null counts the private images"),
        (["--stages.variant", "nonprivate"], "stages.variant: expected a variant under differential privacy, got nonprivate"),
        (["--noise-multiplier", "0"], "--noise-multiplier: expected a number > 0, at most 1e+07, got 0"),
        (["--noise-multiplier", "nan"], "--noise-multiplier: expected a number > 0, at most 1e+07, got nan"),
        (["--noise-multiplier", "0.01"], "--noise-multiplier: expected enough noise for an epsilon below about 1000, got 0.01"),
        (["--accountant", "magic"], "argument --accountant: invalid choice: 'magic' (choose from"),
        (["--plot", "curve.gif"], "curve.gif: expected a name that ends in .png, .svg, .pdf"),
        (["--plot", "/nowhere/curve.png"], "curve.png: expected a place that can be written"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint in refusal(main, monkeypatch, capsys, *CONFIG, *arguments)
