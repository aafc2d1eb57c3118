"""On which weights private steps are replayed: on those that their attempt began on or computed, and on no others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import KEY, call, launch_together, lines, needs_full_device, private_images, small, stop_at_first_log, train_main, weights

from dpsyngen.checkpoint import Checkpoint, load_newest, save_checkpoint
from dpsyngen.cli import load_run_config
from dpsyngen.compute import Compute
from dpsyngen.denoiser import build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.progress import Progress
from dpsyngen.run_directory import RunDirectory
from dpsyngen.tracking import Trackers

pytestmark = needs_full_device
PRIVATE = ("--stages.variant=finetune_all", "--hints.kind=none", "--private.batch_size=200", "--private.steps=8", "--tracking.log_every=3")
CENTRAL = ("--stages.variant=finetune_all", "--private.batch_size=200", "--private.steps=2", "--central.steps=3", "--central.batch_size=20",
           "--compute.checkpoint_every=1", "--compute.checkpoints_kept=9", "--tracking.log_every=2")  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return private_images(tmp_path_factory.mktemp("data") / "images.npz")


def arguments_with(images: Path, cache: Path, flags: tuple[str, ...]) -> list[object]:
    return small(images, *flags, f"--synthetic.cache={cache}", f"--privacy.unsafe_fixed_key={KEY}")


def whole_run(images: Path, folder: Path, flags: tuple[str, ...]) -> Path:
    """A folder with a run that nobody stopped, and with what its synthetic phase left in a cache."""
    call(train_main, *arguments_with(images, folder / "cache", flags), "--run", folder / "run")
    return folder


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(images, tmp_path_factory.mktemp("whole"), PRIVATE)


@pytest.fixture(scope="module")
def whole_central(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(images, tmp_path_factory.mktemp("whole_central"), CENTRAL)


def interrupted_run(arguments: list[object], run: Path) -> Path:
    """Stopped where the first line is logged, which is not in the synthetic phase if that is taken from the cache."""
    stop_at_first_log(run)
    with pytest.raises(InputError, match="No space left on device"):
        call(train_main, *arguments, "--run", run)
    (run / "metrics.jsonl").unlink()
    return run


def another_synthetic_phase(cache: Path) -> None:
    """The cache then has weights that are as good, but others: what other code, or a device that rounds otherwise, makes of the same phase."""
    (place,) = cache.iterdir()
    found = load_newest(place)
    assert found is not None
    shutil.rmtree(place)
    save_checkpoint(place, 0, Checkpoint({name: tensor * 1.25 for name, tensor in found.tensors.items()}, found.state), keep=1)


def resumed(arguments: list[object], run: Path) -> list[int | str]:
    """What the journal has once the run has ended: "attempt" where one opens, and what was begun."""
    call(train_main, *arguments, "--run", run)
    return begun(run)


def report_of(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "privacy.json").read_text())
    return report


def begun(run: Path) -> list[int | str]:
    return [line.get("step", "attempt") for line in lines(run / "private/journal.jsonl")]


def rewrite_newest(run: Path, *without: str, **tensors: torch.Tensor) -> None:
    """Another newest checkpoint in its place, as whole as before: with other tensors, or without some entries of the state."""
    newest, found = max((run / "checkpoints").iterdir()), load_newest(run / "checkpoints")
    assert found is not None
    state = {name: value for name, value in found.state.items() if name not in without}
    shutil.rmtree(newest)
    save_checkpoint(run / "checkpoints", int(newest.name), Checkpoint(found.tensors | tensors, state), keep=9)


# From the attempt's start.


def test_a_lost_synthetic_phase_is_repeated_free_if_it_ends_in_the_same_weights(images, whole, tmp_path):
    """Three of eight steps begun; all checkpoints lost. The fingerprint is the same either way."""
    cache = shutil.copytree(whole / "cache", tmp_path / "cache")
    arguments = arguments_with(images, cache, PRIVATE)
    same = interrupted_run(arguments, tmp_path / "same")
    shutil.rmtree(same / "checkpoints")
    other = shutil.copytree(same, tmp_path / "other")

    assert resumed(arguments, same) == ["attempt", *range(8)]
    assert weights(same) == weights(whole / "run")

    another_synthetic_phase(cache)
    assert resumed(arguments, other) == ["attempt", *range(3), "attempt", *range(5)]
    assert report_of(other)["steps_begun"] == 8
    first, second = (line for line in lines(other / "private/journal.jsonl") if "fingerprint" in line)
    assert first.pop("weights") != second.pop("weights") and first | {"attempt": 1} == second


def test_class_means_are_released_and_paid_again_for_other_weights(images, whole_central, tmp_path):
    """Stopped in the central phase, which is as lost as the synthetic one."""
    cache = shutil.copytree(whole_central / "cache", tmp_path / "cache")
    arguments = arguments_with(images, cache, CENTRAL)
    same = interrupted_run(arguments, tmp_path / "same")
    assert begun(same) == ["attempt", "class_means"]
    shutil.rmtree(same / "checkpoints")
    other = shutil.copytree(same, tmp_path / "other")

    assert resumed(arguments, same) == ["attempt", "class_means", 0, 1]
    assert weights(same) == weights(whole_central / "run")

    another_synthetic_phase(cache)
    assert resumed(arguments, other) == ["attempt", "class_means", "attempt", "class_means", 0]
    assert [mechanism.get("releases", mechanism.get("steps")) for mechanism in report_of(other)["mechanisms"]] == [2, 1]


# From a checkpoint.


def test_a_checkpoint_of_another_attempt_is_not_gone_on_with(images, whole, tmp_path):
    """Two attempts have begun three steps each and saved the second. The first one's second, put back, isn't the second one's."""
    cache = shutil.copytree(whole / "cache", tmp_path / "cache")
    arguments = arguments_with(images, cache, PRIVATE)
    run = interrupted_run(arguments, tmp_path / "run")
    shutil.move(run / "checkpoints", tmp_path / "first")
    another_synthetic_phase(cache)
    interrupted_run(arguments, run)
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(run / "checkpoints")
    shutil.move(tmp_path / "first", run / "checkpoints")

    twice = ["attempt", *range(3)] * 2
    assert resumed(arguments, again) == [*twice, 3, 4]
    assert resumed(arguments, run) == [*twice, "attempt", 2, 3]


