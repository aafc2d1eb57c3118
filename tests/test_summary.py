"""The closing lines of a demo."""

import json

import pytest

from dpsyngen.config import RunConfig, StagesConfig
from dpsyngen.errors import InputError
from dpsyngen.privacy.journal import Spending
from dpsyngen.privacy.report import privacy_report
from dpsyngen.summary import summary


def test_a_whole_run(tmp_path):
    report = {"status": "finished", "epsilon": 9.98761, "delta": 1e-5, "unit": "one image", "adjacency": "neighbours differ by one"}
    (tmp_path / "privacy.json").write_text(json.dumps(report))
    metrics = {"cas_cnn": {"value": 0.8234}, "cas_logistic_regression": {"value": 0.5}, "fid": {"value": 12.3456}, "recall": {"value": 0.25}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"metrics": metrics}))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "grid.png").touch()
    text = summary(tmp_path)
    for part in ("epsilon = 9.9877 at delta = 1e-05", "82.3 % by cnn, 50.0 % by logistic regression", "fid 12.35, recall 0.25", "grid.png"):
        assert part in text
    assert "finished" not in text


def test_what_is_missing_is_named_with_the_script_that_makes_it(tmp_path):
    with pytest.raises(InputError, match=r"privacy\.json: .*run train\.py first"):
        summary(tmp_path)
    config = RunConfig(stages=StagesConfig(variant="nonprivate"))
    (tmp_path / "privacy.json").write_text(json.dumps(privacy_report(None, Spending(0, 0), config, status="unfinished", guaranteed=False)))
    text = summary(tmp_path)
    for part in ("NOTHING IS GUARANTEED", "without any protection", "(unfinished)", "evaluate.py", "sample.py"):
        assert part in text
    (tmp_path / "evaluation.json").write_text("[")
    with pytest.raises(InputError, match=r"evaluation\.json: expected a JSON file"):
        summary(tmp_path)
