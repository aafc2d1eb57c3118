"""The scripts from end to end: every variant trains, samples are drawn and measured, and nothing private leaves."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from running import (
    KEY,
    ROOT,
    TINY,
    WEIGHTS,
    call,
    files,
    launch,
    launch_together,
    lines,
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

from dpsyngen.saved_model import FILES

NAMES = {"config.yaml", "privacy.json", "metrics.jsonl", "checkpoints", "model", "previews", "private"}


# Each variant by its own config, and what else a run may be made of, spread over them.
CASES = {
    "dpdm": [],
    "coarse": ["--stages.holder=routed", "--data.channels=3"],
    "cleaning": ["--data.num_classes=0", "--stages.holder=routed"],
    "coarse_cleaning": ["--network.parameterisation=v", "--stages.holder=routed"],
    "finetune": ["--synthetic.family=salt_and_pepper", "--network.backbone=unet"],
    "finetune_context": ["--stages.replay=0.5", "--private.sigma_draw=uniform"],
    "finetune_all": ["--data.expected_size=null", "--network.label_dropout=0", "--compute.precision=bf16"],
    "dp_syngen": ["--data.channels=3", "--data.num_classes=0", "--network.parameterisation=v"],
    "nonprivate": ["--hints.kind=class_means"],
}


@pytest.mark.parametrize("variant", CASES)
def test_every_variant_trains_and_writes_its_files(variant, tmp_path, capsys):
    run, channels = tmp_path / "run", 3 if "--data.channels=3" in CASES[variant] else 1
    images = private_images(tmp_path / "images.npz", channels=channels)
    call(train_main, *small(images, *CASES[variant], "--run", run, config=ROOT / f"configs/mnist/{variant}.yaml"))
    assert "training is finished" in capsys.readouterr().out

    assert {path.name for path in run.iterdir()} == NAMES
    assert set(files(run / "model")) == set(FILES)
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert {path.name for path in (run / "private").iterdir()} == {"journal.jsonl", "timings.jsonl", "lock"}  # and no key
    assert (run / "private").stat().st_mode & 0o777 == 0o700
    assert (run / "private" / "journal.jsonl").stat().st_mode & 0o777 == 0o600
    assert all(tensor.isfinite().all() for tensor in load_file(run / WEIGHTS).values())

    phases = [line["phase"] for line in lines(run / "metrics.jsonl")]
    assert phases == ["synthetic"] * 3 * (variant not in ("dpdm", "nonprivate")) + ["private"] * 3
    report = json.loads((run / "privacy.json").read_text())
    assert report["status"] == "finished"
    if variant == "nonprivate":
        assert report["epsilon"] is None and "without any protection" in report["guarantee"]
    else:
        assert 9.9 < report["epsilon"] <= report["target_epsilon"] == 10
        assert report["steps_begun"] == 3
        assert [mechanism["name"] for mechanism in report["mechanisms"]] == ["DP class means"] * (variant == "dp_syngen") + ["DP-SGD"]

    call(sample_main, "--run", run, "--num-images", "7")
    with np.load(run / "samples" / "images.npz") as drawn:
        assert drawn["images"].shape == (7, 8, 8, channels)


def test_mnist_is_trained_on_sampled_and_evaluated(tmp_path):
    run = tmp_path / "run"
    thousand = ["--data.held_out=59000", "--data.expected_size=1000", "--private.batch_size=500"]  # large rates are quick to account for
    trained = launch("train", "--config", ROOT / "configs/mnist/dp_syngen.yaml", "--config", TINY, *thousand, "--run", run)
    assert (trained.returncode, trained.stderr) == (0, "")
    assert trained.stdout == f"{run}: training is finished; next: python sample.py --run {run}\n"
    sampled = launch("sample", "--run", run, "--num-images", "25", "--sampling.guidance", "2")
    assert (sampled.returncode, sampled.stderr) == (0, "")
    evaluated = launch("evaluate", "--run", run)
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    assert "CAS, logistic regression" in evaluated.stdout

    report = json.loads((run / "privacy.json").read_text())
    assert 9.9 < report["epsilon"] <= 10
    assert (report["unit"], report["delta"]) == ("one image", 1e-5)
    with np.load(run / "samples" / "images.npz") as drawn:
        assert (drawn["images"].shape, drawn["images"].dtype) == ((25, 28, 28, 1), np.uint8)
        assert (drawn["labels"].shape, drawn["labels"].dtype) == ((25,), np.int64)
        assert set(np.bincount(drawn["labels"], minlength=10)) == {2, 3}
    record = json.loads((run / "evaluation.json").read_text())
    assert record["reference_images"] == 10_000
    assert 0 <= record["metrics"]["cas_logistic_regression"]["value"] <= 1
    for name in ("samples/grid.png", "samples/provenance.json", "evaluation.png"):
        assert (run / name).stat().st_size > 0


@needs_full_device
def test_two_processes_train_the_same_weights(tmp_path):
    """On a CPU by gloo, interrupted and resumed: the noise is added once, the batch is one, and only the order of sums differs."""
    flags = ["--privacy.unsafe_fixed_key", KEY, "--tracking.log_every=3", "--compute.checkpoint_every=1"]
    arguments = small(private_images(tmp_path / "images.npz"), *flags)
    both = ["train.py", *arguments, "--run", tmp_path / "two"]
    stop_at_first_log(tmp_path / "two")
    stopped = launch_together(2, *both)
    assert stopped.returncode != 0
    assert stopped.stderr.count("train.py: ") == stopped.stderr.count("metrics.jsonl: expected a place that can be written") == 1
    (tmp_path / "two/metrics.jsonl").unlink()
    resumed = launch_together(2, *both)
    assert (resumed.returncode, resumed.stdout.count("training is finished"), "skipped" in resumed.stderr) == (0, 1, False), resumed.stderr

    call(train_main, *arguments, "--run", tmp_path / "one")
    one, two = (load_file(tmp_path / run / WEIGHTS) for run in ("one", "two"))
    flat_one, flat_two = (torch.cat([tensors[name].flatten() for name in sorted(one)]).double() for tensors in (one, two))
    assert (flat_one - flat_two).norm() <= 1e-5 * flat_one.norm()
    assert (tmp_path / "one/privacy.json").read_bytes() == (tmp_path / "two/privacy.json").read_bytes()
    for a, b in zip(lines(tmp_path / "one/metrics.jsonl"), lines(tmp_path / "two/metrics.jsonl"), strict=True):
        assert a.keys() == b.keys()
        assert all(value == pytest.approx(b[name], rel=1e-5) if isinstance(value, float) else value == b[name] for name, value in a.items())
    fingerprints = {lines(tmp_path / run / "private/journal.jsonl")[0]["fingerprint"] for run in ("one", "two")}
    assert len(fingerprints) == 2  # so a run that goes on with another number of processes doesn't count its steps as replays


def test_what_is_written_does_not_change_with_the_private_images(tmp_path):
    """Other images, other labels, one image fewer: every byte that may leave, but for the weights and the clock, is the same."""
    images, flags = tmp_path / "images.npz", ["--privacy.unsafe_fixed_key", KEY, "--tracking.log_every=2"]
    for number, count in enumerate((200, 199)):
        private_images(images, count=count, seed=number)
        call(train_main, *small(images, *flags), "--run", tmp_path / f"run{number}")
    one, two = (files(tmp_path / f"run{number}") for number in range(2))
    assert one.keys() == two.keys()
    for name in ("config.yaml", "privacy.json", "metrics.jsonl", "model/README.md", "model/model_index.json", "model/denoiser/config.json"):
        assert one[name][0] == two[name][0], name
    assert weights(tmp_path / "run0") != weights(tmp_path / "run1")
    private = [line for line in lines(tmp_path / "run0/metrics.jsonl") if line["phase"] == "private"]
    assert private == [{"phase": "private", "step": 2}, {"phase": "private", "step": 3}]  # and epsilon, where it is guaranteed
    report = json.loads((tmp_path / "run0/privacy.json").read_text())
    assert report["epsilon"] is None
    assert "NOTHING IS GUARANTEED" in report["randomness"]


def test_private_diagnostics_are_logged_on_request_and_reported(tmp_path):
    flags = ["--tracking.log_private_diagnostics_without_dp=true", "--stages.variant=dpdm"]
    call(train_main, *small(private_images(tmp_path / "images.npz"), *flags), "--run", tmp_path / "run")
    diagnostics = {f"{name}_without_dp" for name in ("loss", "gradient_norm", "clipped_fraction", "drawn_batch_size")}
    assert set(lines(tmp_path / "run/metrics.jsonl")[0]) == {"phase", "step", "epsilon"} | diagnostics
    assert any("diagnostics" in caveat for caveat in json.loads((tmp_path / "run/privacy.json").read_text())["caveats"])


@needs_full_device
def test_the_key_stays_in_its_file_and_is_destroyed(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    arguments = [*small(private_images(tmp_path / "images.npz"), "--stages.variant=dpdm"), "--run", run]
    stop_at_first_log(run)
    said = refusal(train_main, monkeypatch, capsys, *arguments)
    assert re.fullmatch(r".*run/metrics\.jsonl: expected a place that can be written \(No space left on device\)", said)
    assert (run / "private/key").stat().st_mode & 0o777 == 0o600
    secret = (run / "private/key").read_bytes().partition(b"\n")[2]
    assert len(secret) == 32
    spellings = [secret, secret.hex().encode(), base64.b64encode(secret)]

    def mentions() -> list[str]:
        return [name for name, (content, _) in files(run).items() if any(spelling in content for spelling in spellings)]

    (run / "metrics.jsonl").unlink()
    assert mentions() == ["private/key"]
    call(train_main, *arguments)
    assert mentions() == []
    assert [line | {"epsilon": 0} for line in lines(run / "metrics.jsonl")] == [{"phase": "private", "step": s, "epsilon": 0} for s in (1, 2, 3)]
    assert lines(run / "metrics.jsonl")[-1]["epsilon"] == json.loads((run / "privacy.json").read_text())["epsilon"]
    captured = capsys.readouterr()
    assert not any(spelling.decode(errors="replace") in said + captured.out + captured.err for spelling in spellings[1:])
