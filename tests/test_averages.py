"""Averages of other lengths from snapshots: against numerical integration, averages tracked step by step, and the real scripts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from running import (
    ENVIRONMENT,
    KEY,
    call,
    evaluate_main,
    files,
    needs_full_device,
    private_images,
    refusal,
    sample_main,
    small,
    stop_at_first_log,
    train_main,
    weights,
)
from safetensors.torch import load_file
from scipy.integrate import quad
from torch import nn

from dpsyngen.averages import average, main
from dpsyngen.checkpoint import load_checkpoint, load_newest, numbers
from dpsyngen.cli import load_run_config
from dpsyngen.power_average import LONGEST, SHORTEST, TRACKED, combination, gamma_of, inner_product, kept
from dpsyngen.release import main as release_main
from dpsyngen.saved_model import load_trained
from dpsyngen.snapshots import Snapshots

FIXED = f"--privacy.unsafe_fixed_key={KEY}"
STEPS = 24
RUN = ["--stages.variant=dpdm", "--hints.kind=class_means", "--private.batch_size=200", "--private.learning_rate=0.01", FIXED]
TRACED = [*RUN, f"--private.steps={STEPS}", "--compute.checkpoint_every=1", "--compute.checkpoints_kept=100"]


def profile(gamma: float, end: float):
    return lambda t: (gamma + 1) / end * (t / end) ** gamma if t <= end else 0.0


def tracked(trajectory: np.ndarray, sigma_rel: float) -> np.ndarray:
    """The average of float64 [T, P], step by step."""
    average = np.zeros_like(trajectory[0])
    for step, values in enumerate(trajectory, 1):
        share = (1 - 1 / step) ** (gamma_of(sigma_rel) + 1)
        average = share * average + (1 - share) * values
    return average


@pytest.mark.parametrize("sigma_rel", [SHORTEST, 0.01, *TRACKED, 0.2, LONGEST])
def test_the_length_is_the_deviation_of_the_profile(sigma_rel):
    gamma, end = gamma_of(sigma_rel), 700.0
    p = profile(gamma, end)
    around = [end * (1 - width * sigma_rel) for width in (30, 10, 3, 1) if width * sigma_rel < 1]
    mass, mean, square = (quad(lambda t, k=k: p(t) * t**k, 0, end, points=around, epsabs=0, epsrel=1e-10)[0] for k in range(3))
    assert mass == pytest.approx(1, rel=1e-8)
    assert np.sqrt(square - mean**2) / end == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("first", [(100.0, 0.05), (37.0, 0.288), (100.0, 0.02)])
@pytest.mark.parametrize("second", [(100.0, 0.1), (63.0, 0.05), (99.0, 0.15)])
def test_inner_products_are_the_integrals(first, second):
    (end, length), (other_end, other_length) = first, second
    p, q = profile(gamma_of(length), end), profile(gamma_of(other_length), other_end)
    expected = quad(lambda t: p(t) * q(t), 0, min(end, other_end), epsabs=0, epsrel=1e-10)[0]
    arrays = [np.array(value) for value in (end, gamma_of(length), other_end, gamma_of(other_length))]
    assert inner_product(*arrays) == pytest.approx(expected, rel=1e-8)
    assert inner_product(*arrays[2:], *arrays[:2]) == pytest.approx(expected, rel=1e-8)


def snapshots_of(trajectory: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ends and gammas [M] and averages [M, P] of a made trajectory, [T, P], by what training uses."""
    module = nn.Linear(trajectory.shape[1], 1, bias=False).double()
    snapshots, found = Snapshots.of(Path(), count, len(trajectory), module), []
    for step, values in enumerate(trajectory, 1):
        module.weight.data.copy_(torch.from_numpy(values))
        snapshots.update(step, module)
        if snapshots.due(step):
            found += [(step, gamma_of(length), snapshots.running[f"{length:.2f}.weight"][0].numpy().copy()) for length in TRACKED]
    ends, gammas, averages = zip(*found, strict=True)
    return np.array(ends, dtype=np.float64), np.array(gammas), np.array(averages)


