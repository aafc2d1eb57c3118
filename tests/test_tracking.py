"""Trackers hold what metrics.jsonl holds, each point once; private points wait; grids of images change nothing else."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from kill import logged
from PIL import Image
from running import KEY, TINY, call, files, lines, private_images, refusal, small, train_main, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_kill import kill_at

from dpsyngen.cli import read_config
from dpsyngen.compute import Compute
from dpsyngen.config import RunConfig, Tracker
from dpsyngen.denoiser import build_denoiser
from dpsyngen.previews import write_preview
from dpsyngen.progress import Progress
from dpsyngen.run_directory import RunDirectory, append_line
from dpsyngen.tracking import _TRACKERS, Follower, Trackers, following

TENSORBOARD = "--tracking.trackers=[tensorboard]"


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: {name: [(step, value), ...]} in the order in which it was written."""
    accumulator = EventAccumulator(str(run / "trackers/tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {name: [(event.step, event.value) for event in accumulator.Scalars(name)] for name in accumulator.Tags()["scalars"]}


def expected(run: Path, synthetic_steps: int) -> dict[str, list[tuple[int, Any]]]:
    """The same, from metrics.jsonl; TensorBoard keeps float32."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for line in lines(run / "metrics.jsonl"):
        phase, step = line.pop("phase"), line.pop("step")
        for name, value in line.items():
            found.setdefault(f"{phase}/{name}", []).append((step + synthetic_steps * (phase == "private"), pytest.approx(value, rel=1e-6)))
    return found


def test_names_are_those_that_accelerate_knows():
    assert set(get_args(Tracker)) == set(LOGGER_TYPE_TO_CLASS) == set(_TRACKERS)


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    arguments = [*small(private_images(tmp_path / "images.npz")), "--run", tmp_path / "run"]
    said = refusal(train_main, monkeypatch, capsys, *arguments, "--tracking.trackers=[tensorbored]")
    assert said.startswith("--tracking.trackers: expected a list of aim or clearml or ") and said.endswith("got ['tensorbored']")
    assert "no name twice" in refusal(train_main, monkeypatch, capsys, *arguments, "--tracking.trackers=[wandb, wandb]")
    missing = sorted(set(get_args(Tracker)) - {str(name) for name in get_available_trackers()})
    if not missing:
        pytest.skip("all trackers are installed")
    said = refusal(train_main, monkeypatch, capsys, *arguments, f"--tracking.trackers=[tensorboard, {missing[0]}]")
    assert said.startswith("tracking.trackers: expected trackers that are installed here (")
    assert "tensorboard" in said.partition(")")[0] and said.endswith(f"got {missing[0]}; pip install {missing[0]}")
    assert not (tmp_path / "run").exists()


def test_a_tracker_gets_the_lines_of_the_metrics_and_no_secret(tmp_path):
    images, run = private_images(tmp_path / "private-images.npz"), tmp_path / "run"
    call(train_main, *small(images, TENSORBOARD, "--run", run))
    assert points(run) == expected(run, synthetic_steps=3)
    assert points(run).keys() == {"synthetic/loss", "private/epsilon"}
    assert not any(b"private-images" in content for name, (content, _) in files(run).items() if name.startswith("trackers/"))

    call(train_main, *small(images, TENSORBOARD, f"--privacy.unsafe_fixed_key={KEY}", "--run", tmp_path / "fixed"))
    assert points(tmp_path / "fixed").keys() == {"synthetic/loss"}
    kept = {name: content for name, (content, _) in files(tmp_path / "fixed").items() if name.startswith("trackers/")}
    assert any(b"learning_rate" in content for content in kept.values())
    assert not any(KEY.encode() in content for content in kept.values())


def test_a_killed_run_sends_each_point_once_and_draws_the_same_grids(tmp_path):
    """With and without trackers and grids, killed or not: the same weights and metrics, and where both drew, the same picture."""
    lengths = ["--synthetic.steps=20", "--private.steps=12", "--compute.checkpoint_every=7", "--tracking.log_every=2"]
    flags = [f"--privacy.unsafe_fixed_key={KEY}", "--tracking.log_private_diagnostics_without_dp=true", *lengths]
    arguments, killed, whole = small(private_images(tmp_path / "images.npz"), *flags), tmp_path / "killed", tmp_path / "whole"
    followed = [*arguments, TENSORBOARD, "--tracking.grid_every=4"]
    kill_at(logged("private", 3), "private step", followed, killed)
    assert len(points(killed)["private/loss_without_dp"]) >= 2  # the flag that gives the losses away lets them be seen at once
    call(train_main, *followed, "--run", killed)
    call(train_main, *arguments, "--run", whole)

    assert points(killed) == expected(killed, synthetic_steps=20)
    assert points(killed).keys() - {"synthetic/loss"} == {
        f"private/{name}_without_dp" for name in ("loss", "gradient_norm", "clipped_fraction", "drawn_batch_size")
    }
    assert weights(killed) == weights(whole)
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert {path.name for path in (whole / "previews").iterdir()} == {"synthetic-000020.png", "private-000012.png"}
    steps = [*(f"synthetic-{step:06d}.png" for step in range(4, 21, 4)), *(f"private-{step:06d}.png" for step in (4, 8, 12))]
    assert sorted(path.name for path in (killed / "previews").iterdir()) == sorted(steps)
    for picture in (whole / "previews").iterdir():
        assert picture.read_bytes() == (killed / "previews" / picture.name).read_bytes()
        with Image.open(picture) as grid:
            assert grid.size == (8 * 68 + 4, 3 * 68 + 4)  # three classes, eight images of each


def run_with_lines(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    for phase, count in (("synthetic", 4), ("private", 3)):
        for step in range(1, count + 1):
            append_line(run.metrics, {"phase": phase, "step": step, "value": float(step)})
    return run


def config_with(*flags: str) -> RunConfig:
    return read_config([TINY], [TENSORBOARD, *flags])


def test_private_points_wait_for_the_end_of_their_phase(tmp_path):
    """Their times would tell how long the private steps took. An interruption doesn't send them either."""
    run, config = run_with_lines(tmp_path), config_with()
    with following(config, run, main=True) as trackers:
        trackers.follow("private")
    assert points(run.path) == {}
    (tmp_path / "later").write_bytes(run.metrics.read_bytes())
    run.metrics.write_text("".join(line for line in run.metrics.read_text().splitlines(keepends=True) if "synthetic" in line))
    with following(config, run, main=True) as trackers:
        trackers.follow("synthetic")
        run.metrics.write_bytes((tmp_path / "later").read_bytes())
        trackers.follow("private")
    assert points(run.path) == {"synthetic/value": [(1, 1), (2, 2), (3, 3), (4, 4)]}
    with following(config, run, main=True) as trackers:
        trackers.complete()
    assert points(run.path)["private/value"] == [(5, 1), (6, 2), (7, 3)]
    assert len(points(run.path)["synthetic/value"]) == 4


def test_private_points_are_live_where_the_user_gives_the_diagnostics_away(tmp_path):
    run, config = run_with_lines(tmp_path), config_with("--tracking.log_private_diagnostics_without_dp=true")
    with following(config, run, main=True) as trackers:
        trackers.follow("private")
        assert points(run.path)["private/value"] == [(5, 1), (6, 2), (7, 3)]


def test_a_point_that_a_crash_kept_from_being_noted_is_shown_once(tmp_path):
    run, config = run_with_lines(tmp_path), config_with()
    memory = run.trackers / "tensorboard.json"
    with following(config, run, main=True) as trackers:
        trackers.complete()
    memory.write_text(json.dumps(json.loads(memory.read_text()) | {"sent": 5}))
    with following(config, run, main=True) as trackers:
        trackers.complete()
    assert points(run.path) == expected(run.path, synthetic_steps=4)


def test_only_the_main_process_tracks(tmp_path):
    run = run_with_lines(tmp_path)
    with following(config_with(), run, main=False) as trackers:
        trackers.complete()
    assert not run.trackers.exists()


class Unsteady(GeneralTracker):
    """A tracker whose server is away until the file is there."""

    name, requires_logging_directory, tracker = "unsteady", False, None

    def __init__(self, server: Path) -> None:
        super().__init__()
        self.server, self.tried, self.seen = server, 0, Counter[int]()

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        self.tried += 1
        if not self.server.exists():
            raise ConnectionError("no\nserver")
        self.seen[step] += 1


def test_a_tracker_that_fails_stops_nothing_and_is_tried_again_at_the_end(tmp_path, capsys):
    run, tracker = run_with_lines(tmp_path), Unsteady(tmp_path / "server")
    trackers = Trackers(run.metrics, [Follower(tracker, tmp_path / "memory", "id", 0)])
    for _ in range(3):
        trackers.follow("synthetic")
    assert tracker.tried == 1  # a server that is away can take minutes to say so
    assert capsys.readouterr().err == "tracking.trackers: unsteady lacks the points from step 1 on (ConnectionError: no server)\n"
    tracker.server.touch()
    trackers.complete()
    assert tracker.seen == dict.fromkeys(range(1, 8), 1)


def test_a_tracker_that_cannot_be_started_is_one_line(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    (run / "trackers").mkdir(parents=True)
    (run / "trackers/tensorboard").write_text("in the way")
    said = refusal(train_main, monkeypatch, capsys, *small(private_images(tmp_path / "images.npz")), TENSORBOARD, "--run", run)
    assert said.startswith("tracking.trackers: tensorboard can't be started (")


def test_weights_that_diverged_give_no_grid_and_a_line(tmp_path, capsys):
    config = read_config([TINY], ["--data.image_size=8"])
    denoiser = build_denoiser(config)
    run = RunDirectory(tmp_path)
    progress = Progress(run, Compute(torch.device("cpu")), denoiser, Trackers(run.metrics), 1, step=7)
    before = torch.random.get_rng_state()
    write_preview(progress, denoiser, config)
    assert torch.equal(before, torch.random.get_rng_state())
    with Image.open(tmp_path / "previews/synthetic-000007.png") as grid:
        assert grid.size == (8 * 68 + 4, 10 * 68 + 4)
    with torch.no_grad():
        next(denoiser.parameters()).fill_(torch.nan)
    progress.step = 8
    write_preview(progress, denoiser, config)
    assert "synthetic-000008.png: not drawn, since the model's images are not finite" in capsys.readouterr().err
    assert len(list((tmp_path / "previews").iterdir())) == 1
