"""What was spent, at every moment: privacy.json is ahead of the journal, resumed runs charge what they can't replay, changed settings add up."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus.accountants import PRVAccountant
from running import ENVIRONMENT, LAUNCHER, ROOT, call, files, lines, needs_full_device, private_images, refusal, small, stop_at_first_log, train_main
from test_privacy_rules import ledger_of
from test_resume import FIXED, TEN

from dpsyngen.errors import InputError
from dpsyngen.privacy.__main__ import main as privacy_main
from dpsyngen.privacy.accounting import gaussian_mu
from dpsyngen.privacy.journal import MEANS, fingerprint
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.randomness import PrivateKey
from dpsyngen.privacy.spent import spent
from dpsyngen.run_directory import PRIVACY_SETTINGS, RunDirectory
from dpsyngen.summary import summary

pytestmark = needs_full_device
CHANGED = "--resume-with-changed-privacy"


def report_of(run: Path) -> dict:
    return json.loads((run / "privacy.json").read_text())


def attempts(run: Path) -> list[dict]:
    return [line for line in lines(run / "private/journal.jsonl") if "fingerprint" in line]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return private_images(tmp_path_factory.mktemp("data") / "images.npz")


def interrupted_run(images: Path, run: Path, *flags: object, step: int = 8) -> Path:
    """Eight of ten steps begun, the checkpoint at the sixth."""
    stop_at_first_log(run)
    with pytest.raises(InputError, match="No space left on device"):
        call(train_main, *small(images, *TEN, *flags), f"--tracking.log_every={step}", "--run", run)
    (run / "metrics.jsonl").unlink()
    return run


@pytest.fixture(scope="module")
def interrupted(images, tmp_path_factory) -> Path:
    return interrupted_run(images, tmp_path_factory.mktemp("interrupted") / "run")


@pytest.fixture
def run(interrupted, tmp_path) -> Path:
    return shutil.copytree(interrupted, tmp_path / "run")


# privacy.json at every moment.


def test_privacy_json_covers_every_step_before_it_is_announced(tmp_path):
    """And metrics log what it said; a finished run's is exact, one cut short is no more than a twentieth of the plan ahead."""
    ledger = ledger_of(tmp_path, 0)
    assert (report_of(tmp_path)["epsilon"], report_of(tmp_path)["mechanisms"]) == (0, [])
    ledger.begin_class_means()
    assert [mechanism["name"] for mechanism in report_of(tmp_path)["mechanisms"]] == ["DP class means"]
    epsilons = [report_of(tmp_path)["epsilon"]]
    for step in range(10):
        ledger.journal.begin(step)
        report, found = report_of(tmp_path), spent(RunDirectory(tmp_path))
        assert report["steps_begun_at_most"] == found["steps_begun"] == step + 1  # of ten steps each is a point
        assert report["epsilon"] == found["epsilon"] == ledger.epsilon_at(step + 1) > epsilons[-1]
        assert report["at_the_end"] == {"steps_begun": 10, "epsilon": pytest.approx(ledger.plan.epsilon_after(10))}
        epsilons.append(report["epsilon"])
    ledger.close()
    assert report_of(tmp_path)["epsilon"] == epsilons[-1] <= 5 and "at_the_end" not in report_of(tmp_path)