def test_a_step_has_the_integral_of_the_profile_over_it():
    rng = np.random.default_rng(0)
    trajectory = rng.normal(size=(50, 7))
    for length, found in zip(TRACKED, snapshots_of(trajectory, 1)[2], strict=True):
        gamma = gamma_of(length)
        shares = np.diff((np.arange(51) / 50) ** (gamma + 1))
        np.testing.assert_allclose(found, shares @ trajectory, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found, tracked(trajectory, length), rtol=1e-12, atol=1e-12)
        assert kept(length, 1) == 0


def test_reconstructed_averages_are_those_tracked_while_training():
    """On iterates that drift and wander far from zero. By Cauchy and Schwarz the error is at most the norm of what is missing times that of the
    trajectory around any constant; with more snapshots it vanishes, and a length that was tracked comes back as it was.
    """
    rng = np.random.default_rng(1)
    steps = 600
    trajectory = 30 + 5 * np.linspace(0, 1, steps)[:, None] ** 0.5 + rng.normal(size=(steps, 40)).cumsum(axis=0) / 5 + rng.normal(size=(steps, 40))
    around = np.sqrt(((trajectory - trajectory.mean(axis=0)) ** 2).sum(axis=0))
    taken = [snapshots_of(trajectory, count) for count in (4, 16, 64)]
    for length in (0.03, 0.05, 0.07, 0.1, 0.15, 0.2):
        expected, norm = tracked(trajectory, length), np.sqrt(inner_product(*[np.float64(one) for one in (steps, gamma_of(length))] * 2))
        errors = []
        for ends, gammas, averages in taken:
            coefficients, mismatch = combination(ends, gammas, steps, gamma_of(length))
            assert coefficients.sum() == pytest.approx(1, abs=1e-9)
            errors.append(np.abs(coefficients @ averages - expected).max())
            assert (np.abs(coefficients @ averages - expected) <= mismatch * norm * around + 1e-8).all()
        assert errors[-1] < 0.01 * trajectory.std()
        if length in TRACKED:
            assert max(errors) < 1e-6


def test_the_mismatch_is_the_error_on_independent_iterates():
    """Relative to the fluctuation of the average itself, as docs/method.md says."""
    trajectory = np.random.default_rng(2).normal(size=(1000, 1500))
    for count, length in [(2, 0.15), (4, 0.03), (8, 0.2), (16, 0.02)]:
        ends, gammas, averages = snapshots_of(trajectory, count)
        coefficients, mismatch = combination(ends, gammas, len(trajectory), gamma_of(length))
        expected = tracked(trajectory, length)
        assert (coefficients @ averages - expected).std() / expected.std() == pytest.approx(mismatch, rel=0.1)


