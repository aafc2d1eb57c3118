"""Running train.py again: a finished run stays as it is, an interrupted one goes on to the same end, and what was spent stays spent."""

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import (
    KEY,
    call,
    files,
    lines,
    needs_full_device,
    private_images,
    refusal,
    small,
    stop_at_first_log,
    train_main,
    weights,
)

from dpsyngen.checkpoint import Checkpoint, discard_after, load_newest, save_checkpoint
from dpsyngen.errors import InputError
from dpsyngen.privacy.journal import Journal
from dpsyngen.privacy.randomness import PrivateKey
from dpsyngen.run_directory import RunDirectory

pytestmark = needs_full_device
FIXED = f"--privacy.unsafe_fixed_key={KEY}"
TEN = ["--stages.variant=dpdm", "--private.batch_size=200", "--private.steps=10", "--compute.checkpoint_every=3", "--hints.kind=none"]


def interrupt(run: Path, arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int = 8) -> None:
    """Train up to the private step whose end is logged first, and stop there: the last checkpoint lies one or more steps behind."""
    stop_at_first_log(run)
    assert "No space left on device" in refusal(train_main, monkeypatch, capsys, *arguments, f"--tracking.log_every={step}", "--run", run)
    (run / "metrics.jsonl").unlink()


def spent(run: Path) -> tuple[str, int, int]:
    """Status, steps begun, and the last step that is part of the weights."""
    report = json.loads((run / "privacy.json").read_text())
    newest = max((run / "checkpoints").iterdir())
    steps = report["steps_begun" if report["status"] == "finished" else "steps_begun_at_most"]
    return report["status"], steps, json.loads((newest / "state.json").read_text())["state"]["step"]


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    arguments = [*small(private_images(tmp_path / "images.npz"), "--stages.variant=nonprivate"), "--run", tmp_path / "run"]
    call(train_main, *arguments)
    first, before = capsys.readouterr().out, files(tmp_path / "run")
    call(train_main, *arguments)
    assert capsys.readouterr().out == first
    assert files(tmp_path / "run") == before


def test_steps_that_cannot_be_replayed_are_charged_again(tmp_path, monkeypatch, capsys):
    """Eight steps begun, the checkpoint at the sixth: on other images, two steps were spent in vain."""
    images, run = private_images(tmp_path / "images.npz"), tmp_path / "run"
    interrupt(run, small(images, *TEN), monkeypatch, capsys)
    assert spent(run) == ("unfinished", 8, 6)
    private_images(images, seed=1)
    call(train_main, *small(images, *TEN, "--tracking.log_every=8"), "--run", run)
    assert spent(run) == ("finished", 10, 8)
    report = json.loads((run / "privacy.json").read_text())
    assert report["epsilon"] <= report["target_epsilon"] == 10
    assert [entry.get("step", "attempt") for entry in lines(run / "private/journal.jsonl")] == ["attempt", *range(8), "attempt", 6, 7]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "tensors cut short": lambda checkpoint: cut(checkpoint / "tensors.safetensors"),
    "a flipped bit in the tensors": lambda checkpoint: flip_a_bit(checkpoint / "tensors.safetensors"),
    "state cut short": lambda checkpoint: cut(checkpoint / "state.json"),
    "a flipped bit in the state": lambda checkpoint: flip_a_bit(checkpoint / "state.json"),
    "no files": lambda checkpoint: [file.unlink() for file in checkpoint.iterdir()],
}


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, monkeypatch, capsys):
    arguments, interrupted = small(private_images(tmp_path / "images.npz"), *TEN, FIXED), tmp_path / "interrupted"
    interrupt(interrupted, arguments, monkeypatch, capsys)
    for name, damage in {"none": lambda checkpoint: None, **DAMAGES}.items():
        run = shutil.copytree(interrupted, tmp_path / name)
        _, newest = sorted((run / "checkpoints").iterdir())
        damage(newest)
        call(train_main, *arguments, "--tracking.log_every=8", "--run", run)
        said = capsys.readouterr().err
        assert re.fullmatch("" if name == "none" else rf"{newest}: skipped, since this checkpoint can't be read \(.+\)\n", said)
        assert spent(run) == ("finished", 10, 10)
        assert weights(run) == weights(tmp_path / "none")
        assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "none/metrics.jsonl").read_bytes()


def test_a_run_with_damaged_checkpoints_alone_is_refused_and_left_as_it_is(tmp_path, monkeypatch, capsys):
    arguments, run = small(private_images(tmp_path / "images.npz"), *TEN, FIXED), tmp_path / "run"
    interrupt(run, arguments, monkeypatch, capsys)
    for damage, checkpoint in zip(list(DAMAGES.values())[1:3], sorted((run / "checkpoints").iterdir()), strict=True):
        damage(checkpoint)
    before = files(run)
    said = refusal(train_main, monkeypatch, capsys, *arguments, "--tracking.log_every=8", "--run", run)
    assert re.match(rf"{run}/checkpoints: expected a checkpoint that can be read, found 2 damaged", said)
    assert {name: content for name, (content, _) in files(run).items()} == {name: content for name, (content, _) in before.items()}
    shutil.rmtree(run / "checkpoints")
    call(train_main, *arguments, "--tracking.log_every=8", "--run", run)
    assert spent(run) == ("finished", 10, 10)  # started over with the same draws, so that nothing is charged twice