def test_a_crash_between_privacy_json_and_the_journal_understates_nothing(tmp_path):
    ledger = ledger_of(tmp_path, 0)
    (tmp_path / ".privacy.json.partial").mkdir()
    with pytest.raises(InputError, match=r"privacy\.json"):
        ledger.begin_class_means()
    (tmp_path / ".privacy.json.partial").rmdir()
    assert not ledger.journal.has_begun(MEANS) and len((tmp_path / "private/journal.jsonl").read_text().splitlines()) == 1
    ledger = ledger_of(tmp_path, 0)
    (tmp_path / "private/journal.jsonl").unlink()
    (tmp_path / "private/journal.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"journal\.jsonl"):
        ledger.begin_class_means()
    assert report_of(tmp_path)["mechanisms"][0]["releases"] == 1


def test_a_long_run_writes_at_twenty_points_and_is_covered_between(tmp_path):
    ledger, written = ledger_of(tmp_path, 0, steps=105, hints="none"), set()
    for step in range(105):
        ledger.journal.begin(step)
        steps = report_of(tmp_path)["steps_begun_at_most"]
        assert step < steps < step + 1 + 105 // 20
        written.add(steps)
    assert written == {*range(5, 106, 5)}


def test_auditors_see_what_an_interrupted_run_has_spent(run, capsys):
    plan = PrivacyPlan.from_record(attempts(run)[0]["plan"], ())
    with (run / "private/journal.jsonl").open("a") as journal:
        journal.write('{"attempt": 0, "st')  # is being written
    before = files(run)
    call(privacy_main, "--run", run, "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["steps_begun"], found["epsilon"]) == (8, plan.epsilon_after(8))
    assert found["stated"] == {"status": "unfinished", "epsilon": plan.epsilon_after(8), "steps_begun_at_most": 8}
    call(privacy_main, "--run", run)
    assert re.search(r"8 private steps in 1 attempts\n  DP-SGD: steps 8, .*\nspent: epsilon = .*\nprivacy.json \(unfinished\) says at most",
                     capsys.readouterr().out)  # fmt: skip
    assert "(at most this so far; the whole run will have spent 9.99" in summary(run)
    assert files(run) == before


@pytest.mark.parametrize(("change", "complaint"), [({"epsilon": 3.0}, "states epsilon = 3.0 for 8 "), ({"steps_begun_at_most": 7}, "for 7 private")])
def test_auditors_see_what_privacy_json_leaves_out(run, change, complaint, monkeypatch, capsys):
    (run / "privacy.json").write_text(json.dumps(report_of(run) | change))
    assert complaint in refusal(privacy_main, monkeypatch, capsys, "--run", run)


def test_auditors_need_a_journal_and_no_config(run, monkeypatch, capsys):
    assert "expected no config beside it" in refusal(privacy_main, monkeypatch, capsys, "--run", run, "--privacy.epsilon=1")
    (run / "private/journal.jsonl").write_text('{"attempt": 0, "fingerprint": "f", "weights": "w", "plan": null}\n{"attempt": 0, "step": 0}\n')
    assert "expected the plan of each attempt" in refusal(privacy_main, monkeypatch, capsys, "--run", run)
    (run / "private/journal.jsonl").unlink()
    assert "there is no such file" in refusal(privacy_main, monkeypatch, capsys, "--run", run)


# What lies where, and who may read it.


def mentions(run: Path, secret: bytes) -> list[str]:
    spellings = [secret, secret.hex().encode(), base64.b64encode(secret)]
    return [name for name, (content, _) in files(run).items() if any(spelling in content for spelling in spellings)]


def modes(run: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mode & 0o777 for file in (run / "private").iterdir()}


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_what_would_undo_the_noise_is_apart_and_closed_to_others(umask, images, tmp_path):
    before = os.umask(umask)
    try:
        run = interrupted_run(images, tmp_path / "run", "--compute.checkpoint_every=1")
        secret = PrivateKey.load(run / "private/key").secret
        assert (run / "private").stat().st_mode & 0o777 == 0o700
        assert modes(run).keys() >= {"key", "journal.jsonl", "lock"} and set(modes(run).values()) == {0o600}
        assert mentions(run, secret) == ["private/key"]
        (run / "private").chmod(0o755)
        for name in ("key", "journal.jsonl"):
            (run / "private" / name).chmod(0o644)  # as after cp -r
        call(train_main, *small(images, *TEN), "--run", run)
    finally:
        os.umask(before)
    assert (run / "private").stat().st_mode & 0o777 == 0o700
    assert modes(run).keys() == {"journal.jsonl", "timings.jsonl", "lock"} and set(modes(run).values()) == {0o600}
    assert mentions(run, secret) == []
    state = json.loads((max((run / "checkpoints").iterdir()) / "state.json").read_text())["state"]
    assert state.keys() == {"phase", "step", "has_class_means", "attempt", "metrics_size"}  # and tensors that are functions of noisy gradients


# Rule 9: what is replayed free, and what is charged.


def resumed(run: Path, images: Path, *flags: object) -> tuple[int, int, int]:
    """Attempts, steps begun, and the last step that is part of the weights, once the run has ended."""
    call(train_main, *small(images, *TEN), *flags, "--run", run)
    return outcome(run)


def outcome(run: Path) -> tuple[int, int, int]:
    report = report_of(run)
    assert report["status"] == "finished" and report["epsilon"] <= report["target_epsilon"] == 10
    assert report["epsilon"] == pytest.approx(spent(RunDirectory(run))["epsilon"]) and len({str(line["plan"]) for line in attempts(run)}) == 1
    return len(attempts(run)), report["steps_begun"], json.loads((max((run / "checkpoints").iterdir()) / "state.json").read_text())["state"]["step"]


FREE, CHARGED = (1, 10, 10), (2, 10, 8)


def test_the_same_computation_is_replayed_free(run, images, tmp_path):
    """Wherever the images lie now, and with other settings of what doesn't touch a private step, which the config then has."""
    moved = Path(shutil.copy(images, tmp_path / "moved.npz"))
    flags = ["--compute.device=auto", "--compute.checkpoint_every=7", "--compute.checkpoints_kept=1", "--tracking.log_every=3", "--sampling.steps=5",
             "--sampling.sigma_max=40"]  # fmt: skip
    assert resumed(run, moved, *flags) == FREE
    config = (run / "config.yaml").read_text()
    assert all(text in config for text in ("moved.npz", "checkpoint_every: 7", "log_every: 3"))


def test_other_data_is_charged(run, images, tmp_path):
    with np.load(images) as archive:
        pixels, labels = archive["images"], archive["labels"]
    pixels[17, 3, 5, 0] ^= 1
    np.savez(tmp_path / "images.npz", images=pixels, labels=labels)
    assert resumed(run, tmp_path / "images.npz") == CHARGED


@pytest.mark.parametrize("flag", ["--compute.chunks_at_once=2", "--compute.chunk_size=16", "--compute.precision=bf16"])
def test_another_config_is_charged(run, images, flag):
    assert resumed(run, images, flag) == CHARGED


def test_other_ends_of_uniform_draws_are_charged(images, tmp_path):
    """They are those of sampling, which may change on resume: with lognormal draws nothing depends on them, with uniform ones sigma does."""
    flags, ends = ["--private.sigma_draw=uniform"], "--sampling.sigma_max=40"
    uniform = interrupted_run(images, tmp_path / "uniform", *flags)
    assert resumed(shutil.copytree(uniform, tmp_path / "same"), images, *flags) == FREE
    assert resumed(uniform, images, *flags, ends) == CHARGED


def test_other_code_is_charged(run, images, tmp_path):
    """From a copy of the code, which is the same computation, until a file of it gets one more comment."""
    copy, again = tmp_path / "copy", shutil.copytree(run, tmp_path / "again")
    for name in ("dpsyngen", "synthetic_generators"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", copy)
    arguments = [*map(str, small(images, *TEN)), "--run"]
    both = f"""
import train
train.main({[*arguments, str(again)]!r})
with open("dpsyngen/privacy/price.py", "a") as code:
    code.write("# one more comment")
train.main({[*arguments, str(run)]!r})
"""
    subprocess.run([sys.executable, "-c", both], check=True, cwd=copy, env=ENVIRONMENT | {"PYTHONPATH": str(copy)})
    assert (outcome(again), outcome(run)) == (FREE, CHARGED)


def test_another_number_of_processes_is_charged(run, images):
    assert fingerprint("d", "c", torch.device("cpu"), 1) != fingerprint("d", "c", torch.device("cpu"), 2)
    command = [sys.executable, *LAUNCHER, ROOT / "train.py", *small(images, *TEN), "--run", run]
    subprocess.run([str(part) for part in command], check=True, env=ENVIRONMENT, capture_output=True)
    assert outcome(run) == CHARGED


def test_another_number_of_threads_is_charged(run, images):
    """As OMP_NUM_THREADS sets it: sums over other parts round otherwise. So the seventh step is begun again, and once more with one thread."""
    torch.set_num_threads(2)
    try:
        interrupted_run(images, run, step=1)
    finally:
        torch.set_num_threads(1)
    assert [line.get("step", "attempt") for line in lines(run / "private/journal.jsonl")][9:] == ["attempt", 6]
    assert resumed(run, images) == (3, 10, 7)


def test_another_device_kind_is_charged():
    kinds = [fingerprint("d", "c", torch.device(kind), 1) for kind in ("cpu", "mps")]
    assert kinds[0] != kinds[1]


def test_a_journal_of_an_older_version_goes_on_as_one_plan(run, images):
    """Its plan lacks what came later, and the code isn't the same: two steps in vain, and the run ends two steps earlier."""
    journal = run / "private/journal.jsonl"
    first, *rest = lines(journal)
    for name in ("clipping_stability", "covariance", "secure_noise"):
        del first["plan"][name]
    journal.write_text("".join(json.dumps(line) + "\n" for line in [first | {"fingerprint": "older"}, *rest]))
    call(train_main, *small(images, *TEN, "--tracking.log_every=8"), "--run", run)
    report = report_of(run)
    assert [(mechanism["name"], mechanism["steps"]) for mechanism in report["mechanisms"]] == [("DP-SGD", 10)]
    assert report["steps_begun"] == 10 and report["epsilon"] <= report["target_epsilon"] == 10
    assert [entry.get("step", "attempt") for entry in lines(journal)] == ["attempt", *range(8), "attempt", 6, 7]


# Other privacy settings.


@pytest.mark.parametrize("name", sorted({*PRIVACY_SETTINGS} - {"private.epochs"}))
def test_changed_privacy_settings_are_refused_unless_asked_for(name, run, images, monkeypatch, capsys):
    values = {"privacy.epsilon": 12, "privacy.delta": 1e-4, "privacy.clipping_norm": 2, "hints.share": 0.2, "data.expected_size": 201}
    before = files(run)
    flag = f"--{name}={values.get(name, 11)}"
    said = refusal(train_main, monkeypatch, capsys, *small(images, *TEN, flag, "--tracking.log_every=8"), "--run", run)
    assert re.search(rf"another config \({name} .*\); expected the same config, {CHANGED}, or a new --run", said)
    assert files(run) == before


def test_another_counted_size_is_another_sampling_rate(images, tmp_path, monkeypatch, capsys):
    """The config is the same, text for text; the plan isn't."""
    counted = Path(shutil.copy(images, tmp_path / "images.npz"))
    run = interrupted_run(counted, tmp_path / "run", "--data.expected_size=null", "--private.batch_size=100")
    private_images(counted, count=199)
    arguments = [*small(counted, *TEN, "--data.expected_size=null", "--private.batch_size=100"), "--run", run]
    said = refusal(train_main, monkeypatch, capsys, *arguments)
    assert said == f"{run}: was begun with another data.expected_size (200, not 199); expected the same, or {CHANGED}"
    call(train_main, *arguments, CHANGED)
    rates = [(mechanism["sampling_rate"], mechanism["steps"]) for mechanism in report_of(run)["mechanisms"]]
    assert rates == [(0.5, 8), (100 / 199, 4)]


def test_changed_settings_add_up(run, images, monkeypatch, capsys):
    """Eight steps of the old plan were begun, six are in the weights, the new plan has eight to do, with half the images a step."""
    old = attempts(run)[0]["plan"]
    target = ["--privacy.epsilon=12", "--privacy.delta=1e-4", "--private.batch_size=100", "--private.steps=14", "--privacy.clipping_norm=2"]
    call(train_main, *small(images, *TEN, *target), CHANGED, "--run", run)
    report = report_of(run)
    first, second = report["mechanisms"]
    assert (first["steps"], first["noise_multiplier"], first["sampling_rate"], first["clipping_norm"]) == (8, old["noise_multiplier"], 1.0, 1.0)
    assert (second["steps"], second["sampling_rate"], second["clipping_norm"], report["steps_begun"]) == (8, 0.5, 2.0, 16)
    assert 0.995 * 12 <= report["epsilon"] <= report["target_epsilon"] == 12 and report["delta"] == 1e-4
    accountant = PRVAccountant()
    accountant.history = [(each["noise_multiplier"], each["sampling_rate"], each["steps"]) for each in (first, second)]
    with np.errstate(divide="ignore"):
        assert report["epsilon"] == pytest.approx(accountant.get_epsilon(1e-4, eps_error=0.02, delta_error=1e-7), rel=0.01)
    assert any("settings were changed during the run" in caveat for caveat in report["caveats"])
    assert spent(RunDirectory(run))["epsilon"] == pytest.approx(report["epsilon"])
    assert "epsilon: 12" in (run / "config.yaml").read_text()
    capsys.readouterr()
    said = refusal(train_main, monkeypatch, capsys, *small(images, *TEN), CHANGED, "--run", run)
    assert "holds a run with another config" in said and CHANGED not in said  # it is finished


def test_full_batches_add_up_as_the_closed_form_says(run, images):
    call(train_main, *small(images, *TEN, "--privacy.epsilon=11"), CHANGED, "--run", run)
    mu = sum(each["steps"] / each["noise_multiplier"] ** 2 for each in report_of(run)["mechanisms"]) ** 0.5
    assert gaussian_mu(report_of(run)["epsilon"], 1e-5) == pytest.approx(mu, rel=5e-3)
    assert report_of(run)["epsilon"] <= 11


@pytest.mark.parametrize(("flag", "complaint"), [
    ("--privacy.epsilon=5", r"privacy\.epsilon: expected more than the 8\.\d+ that was spent before at delta = 1e-05, got 5"),
    ("--private.steps=5", r"private\.steps: expected at least the 6 that are part of the weights already, got 5"),
])  # fmt: skip
def test_what_the_new_settings_have_no_room_for_is_refused(flag, complaint, run, images, monkeypatch, capsys):
    before = files(run)
    assert re.fullmatch(complaint, refusal(train_main, monkeypatch, capsys, *small(images, *TEN, flag), CHANGED, "--run", run))
    assert files(run) == before


def test_a_changed_run_is_interrupted_and_goes_on_to_the_same_bytes(images, tmp_path, monkeypatch, capsys):
    """Without the flag from then on; class means that are part of the weights are paid for once."""
    hints = [*TEN, "--hints.kind=class_means", FIXED]
    one = interrupted_run(images, tmp_path / "one", "--hints.kind=class_means", FIXED)
    two = shutil.copytree(one, tmp_path / "two")
    target = ["--privacy.epsilon=12", "--private.steps=16"]
    (one / "metrics.jsonl").symlink_to("/dev/full")
    arguments = small(images, *hints, *target, "--tracking.log_every=14")
    assert "No space left" in refusal(train_main, monkeypatch, capsys, *arguments, CHANGED, "--run", one)
    (one / "metrics.jsonl").unlink()
    assert report_of(one)["steps_begun_at_most"] == 8 + 8
    call(train_main, *arguments, "--run", one)
    call(train_main, *arguments, CHANGED, "--run", two)
    found = [{name: content for name, (content, _) in files(each).items() if "timings" not in name} for each in (one, two)]
    assert found[0] == found[1]
    names = [(mechanism["name"], mechanism.get("steps", mechanism.get("releases"))) for mechanism in report_of(one)["mechanisms"]]
    assert names == [("DP class means", 1), ("DP-SGD", 8), ("DP-SGD", 10)]