def test_snapshots_are_spaced_evenly_and_no_more_than_steps():
    for count, steps in [(0, 10), (1, 10), (3, 10), (7, 23), (40, 12)]:
        snapshots = Snapshots.of(Path(), count, steps, nn.Linear(1, 1))
        due = [step for step in range(1, steps + 1) if snapshots.due(step)]
        assert due == sorted({-(-k * steps // count) for k in range(1, count + 1)})


# --- Real runs ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has kept every iterate in its checkpoints."""
    path = tmp_path_factory.mktemp("finished")
    images = private_images(path / "images.npz")
    call(train_main, *small(images, *TRACED, "--private.ema_snapshots=8", f"--data.test_path={images}"), "--run", path / "run")
    return path / "run"


def iterates(run: Path) -> list[dict[str, torch.Tensor]]:
    """The weights after each private step, from the checkpoints."""
    found = [load_checkpoint(run / "checkpoints", number) for number in numbers(run / "checkpoints")]
    private = [one for one in found if one.state["phase"] == "private" and one.state["step"] > 0]
    assert [one.state["step"] for one in private] == list(range(1, STEPS + 1))
    return [{name.removeprefix("denoiser."): tensor for name, tensor in one.tensors.items() if name.startswith("denoiser.")} for one in private]


def test_snapshots_of_a_run_are_averages_of_its_iterates(finished):
    trajectory = iterates(finished)
    assert numbers(finished / "averages") == list(range(3, STEPS + 1, 3))
    for step in (3, 12, STEPS):
        snapshot = load_checkpoint(finished / "averages", step)
        assert snapshot.state == {"step": step, "gammas": {f"{length:.2f}": gamma_of(length) for length in TRACKED}}
        parameters = {name.partition(".")[2].partition(".")[2] for name in snapshot.tensors}
        assert parameters == {name for name in trajectory[0] if name.startswith("backbone.")}
        for name, tensor in snapshot.tensors.items():
            length, parameter = float(name[:4]), name[5:]
            values = np.stack([one[parameter].double().numpy().ravel() for one in trajectory[:step]])
            np.testing.assert_allclose(tensor.double().numpy().ravel(), tracked(values, length), atol=1e-6)


def test_the_command_makes_a_run_with_the_average_that_training_would_have_tracked(finished, tmp_path, capsys):
    """And sample.py, evaluate.py and the release take it; the run it was made of stays as it was."""
    before, to = files(finished), tmp_path / "averaged"
    command = [sys.executable, "-m", "dpsyngen.averages", "--run", str(finished), "--length", "0.07", "--to", str(to)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    record = json.loads((to / "average.json").read_text())
    assert said.stdout == f"{to}: {finished} with weights averaged over length 0.07; {100 * record['mismatch']:.2g} % of the profile is missing\n"
    assert files(finished) == before
    trajectory = iterates(finished)
    denoiser = load_trained(to, load_run_config(to), torch.device("cpu"))
    norm = np.sqrt(inner_product(*[np.float64(one) for one in (STEPS, gamma_of(0.07))] * 2))
    moved = 0.0
    for name, tensor in denoiser.state_dict().items():
        values = np.stack([one[name].double().numpy() for one in trajectory])
        expected = tracked(values, 0.07)
        moved = max(moved, np.abs(values[-1] - expected).max(initial=0))
        missing = record["mismatch"] * norm * np.sqrt(((values - values.mean(axis=0)) ** 2).sum(axis=0))
        assert (np.abs(tensor.double().numpy() - expected) <= missing + 1e-6).all()
    assert record["mismatch"] < 0.02 and moved > 0.01
    assert sum(one["coefficient"] for one in record["combination"]) == pytest.approx(1)
    report, own = (json.loads((run / "privacy.json").read_text()) for run in (to, finished))
    assert report | {"caveats": own["caveats"]} == own
    assert [caveat for caveat in report["caveats"] if "a moving average of length 0.07" in caveat]
    assert "a moving average of length 0.07" in (to / "model/README.md").read_text()
    call(sample_main, "--run", to)
    assert json.loads((to / "samples/provenance.json").read_text())["run"] == "run-average-0.07"
    call(evaluate_main, "--run", to)
    assert (to / "evaluation.json").is_file()
    call(release_main, "--run", to, "--to", tmp_path / "released", "--include-model-that-is-not-private")
    assert weights(tmp_path / "released") == weights(to) != weights(finished)


def test_a_length_that_was_tracked_is_the_last_snapshot(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    call(main, "--run", run, "--length=0.1")
    snapshot, averaged = load_checkpoint(run / "averages", STEPS), tmp_path / "run-average-0.1"
    for name, tensor in load_file(averaged / "model/denoiser/diffusion_pytorch_model.safetensors").items():
        parameter = f"0.10.{name.removeprefix('denoiser.')}"
        if parameter in snapshot.tensors:
            torch.testing.assert_close(tensor, snapshot.tensors[parameter], atol=1e-6, rtol=0)


def test_nothing_changes_without_snapshots_nor_the_model_with_them(finished, tmp_path):
    images = finished.parent / "images.npz"
    call(train_main, *small(images, *TRACED, f"--data.test_path={images}"), "--run", tmp_path / "run")
    assert weights(tmp_path / "run") == weights(finished)
    assert not (tmp_path / "run/averages").exists()
    assert not [name for name in load_newest(tmp_path / "run/checkpoints").tensors if name.startswith("power")]
    assert {name for name in files(finished) if not name.startswith(("averages/", "checkpoints/"))} == {
        name for name in files(tmp_path / "run") if not name.startswith("checkpoints/")
    }


@needs_full_device
def test_an_interrupted_run_leaves_the_same_snapshots(tmp_path, monkeypatch, capsys):
    """Stopped at step 9 with a checkpoint at the sixth and a snapshot at the eighth. On other images none of steps that don't count is left."""
    images = private_images(tmp_path / "images.npz")
    arguments = small(images, *RUN, "--private.steps=10", "--private.ema_snapshots=5", "--compute.checkpoint_every=3", "--tracking.log_every=9")
    call(train_main, *arguments, "--run", tmp_path / "whole")
    stop_at_first_log(tmp_path / "stopped")
    capsys.readouterr()
    assert "No space left on device" in refusal(train_main, monkeypatch, capsys, *arguments, "--run", tmp_path / "stopped")
    (tmp_path / "stopped/metrics.jsonl").unlink()
    assert numbers(tmp_path / "stopped/averages") == [2, 4, 6, 8]
    shutil.copytree(tmp_path / "stopped", tmp_path / "changed")
    (tmp_path / "stopped/averages/.000000010.partial").mkdir()
    call(train_main, *arguments, "--run", tmp_path / "stopped")
    averages = [{name: content for name, (content, _) in files(tmp_path / run / "averages").items()} for run in ("whole", "stopped")]
    assert averages[0] == averages[1] and len(averages[0]) == 10
    assert not [path for path in (tmp_path / "stopped/averages").iterdir() if path.name.startswith(".")]
    private_images(images, seed=1)
    call(train_main, *arguments, "--run", tmp_path / "changed")
    assert numbers(tmp_path / "changed/averages") == [2, 4, 6, 7]  # three steps were spent in vain, and the seventh is the last
    assert average(tmp_path / "changed", 0.07, tmp_path / "to") < 0.1


def test_refusals(finished, tmp_path, monkeypatch, capsys):
    run, to = shutil.copytree(finished, tmp_path / "run"), tmp_path / "to"

    def said(*arguments: object) -> str:
        return refusal(main, monkeypatch, capsys, "--to", to, *arguments)

    for bad in ("0", "-1", "0.3", "nan", "inf", "1e-300"):
        complaint = f"--length: expected a fraction of the private phase in [0.001, 0.288], got {float(bad):g}"
        assert said("--run", run, f"--length={bad}") == complaint
    assert "invalid float value" in said("--run", run, "--length=short")
    assert said("--run", run, "--length=0.004") == "--length: expected one that 8 snapshots can give, 0.025 to 0.255, got 0.004"
    assert "is not a run directory" in said("--run", tmp_path, "--length=0.07")
    (run / "NOT-TO-BE-RELEASED").touch()
    assert "got one of the runs that it is chosen from" in said("--run", run, "--length=0.07")
    (run / "NOT-TO-BE-RELEASED").unlink()
    file = run / "averages/000000012/tensors.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9] + b"x" + content[-8:])
    assert said("--run", run, "--length=0.07").startswith(f"{file.parent}: expected what was written there (it has changed")
    file.write_bytes(content)
    to.mkdir()
    (to / "mine").touch()
    assert said("--run", run, "--length=0.07") == f"{to}: expected a directory that doesn't exist yet, or is empty"
    (to / "mine").unlink()
    shutil.rmtree(run / "averages/000000024")
    assert said("--run", run, "--length=0.07") == f"{run}/averages: expected a snapshot of step 24, the run's last, got step 21"
    shutil.rmtree(run / "averages")
    complaint = f"{run}/averages: expected snapshots, but there are none; train with private.ema_snapshots, e.g. 16"
    assert said("--run", run, "--length=0.07") == complaint
    (run / "privacy.json").write_text(json.dumps({"status": "unfinished"}))
    assert "training is not finished" in said("--run", run, "--length=0.07")
    assert not list(to.iterdir()) and sorted(path.name for path in tmp_path.iterdir()) == ["run", "to"]
    bad_count = refusal(train_main, monkeypatch, capsys, *small(tmp_path / "no.npz", "--private.ema_snapshots=-1"), "--run", tmp_path / "new")
    assert bad_count == "--private.ema_snapshots: expected an integer >= 0, got -1"
