"""python -m dpsyngen.sweep --select: what is drawn, what is paid, what leaves, and that nothing else does."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from running import TINY, call, evaluate_main, files, lines, private_images, refusal, sample_main, small, train_main
from scipy.stats import chisquare

from dpsyngen.config import RunConfig
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.repeats import Repeats, repeated_epsilon
from dpsyngen.release import main as release_main
from dpsyngen.run_directory import RunDirectory
from dpsyngen.summary import summary
from dpsyngen.sweep import select as selecting
from dpsyngen.sweep.__main__ import main
from dpsyngen.sweep.grid import Axis, build_cells
from dpsyngen.sweep.score import Score
from dpsyngen.sweep.terms import Terms

METRIC = "cas_logistic_regression"
RUNS = 3


def arguments(path: Path) -> list[object]:
    images, tests = path / "images.npz", path / "tests.npz"
    if not images.exists():
        private_images(images), private_images(tests, seed=1)
    quick = ["--stages.variant=dpdm", "--hints.kind=none", "--private.batch_size=200", f"--data.test_path={tests}"]
    select = ["--select", METRIC, "--runs=4", "--score-images-are-public", "--grid=stages.tau1=-4,-3"]
    return [*small(images, *quick), *select]


def at_hand(jobs, places, after, *, silent):
    """Every run, in this process instead of three for each, which takes a tenth of the time; then the sweep is killed."""
    assert silent
    for job in jobs:
        job.prepare()
        call(train_main, "--config", job.run.config, "--run", job.run.path)
        call(sample_main, "--run", job.run.path)
        call(evaluate_main, "--run", job.run.path)
        after()
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """A directory with the images, and a selection in it of which all runs have ended and none is chosen."""
    path = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Repeats, "draw", lambda self: RUNS)
        patch.setattr(selecting, "run_jobs", at_hand)
        with pytest.raises(KeyboardInterrupt):
            call(main, *arguments(path), "--to", path / "selection")
    return path


@pytest.fixture
def selection(ended, tmp_path) -> Path:
    return shutil.copytree(ended / "selection", tmp_path / "selection")


def runs_of(selection: Path) -> list[Path]:
    drawn = json.loads((selection / "private" / "draws.json").read_text())["runs"]
    return [selection / "private" / "runs" / draw["token"] for draw in drawn]


def score_of(run: Path) -> float:
    return json.loads((run / "evaluation.json").read_text())["metrics"][METRIC]["value"]


def set_score(run: Path, value: float) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["metrics"][METRIC]["value"] = value
    (run / "evaluation.json").write_text(json.dumps(evaluation))


def test_winner_leaves_at_the_price_of_the_selection_once_all_runs_have_ended(ended, selection, tmp_path, capsys):
    given = [*arguments(ended), "--to", selection]
    runs = runs_of(selection)
    assert len({(run / "model/denoiser/diffusion_pytorch_model.safetensors").read_bytes() for run in runs}) == RUNS  # a key each
    set_score(runs[1], 2.0)
    (runs[0] / "evaluation.json").unlink()
    (runs[0] / "evaluation.png").unlink()
    (runs[0] / "evaluation.png").mkdir()  # where evaluate.py wants a file
    before = [files(run) for run in runs]
    with pytest.raises(SystemExit, match="1"):
        call(main, *given)
    said = capsys.readouterr()
    assert said.err.startswith(f"{runs[0]}: failed: evaluate.py: ") and "no winner is chosen before every run has ended" in said.err
    assert not (selection / "winner").exists() and [run.exists() for run in runs] == [True] * RUNS
    assert files(runs[0]).keys() - {"private/stderr.log", "private/scripts.jsonl"} == before[0].keys()

    (runs[0] / "evaluation.png").rmdir()
    call(evaluate_main, "--run", runs[0])  # as the next call would
    capsys.readouterr()
    weights = (runs[1] / "model/denoiser/diffusion_pytorch_model.safetensors").read_bytes()
    call(main, *given)
    said = capsys.readouterr()
    assert said.err == "" and "python -m dpsyngen.release --run" in said.out and not any(run.name in said.out for run in runs)
    winner = selection / "winner"
    assert {file.name for file in selection.iterdir()} == {"lock", "selection.json", "winner"}
    assert (winner / "model/denoiser/diffusion_pytorch_model.safetensors").read_bytes() == weights

    report = json.loads((winner / "privacy.json").read_text())
    assert 9.9 <= report["epsilon"] <= report["target_epsilon"] == 10 and "Renyi DP of repeat and select" in report["accountant"]
    [sgd] = report["mechanisms"]
    noise, rate, steps = sgd["noise_multiplier"], sgd["sampling_rate"], sgd["steps"]
    assert (rate, steps) == (1.0, 3)
    mechanisms = PrivacyPlan.with_noise(RunConfig(), 60000, noise).mechanisms(0)[1:]
    assert mechanisms[0].noise_multiplier == noise
    paid = [type(mechanisms[0])(noise, rate, steps)]
    assert report["epsilon"] == pytest.approx(repeated_epsilon([tuple(paid)], Repeats(4, 1), 1e-5), rel=1e-9)
    chosen = report["selection"]
    assert (chosen["mean_runs"], chosen["shape"], chosen["settings"], chosen["fields"]) == (4, 1, 2, ["stages.tau1"])
    assert 0 < chosen["epsilon_of_one_run_by_itself"] < 0.7 * report["epsilon"]
    assert not any("doesn't include" in caveat for caveat in report["caveats"])
    assert all("epsilon" not in line for line in lines(winner / "metrics.jsonl")) and len(lines(winner / "metrics.jsonl")) == 3
    shown = re.escape(f"{np.ceil(report['epsilon'] * 1e4) / 1e4:.4f}")
    card = (winner / "model" / "README.md").read_text()
    assert re.search(rf"trained with \({shown}, 1e-05\)-differential privacy", card) and "the best of a random number of runs (4 on average)" in card
    assert re.search(rf"epsilon = {shown} at delta = 1e-05", summary(winner))

    call(release_main, "--run", winner, "--to", tmp_path / "release")
    assert json.loads((tmp_path / "release" / "privacy.json").read_text()) == report
    assert not (tmp_path / "release" / "evaluation.json").exists()
    left = files(winner)
    call(main, *given)  # finished
    assert files(winner) == left


def test_no_run_that_is_chosen_from_can_be_mistaken_for_a_release(selection, monkeypatch, capsys, tmp_path):
    for run in runs_of(selection):
        report = json.loads((run / "privacy.json").read_text())
        assert (report["status"], report["epsilon"]) == ("finished", None) and "only its winner may leave" in report["guarantee"]
        assert "Nothing is guaranteed" in (run / "model" / "README.md").read_text()
        said = refusal(release_main, monkeypatch, capsys, "--run", run, "--to", tmp_path / "release", "--include-model-that-is-not-private")
        assert "got one of the runs that it is chosen from" in said
        assert not RunDirectory(run).key.exists()
    assert not (tmp_path / "release").exists()


def test_what_was_drawn_is_secret_and_stays(ended, selection, monkeypatch, capsys):
    private = selection / "private"
    assert (private / "draws.json").stat().st_mode & 0o777 == 0o600 and private.stat().st_mode & 0o777 == 0o700
    public = (selection / "selection.json").read_text()
    assert not any(run.name in public for run in runs_of(selection)) and json.loads(public)["mean_runs"] == 4
    given = [*arguments(ended), "--to", selection]
    for other in (["--runs=5"], ["--privacy.delta=1e-6"], ["--runs-distribution=poisson"], ["--score-noise=5"]):
        flags = [flag for flag in given if flag != "--score-images-are-public"] if other[0].startswith("--score") else given
        assert "expected the same selection" in refusal_after_the_price(main, monkeypatch, capsys, *flags, *other)
    drawn = (private / "draws.json").read_bytes()
    for run in runs_of(selection):
        set_score(run, 0.5)
    (private / "draws.json").unlink()
    assert "drawing again isn't paid for" in refusal_after_the_price(main, monkeypatch, capsys, *given)
    (private / "draws.json").write_bytes(drawn)
    tied = max(runs_of(selection), key=lambda run: run.name)  # a random name decides
    setting = (tied / "config.yaml").read_text()
    call(main, *given)
    assert (selection / "winner" / "config.yaml").read_text() == setting and not private.exists()


def refusal_after_the_price(*arguments: object) -> str:
    """The one line on stderr, for a refusal after the price was shown on stdout."""
    function, monkeypatch, capsys, *given = arguments
    monkeypatch.setattr("dpsyngen.sweep.selection_flags.print", print, raising=False)
    monkeypatch.setattr("rich.console.Console.print", lambda self, table: None)
    return refusal(function, monkeypatch, capsys, *given)


def test_run_that_spent_more_than_was_paid_for_is_run_anew(ended, selection, capsys):
    runs = runs_of(selection)
    report = json.loads((runs[2] / "privacy.json").read_text())
    report["steps_begun"] += 1
    report["mechanisms"][-1]["steps"] += 1
    (runs[2] / "privacy.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit, match="1"):
        call(main, *arguments(ended), "--to", selection)
    assert f"{runs[2]}: failed: it was resumed under other conditions and spent more" in capsys.readouterr().err
    assert [run.exists() for run in runs] == [True, True, False] and not (selection / "winner").exists()


def test_no_run_at_all_is_a_result(ended, tmp_path, monkeypatch, capsys):
    given = [*arguments(ended), "--runs-distribution=poisson", "--to", tmp_path / "none"]
    with monkeypatch.context() as patch:
        patch.setattr(Repeats, "draw", lambda self: 0)
        with pytest.raises(SystemExit, match="1"):
            call(main, *given)
    for _ in range(2):  # nothing is drawn again
        assert "the number of runs drawn was 0, so there is no winner" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="1"):
            call(main, *given)
    assert not (tmp_path / "none" / "winner").exists()


def terms_of(*flags: str, grid: tuple[str, ...], repeats: Repeats, metric: str = METRIC, noise: float | None = None) -> Terms:
    cells = build_cells([TINY], ["--data.expected_size=1000", "--hints.kind=none", *flags], [Axis.parse(text) for text in grid])
    return Terms.calibrate(cells, repeats, Score.of(cells[0].config, metric, noise, images_are_public=noise is None))


def test_price_is_paid_by_every_setting_and_covers_them_all():
    """Settings that draw batches of different sizes: each run spends what it says, together they cost at most the target."""
    repeats = Repeats(6, 1)
    terms = terms_of("--privacy.epsilon=2", "--private.steps=20", grid=("private.batch_size=50,1000",), repeats=repeats, noise=20.0)
    assert 1.98 <= terms.epsilon <= 2 == terms.target_epsilon
    spent = [plan.mechanisms(plan.steps) + terms.score.mechanisms for plan in terms.plans]
    assert len(set(spent)) == 2 and all(mechanisms[-1].noise_multiplier == 20 for mechanisms in spent)
    assert terms.epsilon == pytest.approx(repeated_epsilon(spent, repeats, 1e-5), rel=1e-12)
    for cell, plan in zip(terms.cells, terms.plans, strict=True):
        assert plan == PrivacyPlan.calibrate(cell.config, 1000)  # what train.py will make of it
        assert cell.config.privacy.epsilon == terms.epsilon_alone < 1.2
        assert repeated_epsilon([plan.mechanisms(plan.steps) + terms.score.mechanisms], repeats, 1e-5) <= terms.epsilon * (1 + 1e-9)
    report = terms.report({name: [] for name in ("status", "unit", "adjacency", "mechanisms", "caveats")})
    assert report["mechanisms"] == [{"name": "score", "type": "Gaussian", "noise_multiplier": 20.0, "sensitivity": 1.0}]


def test_noise_on_the_score_costs_and_counts_each_image_once():
    full = {"--private.batch_size=1000", "--privacy.epsilon=2"}
    free, paid = (terms_of(*full, grid=("seed=1,2",), repeats=Repeats(3, 1), noise=noise) for noise in (None, 8.0))
    assert paid.epsilon_alone < 0.95 * free.epsilon_alone and free.score.mechanisms == ()
    for noise, trainings in ((8.0, 1), (8.0, 3), (0.3, 3)):
        score = Score(METRIC, noise, trainings)
        record = {"confusion_matrix": [[5, 2], [1, 4]], "value": 0.75}
        other = {"confusion_matrix": [[5 - trainings, 2 + trainings], [1, 4]], "value": 0.6}  # one image, by every classifier
        moved = score.value({"metrics": {METRIC: record}}, 7) - score.value({"metrics": {METRIC: other}}, 7)
        assert 0.9999 < moved * noise / 2.0**score.grid.exponent <= 1  # the deviation is at least `noise` times what an image moves
        assert score.value({"metrics": {METRIC: record}}, 7) - score.value({"metrics": {METRIC: record}}, -3) == 10


def test_public_scores_rise_with_quality_and_nonsense_is_worst():
    value = Score("fid", None, 1).value
    assert value({"metrics": {"fid": {"value": 3.0}}}, 0) > value({"metrics": {"fid": {"value": 30.0}}}, 0) > -float("inf")
    assert value({"metrics": {"fid": {"value": float("nan")}}}, 0) == -float("inf")
    assert Score("cas_mlp", None, 1).value({"metrics": {"cas_mlp": {"value": 0.5}}}, 99) == 0.5


def test_settings_are_drawn_with_replacement_and_noise_has_its_deviation(tmp_path, monkeypatch):
    terms = terms_of("--private.batch_size=1000", grid=("seed=1,2,3",), repeats=Repeats(3, 1), noise=8.0)
    monkeypatch.setattr(Repeats, "draw", lambda self: 600)
    draws = selecting._draws(tmp_path, terms)
    assert len({draw.token for draw in draws}) == 600
    assert chisquare(np.bincount([draw.setting for draw in draws], minlength=3)).pvalue > 1e-6
    noise = np.array([draw.noise for draw in draws]) / 2.0**terms.score.grid.exponent
    assert abs(noise.mean()) < 5 / 600**0.5 and 0.85 < noise.std() < 1.15
    assert selecting._draws(tmp_path, terms) == draws
    orders = [draw.setting for draw in draws[:-1]], [draw.setting for draw in draws[1:]]
    assert sum(a == b for a, b in zip(*orders, strict=True)) > 100  # a setting may follow itself


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--runs=3"], "--select cas_logistic_regression: expected a score that costs nothing or is paid for"),
        (["--runs=3", "--score-images-are-public", "--data.held_out=5", "--evaluation.reference=held_out"], "expected evaluation.reference test"),
        (["--runs=3", "--score-noise=5", "--score-images-are-public"], "--score-noise: expected it with a metric cas_... and private images alone"),
        (["--runs=3", "--score-noise=0"], "--score-noise: expected a number > 0"),
        (["--runs=3", "--select=cas_cnn", "--score-noise=5"], "--select: expected a metric that evaluate.py computes here"),
        (["--runs=3", "--select=fid", "--evaluation.features=auto", "--score-images-are-public"], "evaluation.features: expected inception"),
        (["--score-images-are-public"], "--runs: expected the mean number of runs"),
        (["--runs=0.5", "--score-images-are-public"], "--runs: expected a number from 1 to 500, got '0.5'"),
        (["--runs=many"], "--runs: expected a number from 1 to 500, got 'many'"),
        (["--runs=3", "--runs-shape=2"], "--runs-shape: expected with --runs-distribution negative_binomial"),
        (["--runs=3", "--grid=privacy.epsilon=1,2", "--score-noise=5"], "--grid privacy.epsilon: expected a field that training or sampling"),
        (["--runs=3", "--grid=data.held_out=1,2", "--score-noise=5"], "--grid data.held_out: expected a field that training or sampling"),
        (["--runs=3", f"--privacy.unsafe_fixed_key={'ab' * 32}", "--score-noise=5"], "privacy.unsafe_fixed_key: expected null"),
        (["--runs=3", "--tracking.log_private_diagnostics_without_dp=true", "--score-noise=5"], "tracking.log_private_diagnostics_without_dp"),
        (["--runs=3", "--data.source=folder", "--data.path=.", "--data.test_path=.", "--score-noise=5"], "data.in_memory: expected always"),
        (["--runs=3", "--tracking.trackers=[tensorboard]", "--score-noise=5"], "tracking.trackers: expected none"),
        (["--runs=3", "--grid=stages.variant=dpdm,nonprivate", "--score-noise=5"], "stages.variant: expected variants under differential privacy"),
        (["--runs=3", "--data.expected_size=null", "--score-noise=5"], "data.expected_size: expected a number"),
        (["--runs=3", "--score-noise=0.1", "--privacy.epsilon=1"], "privacy.epsilon: expected at least"),
    ],
)
def test_what_would_not_be_paid_for_is_refused(flags, complaint, tmp_path, monkeypatch, capsys):
    given = ["--config", TINY, "--hints.kind=none", "--private.batch_size=60000", "--grid=seed=1,2", "--select", METRIC, "--dry-run", *flags]
    assert complaint in refusal(main, monkeypatch, capsys, *given, "--to", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_parts_of_a_selection_without_select_are_refused_and_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    given = ["--config", TINY, "--hints.kind=none", "--private.batch_size=60000", "--grid=seed=1,2", "--to", tmp_path / "none"]
    for flag in ("--runs=3", "--score-noise=5", "--score-images-are-public", "--dry-run", "--runs-distribution=poisson"):
        assert refusal(main, monkeypatch, capsys, *given, flag) == f"{flag.partition('=')[0]}: expected --select METRIC beside it"
    call(main, *given, "--select", METRIC, "--runs=3", "--data.public=true", "--dry-run")
    page = " ".join(capsys.readouterr().out.split())
    assert "settings 2, one drawn for each run" in page and "noise of DP-SGD" in page and "for a single run without a choice it would be" in page
    assert not (tmp_path / "none").exists()