def test_an_attempt_is_left_when_its_first_central_steps_are_lost(images, whole_central, tmp_path):
    """It begins at the first of three, on other data, and saves the second; the release of the class means comes before it."""
    arguments = arguments_with(images, whole_central / "cache", CENTRAL)
    run = interrupted_run(arguments, tmp_path / "run")
    arguments.append(f"--data.path={private_images(tmp_path / 'other.npz', seed=1)}")
    interrupted_run([*arguments, "--tracking.log_every=9"], run)
    assert [int(path.name) - 10**8 for path in sorted((run / "checkpoints").iterdir())] == [0, 1, 3, 5]
    copies = [shutil.copytree(run, tmp_path / f"without-{lost}") for lost in range(3)]
    for lost, copy in enumerate(copies):
        for path in sorted((copy / "checkpoints").iterdir())[4 - lost :]:
            shutil.rmtree(path)
    before = ["attempt", "class_means", "attempt"]
    assert [resumed(arguments, copy) for copy in copies] == [[*before, 0, 1]] * 2 + [[*before, "attempt", 0, 1]]


# Runs of earlier versions, whose journals and checkpoints don't tell.


def forget(run: Path) -> None:
    """As an earlier version would have left the run, whose code happens to have the same fingerprint."""
    journal = run / "private/journal.jsonl"
    text = journal.read_text()
    for line in lines(journal):
        if "weights" in line:
            text = text.replace(f', "weights": "{line["weights"]}"', ', "from": -1000000000')
    assert '"weights"' not in text
    journal.write_text(text)
    rewrite_newest(run, "attempt")


def test_a_run_of_an_earlier_version_goes_on_under_its_plan_and_is_charged(images, tmp_path):
    arguments = small(images, *PRIVATE, "--stages.variant=dpdm", "--private.steps=5")
    run = interrupted_run(arguments, tmp_path / "run")
    nothing_begun = shutil.copytree(run, tmp_path / "nothing")
    forget(run)
    assert resumed(arguments, run) == ["attempt", *range(3), "attempt", 2, 3]
    report = report_of(run)
    assert [mechanism["steps"] for mechanism in report["mechanisms"]] == [5] and report["epsilon"] <= report["target_epsilon"]

    journal = nothing_begun / "private/journal.jsonl"
    journal.write_text(journal.read_text().partition("\n")[0] + "\n")
    for path in sorted((nothing_begun / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    forget(nothing_begun)
    assert resumed(arguments, nothing_begun) == ["attempt", "attempt", *range(5)]
    assert [mechanism["steps"] for mechanism in report_of(nothing_begun)["mechanisms"]] == [5]


# The digest.


def test_a_digest_tells_all_that_the_next_step_starts_from(images, tmp_path):
    """Weights, their average, the optimiser's moments, and the position; not what may be otherwise."""
    run = interrupted_run(small(images, *PRIVATE, "--stages.variant=dpdm"), tmp_path / "run")
    found = load_newest(run / "checkpoints")
    config = load_run_config(run)
    assert found is not None

    def digest(place: str, *without: str, **tensors: torch.Tensor) -> str:
        copy = shutil.copytree(run, tmp_path / place)
        rewrite_newest(copy, *without, **tensors)
        progress = Progress(RunDirectory(copy), Compute(torch.device("cpu")), build_denoiser(config), Trackers(copy), 2)
        progress.resume()
        return progress.digest()

    filled = [name for name, tensor in found.tensors.items() if tensor.numel() > 0]
    names = [next(name for name in filled if name.startswith(part)) for part in ("denoiser.", "average.module.", "optimizer.0.")]
    digests = [digest(name, **{name: found.tensors[name] + 1}) for name in names]
    assert len({digest("same"), *digests}) == 4
    assert digest("earlier", "attempt") == digest("again")
    progress = Progress(RunDirectory(tmp_path / "new"), Compute(torch.device("cpu")), build_denoiser(config), Trackers(tmp_path), 2)
    positions = [(phase, step, means) for phase in ("central", "private") for step in (0, 1) for means in (False, True)]
    found_at = set()
    for progress.phase, progress.step, progress.has_class_means in positions:
        found_at.add(progress.digest())
    assert len(found_at) == len(positions)


def test_processes_agree_on_a_digest_that_depends_on_each(tmp_path):
    done = launch_together(2, "tests/agreeing.py", tmp_path)
    assert done.returncode == 0, done.stderr
    told = [(tmp_path / rank).read_text().split() for rank in ("0", "1")]
    assert told[0] == told[1] and len(set(told[0])) == 3