def test_damaged_checkpoints_are_not_among_those_kept(tmp_path):
    """Nor is what a crash left half written or half removed."""
    for number in (2, 4):
        save_checkpoint(tmp_path, number, Checkpoint({"x": torch.ones(3000)}, {"number": number}), keep=2)
    flip_a_bit(tmp_path / "000000004/tensors.safetensors")
    for leftover in (".000000006.partial", ".000000001.dropped"):
        (tmp_path / leftover).mkdir()
    found = load_newest(tmp_path, quiet=True)
    assert found is not None and found.state == {"number": 2}
    discard_after(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["000000002"]


def test_a_disk_that_is_full_for_the_journal_announces_nothing(tmp_path):
    """The step isn't begun, and its line, of which a part was written, is dropped."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.open_attempt("a", "start")
    journal.begin(0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 7, limits[1]))
        with pytest.raises(InputError, match=r"journal\.jsonl: expected a place that can be written .*File too large"):
            journal.begin(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not journal.has_begun(1)
    assert path.read_bytes().endswith(b'{"attem')
    again = Journal(path)
    assert again.has_begun(0) and not again.has_begun(1)
    again.begin(1)
    assert [entry.get("step") for entry in lines(path)] == [None, 0, 1]


def test_a_run_in_use_and_another_config_are_refused(tmp_path, monkeypatch, capsys):
    arguments, run = small(private_images(tmp_path / "images.npz"), "--stages.variant=nonprivate"), tmp_path / "run"
    interrupt(run, arguments, monkeypatch, capsys, step=2)
    arguments += ["--tracking.log_every=2", "--run", run]
    before = files(run)
    with RunDirectory(run).open((run / "config.yaml").read_text()):
        assert refusal(train_main, monkeypatch, capsys, *arguments) == f"{run}: another train.py is at work in this run directory"
    said = refusal(train_main, monkeypatch, capsys, *arguments, "--private.learning_rate=0.5")
    assert re.fullmatch(r".*/run: holds a run with another config \(private\.learning_rate 0\.0003, not 0\.5\); expected .*", said)
    assert {name: content for name, (content, _) in files(run).items()} == {name: content for name, (content, _) in before.items()}
    call(train_main, *arguments)
    capsys.readouterr()
    assert "holds a run with another config (seed 0, not 7)" in refusal(train_main, monkeypatch, capsys, *arguments, "--seed=7")


def test_a_refused_run_can_be_started_again_with_what_it_lacked(tmp_path, monkeypatch, capsys):
    """Bad input is found before anything is written, so the corrected command isn't refused for having another config."""
    arguments, run = ["--stages.variant=nonprivate", "--run", tmp_path / "run"], tmp_path / "run"
    assert "nowhere.npz" in refusal(train_main, monkeypatch, capsys, *small(tmp_path / "nowhere.npz"), *arguments)
    assert not run.exists()
    call(train_main, *small(private_images(tmp_path / "images.npz")), *arguments)


def test_a_lost_key_or_journal_ends_the_run(tmp_path, monkeypatch, capsys):
    arguments, run = small(private_images(tmp_path / "images.npz"), *TEN), tmp_path / "run"
    interrupt(run, arguments, monkeypatch, capsys)
    arguments += ["--tracking.log_every=8", "--run", run]
    shutil.copytree(run / "private", tmp_path / "saved")
    (run / "private/key").unlink()
    assert re.match(r".*/key: expected the key of the private steps", refusal(train_main, monkeypatch, capsys, *arguments))
    (run / "private/journal.jsonl").unlink()
    assert re.match(r".*/journal\.jsonl: expected the record of 6 private steps, found 0", refusal(train_main, monkeypatch, capsys, *arguments))
    for damaged in (b'{"attempt": 0, "step": 1\n', b"[1]\n", b"\xff\n"):
        (run / "private/journal.jsonl").write_bytes(damaged)
        assert re.match(r".*/journal\.jsonl: expected the journal of this run", refusal(train_main, monkeypatch, capsys, *arguments))
    shutil.copytree(tmp_path / "saved", run / "private", dirs_exist_ok=True)
    (run / "private/key").write_bytes(b"short")
    assert re.match(r".*/key: expected a private key", refusal(train_main, monkeypatch, capsys, *arguments))
    shutil.copytree(tmp_path / "saved", run / "private", dirs_exist_ok=True)
    call(train_main, *arguments)
    assert spent(run) == ("finished", 10, 10)


def test_a_crash_before_the_key_is_destroyed_is_made_good(tmp_path):
    arguments, run = [*small(private_images(tmp_path / "images.npz"), FIXED, "--stages.variant=dpdm"), "--run", tmp_path / "run"], tmp_path / "run"
    call(train_main, *arguments)
    before = files(run)
    PrivateKey.fixed(KEY).save(run / "private/key")
    call(train_main, *arguments)
    assert {name: content for name, (content, _) in files(run).items()} == {name: content for name, (content, _) in before.items()}
