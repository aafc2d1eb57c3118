"""python -m dpsyngen.stages: closed forms against sampling, elbows and bounds against known answers, the command as a user launches it."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from running import ENVIRONMENT, TINY, call, private_images, refusal, small
from scipy.linalg import sqrtm
from scipy.stats import norm

from dpsyngen.cli import read_config
from dpsyngen.compute import Compute
from dpsyngen.config import DataConfig, SyntheticConfig
from dpsyngen.errors import InputError
from dpsyngen.stages import distance
from dpsyngen.stages.__main__ import main
from dpsyngen.stages.elbows import Elbows, Proposal, kneedle, last_within
from dpsyngen.stages.gaussian import Gaussian
from dpsyngen.stages.plots import draw
from dpsyngen.stages.quality import errors, shifted, trained
from dpsyngen.stages.reference import PRIVATE_FLAG, Reference
from dpsyngen.stages.report import config_line, custom_line, remarks
from dpsyngen.stages.survey import Distance, Survey
from dpsyngen.strict_yaml import parse_yaml

SIGMAS = np.array([0.02, 0.3, 1.0, 5.0])
CPU = Compute(torch.device("cpu"))


def samples(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Rows of a Gaussian with a mean and correlated pixels of very different variance."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(d, d)) * np.geomspace(1, 0.01, d)
    return (0.3 + rng.normal(size=(n, d)) @ mixing.T).astype(np.float32)


def dense(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.mean(axis=0, dtype=np.float64), np.cov(rows.T.astype(np.float64), bias=True)


# Closed forms.


@pytest.mark.parametrize(("n", "d"), [(200, 12), (9, 30)])
def test_gaussian_denoiser_is_the_dense_formula(n, d):
    rows, x = samples(n, d), samples(7, d, seed=1)
    mean, covariance = dense(rows)
    fitted = Gaussian.fit(rows)
    for sigma in SIGMAS:
        gain = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(d))
        np.testing.assert_allclose(fitted.denoise(x, sigma), mean + (x - mean) @ gain.T, rtol=1e-4, atol=1e-5)
        assert fitted.own_error(sigma) == pytest.approx(sigma**2 * np.trace(gain) / d, rel=1e-4)
    # the error of the linear denoiser depends on mean and covariance alone, so on its own rows it is the Gaussian's, Gaussian or not
    np.testing.assert_allclose(fitted.errors_on(rows, SIGMAS), [fitted.own_error(sigma) for sigma in SIGMAS], rtol=1e-4)
    scalar, variance = Gaussian.fit_scalar(rows), np.trace(covariance) / d
    np.testing.assert_allclose(scalar.denoise(x, 0.3), mean + variance / (variance + 0.09) * (x - mean), rtol=1e-5, atol=1e-6)
    assert scalar.own_error(0.3) == pytest.approx(0.09 * variance / (variance + 0.09), rel=1e-5)
    np.testing.assert_allclose(scalar.errors_on(rows, SIGMAS), [scalar.own_error(sigma) for sigma in SIGMAS], rtol=1e-5)


def test_exact_errors_are_what_sampling_measures():
    """`errors` with the closed-form denoiser in a network's place, on Gaussian data: the measurement, its formula, and the Bayes error agree."""
    teaching, measured = samples(4000, 16), samples(2000, 16, seed=2)
    fitted = Gaussian.fit(teaching)

    def denoise(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert (labels == 1).all() and len(set(sigma.tolist())) == 1
        return torch.from_numpy(fitted.denoise(x.flatten(1).numpy(), float(sigma[0]))).reshape(x.shape)

    ticks = []
    found = errors(denoise, torch.from_numpy(measured).reshape(-1, 1, 4, 4), SIGMAS, 0, CPU, lambda: ticks.append(1))
    assert len(ticks) == len(SIGMAS)
    np.testing.assert_allclose(found, fitted.errors_on(measured, SIGMAS), rtol=0.03)
    np.testing.assert_allclose(found, [fitted.own_error(sigma) for sigma in SIGMAS], rtol=0.06)
    moved = torch.from_numpy(measured).reshape(-1, 1, 4, 4) + 0.7  # other images, whose mean is 0.7 higher
    again = errors(shifted(denoise, torch.full((1, 4, 4), -0.7)), moved, SIGMAS, 0, CPU, lambda: None)
    np.testing.assert_allclose(again, found, rtol=1e-3)


def test_training_learns_and_depends_on_seed_and_images_alone():
    config = read_config([TINY], ["--data.image_size=8", "--synthetic.learning_rate=1e-2"])
    image = torch.linspace(-1, 1, 64).reshape(1, 8, 8)

    def one(first: int, n: int) -> torch.Tensor:
        return image.expand(n, 1, 8, 8)

    untrained, denoise, again = (trained(config, one, steps, 32, CPU, lambda: None) for steps in (0, 60, 60))
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given = x, torch.full((5,), 0.5), torch.ones(5, dtype=torch.int64)
    assert torch.equal(denoise(*given), again(*given))
    before, after = (errors(d, image.expand(20, 1, 8, 8), np.array([0.5, 20.0]), 0, CPU, lambda: None) for d in (untrained, denoise))
    assert (after < 0.6 * before).all()  # the best denoiser of one image gives that image


# Elbows.


def test_threshold_is_where_the_tolerance_is_first_left():
    x = np.linspace(-6, 4, 11)
    excess = np.where(x < -2, 0.0, np.where(x > 1, 0.02, 1.0))
    excess[1] = -3.0  # better than the reference is within tolerance
    limit = math.log(1.1)
    found = Elbows.of(x, excess, 0.1)
    assert found.tau1 == pytest.approx(-3 + limit)  # on the line from (-3, 0) to (-2, 1)
    assert found.tau2 == pytest.approx(2 - (limit - 0.02) / 0.98)
    excess[0] = excess[-1] = 0.2
    assert (Elbows.of(x, excess, 0.1).tau1, Elbows.of(x, excess, 0.1).tau2) == (None, None)
    assert (Elbows.of(x, 0 * x, 0.1).tau1, Elbows.of(x, 0 * x, 0.1).tau2) == (4.0, -6.0)
    assert last_within(x, np.where(x > 0, 1.0, 0.0) - (x == 3), 0.5) == pytest.approx(0.5)  # what comes back later doesn't count


def test_kneedle_finds_the_papers_knee():
    """Figure 2 of Satopaa et al.: y = 5 - 1/(x + 0.1) at ten points of [0, 1] has its knee at x = 0.22; turned round, it is one of ours."""
    x = np.linspace(0, 1, 10)
    assert kneedle(1 - x[::-1], -(5 - 1 / (x[::-1] + 0.1))) == pytest.approx(1 - 2 / 9)
    wide = np.linspace(-5, 5, 21)
    hinge = np.maximum(0, wide)
    assert kneedle(wide, hinge) == pytest.approx(0)
    falling = Elbows.of(wide, hinge[::-1] + 0.01, 0.1)
    assert (falling.knee1, falling.knee2) == (None, pytest.approx(0))
    assert kneedle(x, x) is None and kneedle(x, 0 * x) is None and kneedle(x, np.sqrt(x)) is None


def test_proposal_takes_the_farthest_family_on_each_side_and_rounds_away_from_it():
    elbows = {"a": Elbows(-3.256, 2.0, None, None), "b": Elbows(None, 1.231, None, None), "c": Elbows(-3.8, None, None, None)}
    assert Proposal.of(elbows) == Proposal(-3.26, "a", 1.24, "b")
    assert Proposal.of({"c": elbows["c"]}) == Proposal(-3.8, "c", None, None)
    assert not Proposal.of(elbows).covers_everything and Proposal(1.0, "a", 0.5, "b").covers_everything


# Distances.


def test_bounds_are_exact_for_two_point_masses():
    p, q = np.zeros((4, 9)), np.full((4, 9), 0.5)
    pairs = distance.coupled_distances(p, q)
    apart = 1.5
    np.testing.assert_allclose(pairs, apart)
    exact = 2 * norm.cdf(apart / (2 * SIGMAS)) - 1
    np.testing.assert_allclose(distance.tv_upper(pairs, SIGMAS), exact, rtol=1e-12)
    np.testing.assert_allclose(distance.tv_lower(p, q, np.ones(9), SIGMAS), exact, rtol=1e-4)
    np.testing.assert_allclose(distance.kl_upper(pairs, SIGMAS), apart**2 / (2 * SIGMAS**2))
    assert distance.wasserstein(pairs) == pytest.approx(apart)
    assert (distance.tv_lower(p, q, np.zeros(9), SIGMAS) == 0).all()


def test_bounds_hold_for_two_gaussians_and_w2_is_its_closed_form():
    """N(0, 1) and N(2, 1) in two dimensions: W2 = 2; noised, KL = 2 / (1 + s^2) and TV = 2 Phi(1 / sqrt(1 + s^2)) - 1."""
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(800, 2)), rng.normal((2, 0), 1, size=(800, 2))
    pairs = distance.coupled_distances(p, q)
    assert distance.wasserstein(pairs) == pytest.approx(2, rel=0.08)
    kl, tv = 2 / (1 + SIGMAS**2), 2 * norm.cdf(1 / np.sqrt(1 + SIGMAS**2)) - 1
    assert (distance.kl_upper(pairs, SIGMAS) >= kl).all() and (distance.tv_upper(pairs, SIGMAS) >= tv).all()
    assert distance.kl_upper(pairs, SIGMAS)[-1] == pytest.approx(kl[-1], rel=0.2)  # the bound becomes tight
    np.testing.assert_allclose(distance.tv_lower(p, q, np.array([1.0, 0.0]), SIGMAS), tv, atol=0.05)  # half-spaces are the best events here
    assert (distance.tv_lower(p, q, np.array([1.0, 0.3]), SIGMAS) <= distance.tv_upper(pairs, SIGMAS)).all()


def test_assignment_is_the_best_of_all():
    p, q = np.random.default_rng(3).normal(size=(2, 6, 4))
    best = min(math.sqrt(np.mean(np.sum((p - q[list(order)]) ** 2, axis=1))) for order in itertools.permutations(range(6)))
    assert distance.wasserstein(distance.coupled_distances(p, q)) == pytest.approx(best)


@pytest.mark.parametrize("n", [300, 5])
def test_gelbrich_is_the_formula_and_a_lower_bound(n):
    p, q = samples(n, 8), samples(n, 8, seed=5)[:, ::-1] + 1
    (m, S), (k, T) = dense(p), dense(q)
    root = sqrtm(S + 1e-12 * np.eye(8)).real
    expected = math.sqrt(np.sum((m - k) ** 2) + np.trace(S + T - 2 * sqrtm(root @ T @ root + 1e-14 * np.eye(8)).real))
    found = distance.gelbrich(Gaussian.fit(p), Gaussian.fit(q))
    assert found == pytest.approx(expected, rel=1e-3)
    assert found <= distance.wasserstein(distance.coupled_distances(p, q))


# The command.


def arguments(path, *flags):
    return [
        *small(private_images(path / "images.npz"), "--network.label_dropout=0.1"),
        "--steps=2",
        "--batch=8",
        "--points=5",
        "--to",
        path / "to",
        *flags,
    ]


def test_as_a_user_launches_it(tmp_path):
    given = arguments(tmp_path, "--data.public=true", "--families=dead_leaves,salt_and_pepper", "--tolerance", "0.2")
    command = [sys.executable, "-m", "dpsyngen.stages", *map(str, given)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads((tmp_path / "to" / "stages.json").read_text())
    with Image.open(tmp_path / "to" / "stages.png") as picture:
        assert picture.width > 500
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["stages.json", "stages.png"]
    assert report["reference"] == {
        "name": "npz", "private": False, "statement": "The reference is declared public, so the result costs no privacy",
        "images_trained_on": 100, "images_measured_on": 100,
    }  # fmt: skip
    x = np.array(report["log_sigma"])
    assert (len(x), math.exp(x[0]), math.exp(x[-1])) == (5, pytest.approx(0.002), pytest.approx(80))
    assert set(report["elbows"]["families"]) == {"dead_leaves", "salt_and_pepper"} and set(report["distance"]) >= {"reference", "dead_leaves"}
    for name, error in report["error"]["families"].items():
        found = Elbows.of(x, np.log(np.array(error) / report["error"]["reference"]), 0.2)
        assert report["elbows"]["families"][name] == found.__dict__
        assert report["distance"][name]["w2_gelbrich"] <= report["distance"][name]["w2_assignment"]
        assert np.all(np.array(report["distance"][name]["tv_lower"]) <= report["distance"][name]["tv_upper"])
    last = result.stdout.splitlines()[-1]
    assert last == report["proposal"]["line"]
    assert set(parse_yaml(last, "stdout")["stages"]) == {"tau1", "tau2"}
    assert "NOT PRIVATE" not in result.stdout and "dead_leaves" in result.stdout


def test_private_images_are_refused_without_the_flag_and_marked_with_it(tmp_path, monkeypatch, capsys):
    given = arguments(tmp_path, "--families=salt_and_pepper")
    (tmp_path / "other_name.npz").symlink_to(tmp_path / "images.npz")
    tests = private_images(tmp_path / "tests.npz", seed=1)
    for named in ("config", tmp_path / "images.npz", tmp_path / "other_name.npz", tests):
        said = refusal(main, monkeypatch, capsys, *given, f"--data.test_path={tests}", "--reference", named)
        assert said.startswith("--reference: expected a public set that looks like the private images")
        assert PRIVATE_FLAG in said and not (tmp_path / "to").exists()
    call(main, *given, PRIVATE_FLAG)
    said = capsys.readouterr().out
    assert said.startswith("NOT PRIVATE") and "No epsilon includes it" in said
    report = json.loads((tmp_path / "to" / "stages.json").read_text())
    assert report["reference"]["private"] is True and report["reference"]["statement"].startswith("NOT PRIVATE")


def test_a_public_look_alike_costs_nothing(tmp_path, capsys):
    call(main, *arguments(tmp_path, "--families=salt_and_pepper", "--reference", private_images(tmp_path / "public.npz", seed=4)))
    assert "declared public" in capsys.readouterr().out
    assert json.loads((tmp_path / "to" / "stages.json").read_text())["reference"]["private"] is False


def test_training_and_measured_images_are_different_ones(tmp_path):
    images = private_images(tmp_path / "images.npz", count=61)
    data = DataConfig(source="npz", path=str(images), image_size=8, num_classes=3, public=True)
    for named in ("config", str(images)):
        teaching, measured = Reference.choose(data, named, private_allowed=False).load(seed=1)
        assert (teaching.shape, measured.shape) == ((30, 1, 8, 8), (31, 1, 8, 8))
        assert len({image.tobytes() for image in (*teaching, *measured)}) == 61
        assert -1 <= measured.min() < -0.9 and 0.9 < measured.max() <= 1


def test_a_reference_may_be_a_folder_without_classes(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    private = DataConfig(source="npz", path="elsewhere.npz", image_size=8, num_classes=3)
    chosen = Reference.choose(private, str(tmp_path), private_allowed=False)
    assert chosen.data.source == "folder" and [len(part) for part in chosen.load(seed=0)] == [10, 10]
    (tmp_path / "0.png").unlink()
    with pytest.raises(InputError, match="--reference: expected at least 20 images"):
        chosen.load(seed=0)


def survey_of(**ratios: np.ndarray) -> Survey:
    """A survey over eleven levels of ln sigma from -6 to 4, of families with these errors as multiples of the reference-trained one's."""
    x = np.linspace(-6, 4, 11)
    curve = 1 / (1 + np.exp(-x))
    found = {name: ratio * curve for name, ratio in ratios.items()}
    apart = Distance(1.0, 0.5, np.exp(-x), np.exp(-x).clip(0, 1), 0 * x)
    return Survey(x, curve, found, found, {"full": curve, "scalar": 2 * curve, **found}, dict.fromkeys(("reference", *ratios), apart), 0.1, 10, 10)


def test_lines_can_be_put_into_a_config(tmp_path):
    x = np.linspace(-6, 4, 11)
    both = survey_of(dead_leaves=np.where(x < -2, 1.0, 2.0), strokes=np.where(x > 1, 1.0, 2.0))
    options = SyntheticConfig(family="strokes", options={"curves_max": 3}, steps=1, epochs=None)
    file = tmp_path / "stages.yaml"
    file.write_text(config_line(both))
    config = read_config([TINY, file])
    found = both.proposal
    assert (config.stages.tau1, config.stages.tau2) == (found.tau1, found.tau2) and -3 < config.stages.tau1 < -2 and 1 < config.stages.tau2 < 2
    file.write_text(str(custom_line(both, options)))
    custom = {stage.name: stage for stage in read_config([TINY, file], ["--stages.holder=routed"]).stages.stages}  # routed: without gap or overlap
    assert (custom["cleaning"].family, custom["cleaning"].upper, custom["cleaning"].options) == ("dead_leaves", found.tau1, {})
    assert (custom["coarse"].family, custom["coarse"].lower, custom["coarse"].options) == ("strokes", found.tau2, {"curves_max": 3})
    assert (custom["context"].source, custom["context"].range) == ("private", (found.tau1, found.tau2))

    coarse = survey_of(strokes=np.where(x > 1, 1.0, 2.0))
    assert config_line(coarse).startswith(f"stages: {{tau1: null, tau2: {found.tau2:.2f}}}  # leave out tau1")
    file.write_text(str(custom_line(coarse, options)))
    assert [stage.name for stage in read_config([TINY, file]).stages.stages] == ["context", "coarse"]
    assert any("nothing is proposed for tau1" in remark for remark in remarks(coarse))
    neither, everywhere = survey_of(strokes=2 + 0 * x), survey_of(strokes=1 + 0 * x)
    for survey in (neither, everywhere):
        assert config_line(survey).startswith("stages: {tau1: null, tau2: null}  #") and custom_line(survey, options) is None
    assert any("two ends meet" in remark for remark in remarks(everywhere))


def test_the_picture_says_whose_images_it_shows():
    for private in (True, False):
        texts = [text.get_text() for text in draw(survey_of(a=np.full(11, 1.05)), Reference("mine", DataConfig(), private)).findobj(Text)]
        assert any(text.startswith("NOT PRIVATE") for text in texts) is private
        assert any("mine" in text for text in texts)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--families=dead_leafs"], "--families: unknown generator 'dead_leafs': did you mean 'dead_leaves'?"),
        (["--families=strokes,strokes"], "--families: expected each name once, got strokes,strokes"),
        (["--synthetic.family=dead_leaves", "--synthetic.options={leafs: 3}"], "--families: unknown option 'leafs' of dead_leaves"),
        (["--steps=0"], "--steps: expected an integer >= 1, got 0"),
        (["--steps=many"], "argument --steps: invalid int value: 'many'"),
        (["--points=2"], "--points: expected an integer >= 3, got 2"),
        (["--tolerance=nan"], "--tolerance: expected a number in (0, 1], got nan"),
        (
            ["--reference=imagenet"],
            "--reference: expected config, mnist, fashion_mnist, or a folder, .zip, .npz or .tar of public images, got imagenet",
        ),
        (["--reference=nowhere.npz"], "nowhere.npz: expected a readable .npz file"),
        (["--reference=mnist", PRIVATE_FLAG], f"{PRIVATE_FLAG}: expected it with private images alone"),
        (["--to", "/dev/null/there"], "/dev/null/there: expected a place that can be written"),
    ],
)
def test_bad_input_is_one_line(flags, complaint, tmp_path, monkeypatch, capsys):
    assert complaint in refusal(
        main, monkeypatch, capsys, *arguments(tmp_path, *flags), *([] if "--reference" in flags[0] else ["--data.public=true"])
    )
