"""Whatever a user may get wrong ends in one line that names the field or the file, and exit status 2."""

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import TINY, WEIGHTS, call, evaluate_main, files, needs_full_device, private_images, refusal, sample_main, small, train_main
from safetensors.torch import load_file, save_file
from torch import nn

from dpsyngen.cli import read_config
from dpsyngen.denoiser import build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.evaluation import features, inception
from dpsyngen.networks.safety import refuse_mixing

IMAGES = np.zeros((30, 8, 8, 1), dtype=np.uint8)
LABELS = np.arange(30) % 3


def written(path: Path, content: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def picture(path: Path, array: np.ndarray = IMAGES[0, :, :, 0]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def folder(place: Path, *classes: str, **flags: object) -> list[object]:
    """Arguments for a folder with one good image in each of the classes."""
    root = place / "pictures"
    root.mkdir()
    for name in classes:
        picture(root / name / "good.png")
    settings = {"source": "folder", "path": root, "num_classes": len(classes), "expected_size": 200} | flags
    return ["--config", TINY, "--data.image_size=8", *(f"--data.{name}={value}" for name, value in settings.items())]


def npz(place: Path, **arrays: object) -> list[object]:
    return small(private_images(place / "images.npz", **arrays))


def good(place: Path) -> list[object]:
    return [*npz(place), "--stages.variant=nonprivate"]


def cut(path: Path) -> Path:
    return written(path, path.read_bytes()[: path.stat().st_size // 2])


def truncated_picture(place: Path) -> list[object]:
    arguments = folder(place, "a", "b")
    picture(place / "pictures/a/cut.png", np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    cut(place / "pictures/a/cut.png")
    return arguments


def with_file(name: str, content: bytes | np.ndarray) -> Callable[[Path], list[object]]:
    def arguments(place: Path) -> list[object]:
        flags = folder(place, "a", "b")
        picture(place / "pictures/a" / name, content) if isinstance(content, np.ndarray) else written(place / "pictures/a" / name, content)
        return flags

    return arguments


DATA: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "no path": (lambda place: ["--config", TINY, "--data.source=npz"], "data.path: expected a path, since data.source is npz"),
    "no such folder": (lambda place: folder(place, "a", path=place / "gone"), "data.path: expected a folder of images, got .*gone"),
    "empty folder": (folder, r"data.path: expected images \(.*\.png.*\) in .*pictures, found none"),
    "no subfolders": (lambda place: folder(place, num_classes=2), "data.num_classes: expected 0, the number of subfolders"),
    "class without folder": (lambda place: folder(place, "a", class_names="[b]"), "data.path: expected a subfolder 'b'"),
    "truncated image": (truncated_picture, r".*pictures/a/cut\.png: expected a readable image"),
    "text called .png": (with_file("text.png", b"text"), r".*pictures/a/text\.png: expected a readable image"),
    "empty image": (with_file("empty.jpg", b""), r".*pictures/a/empty\.jpg: expected a readable image"),
    "16-bit image": (with_file("deep.png", np.zeros((8, 8), np.uint16)), r".*pictures/a/deep\.png: expected .*at most 8 bits a channel"),
    "no such file": (lambda place: small(place / "gone.npz"), r".*gone\.npz: expected a readable \.npz file .*No such file"),
    "folder as npz": (small, ".*: expected a readable .npz file"),
    "damaged npz": (lambda place: small(cut(private_images(place / "images.npz"))), r".*images\.npz: expected a readable \.npz file"),
    "text as npz": (lambda place: small(written(place / "a.npz", "text")), r".*a\.npz: expected a readable \.npz file"),
    "objects in npz": (lambda place: npz(place, images=np.array([{}, None])), r".*images\.npz: expected a readable \.npz file of plain arrays"),
    "other keys": (lambda place: npz(place, images=None, pictures=IMAGES), "data.path: expected an .npz file with images or train_images"),
    "no labels": (lambda place: npz(place, labels=None), r".*images\.npz: images, labels: expected labels, since data.num_classes is 3"),
    "float images": (lambda place: npz(place, images=IMAGES / 2), r".*images\.npz: .*expected images uint8 .* got float64"),
    "two channels": (lambda place: npz(place, images=np.repeat(IMAGES, 2, axis=3)), r".*images\.npz: .*got uint8 \[30, 8, 8, 2\]"),
    "no images": (lambda place: npz(place, images=IMAGES[:0], labels=LABELS[:0]), r".*images\.npz: .*expected at least one image"),
    "labels too large": (lambda place: npz(place, images=IMAGES, labels=LABELS + 1), r".*images\.npz: .*expected labels from 0 to 2"),
    "labels too few": (lambda place: npz(place, images=IMAGES, labels=LABELS[1:]), r".*images\.npz: .*one integer per image"),
    "float labels": (lambda place: npz(place, images=IMAGES, labels=LABELS / 1), r".*images\.npz: .*one integer per image, got float64"),
    "all held out": (lambda place: [*npz(place), "--data.held_out=200"], "data.held_out: expected fewer than there are training images"),
    "classes of mnist": (lambda place: ["--config", TINY, "--data.num_classes=3"], "data.num_classes: expected 10, or 0 to ignore"),
    "path of mnist": (lambda place: ["--config", TINY, "--data.path=x"], "data.path: expected null, since data.source mnist is embedded"),
}

SETTINGS: dict[str, tuple[list[object], str]] = {
    "no such config": (["--config", "gone.yaml"], r"gone\.yaml: expected a YAML file, but: No such file"),
    "config is a folder": (["--config", "/"], "/: expected a YAML file, but: Is a directory"),
    "epsilon 0": (["--privacy.epsilon=0"], r"--privacy.epsilon: expected a number in \[0.001, 100\], got 0.0"),
    "epsilon infinite": (["--privacy.epsilon=.inf"], r"--privacy.epsilon: expected a number in \[0.001, 100\], got inf"),
    "delta 1": (["--privacy.delta=1"], r"--privacy.delta: expected a number in \(0, 1\), got 1.0"),
    "rate above 1": (["--private.batch_size=201"], "--private.batch_size: expected at most data.expected_size = 200, since q = .*, got 201"),
    "counted rate above 1": (["--data.expected_size=null", "--private.batch_size=201"], "private.batch_size: expected at most the 200 images"),
    "epochs of an unknown size": (["--data.expected_size=null", "--synthetic.epochs=1"], "synthetic.epochs: expected synthetic.steps instead"),
    "infinite epochs": (["--private.epochs=.inf"], "--private.epochs: expected a finite number >= 0, got inf"),
    "thresholds crossed": (["--stages.tau1=3"], "--stages.tau1: expected a finite number below stages.tau2 = 2.0, got 3.0"),
    "threshold infinite": (["--stages.tau2=.inf"], "--stages.tau2: expected a finite number, got inf"),
    "routed refinement": (["--stages.holder=routed"], "--stages.holder: expected shared, since stages.variant finetune_all"),
    "odd image size": (["--data.image_size=30"], "--data.image_size: expected a multiple of 4, at least 8, got 30"),
    "guidance not learnt": (["--sampling.guidance=2", "--network.label_dropout=0"], "--sampling.guidance: expected 1, since network.label_drop"),
    "guidance away": (["--sampling.teacher_guidance=-1"], "--sampling.teacher_guidance: expected a number >= 0, got -1.0"),
    "no temperature": (["--sampling.teacher_temperature=0"], "--sampling.teacher_temperature: expected a number > 0, got 0.0"),
    "guidance nowhere": (["--sampling.teacher_range=[1, 0]"], r"--sampling.teacher_range: expected two numbers, the first below the second, got \("),
    "unknown family": (["--synthetic.family=dead_leafs"], "synthetic.family: unknown generator 'dead_leafs': did you mean 'dead_leaves'"),
    "unknown option": (["--synthetic.options={radius: 1}"], "synthetic.options: unknown option 'radius' of dead_leaves"),
    "bad option": (["--synthetic.family=salt_and_pepper", "--synthetic.options.density=2"], "synthetic.options: option density: expected a num"),
    "no such GPU": (["--compute.device=cuda:99"], "compute.device: expected a device of this machine, got 'cuda:99', and there are"),
    "no such device": (["--compute.device=tpu"], "--compute.device: expected auto, cpu, cuda, cuda:N or mps, got 'tpu'"),
    "short key": (["--privacy.unsafe_fixed_key=abc"], "--privacy.unsafe_fixed_key: expected 64 hexadecimal digits or null"),
    "dry run of an unknown size": (["--dry-run", "--data.expected_size=null"], "data.expected_size: expected a number for --dry-run"),
    "dry run of an unknown family": (["--dry-run", "--synthetic.family=x"], "synthetic.family: unknown generator 'x'"),
    "no such field": (["--privacy.epsilom=1"], "--privacy.epsilom: expected the name of a field, .*did you mean privacy.epsilon"),
    "name of a file": (["train.yaml"], "train.yaml: expected a flag such as --privacy.epsilon 1"),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data_is_refused_before_anything_is_written(case, tmp_path, monkeypatch, capsys):
    arguments, expected = DATA[case]
    said = refusal(train_main, monkeypatch, capsys, *arguments(tmp_path), "--run", tmp_path / "run", "--stages.variant=nonprivate")
    assert re.match(expected, said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", SETTINGS)
def test_bad_settings_are_refused_before_anything_is_written(case, tmp_path, monkeypatch, capsys):
    flags, expected = SETTINGS[case]
    said = refusal(train_main, monkeypatch, capsys, *npz(tmp_path), *flags, "--run", tmp_path / "run")
    assert re.match(expected, said), said
    assert not (tmp_path / "run").exists()


def test_places_that_hold_no_run_are_refused(tmp_path, monkeypatch, capsys):
    file = written(tmp_path / "file", "mine")
    for place in (file, file / "run", "/proc/run", tmp_path / ("x" * 300)):
        assert str(place) in refusal(train_main, monkeypatch, capsys, *good(tmp_path), "--run", place)
    for name, content in (("config.yaml", b"\xff\xfe"), ("config.yaml", b"[1]"), ("privacy.json", b"{"), ("privacy.json", b"[]")):
        run = tmp_path / "run"
        written(run / name, content)
        assert refusal(train_main, monkeypatch, capsys, *good(tmp_path), "--run", run).startswith(f"{run / name}: ")
        shutil.rmtree(run)
    assert file.read_text() == "mine"


@needs_full_device
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "privacy.json"])
def test_a_full_disk_is_named_and_leaves_nothing_half_written(name, tmp_path, monkeypatch, capsys):
    """The file, or the one beside it that is written first, is a device that is always full."""
    file = tmp_path / "run" / name
    partial = file if name == "metrics.jsonl" else file.with_name(f".{file.name}.partial")
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    said = refusal(train_main, monkeypatch, capsys, *good(tmp_path), "--run", tmp_path / "run")
    assert said == f"{file}: expected a place that can be written (No space left on device)"
    partial.unlink(missing_ok=True)
    assert not file.exists()
    assert not list((tmp_path / "run").rglob("*.partial"))
    call(train_main, *good(tmp_path), "--run", tmp_path / "run")  # once there is space again


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "model"])
def test_a_place_that_is_taken_is_named(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    taken = tmp_path / "run" / name
    taken.mkdir() if name == "metrics.jsonl" else taken.touch()
    assert refusal(train_main, monkeypatch, capsys, *good(tmp_path), "--run", tmp_path / "run").startswith(str(taken))


def test_a_network_that_mixes_examples_is_refused():
    config = read_config([TINY])
    denoiser = build_denoiser(config)
    name, layer = next((name, layer) for name, layer in denoiser.named_modules() if isinstance(layer, nn.GroupNorm))
    denoiser.set_submodule(name, nn.BatchNorm2d(layer.num_channels))
    with pytest.raises(InputError, match=rf"network: layer '{name}' \(BatchNorm2d\) mixes the examples"):
        refuse_mixing(denoiser, config.data.image_shape)


# After training


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run without samples; tests work on copies of it."""
    place = tmp_path_factory.mktemp("finished")
    call(train_main, *good(place), "--run", place / "run")
    return place / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_sampling_needs_a_finished_run(run, tmp_path, monkeypatch, capsys):
    sample = functools.partial(refusal, sample_main, monkeypatch, capsys)
    assert re.match(".*nowhere: is not a run directory", sample("--run", tmp_path / "nowhere"))
    assert "--run" in sample()
    (run / "privacy.json").unlink()
    assert re.match(".*run: training is not finished; run train.py", sample("--run", run))


@pytest.mark.parametrize("damage", ["cut", "text", "gone", "others"])
def test_damaged_weights_are_refused(damage, run, monkeypatch, capsys):
    file = run / WEIGHTS
    if damage == "others":
        (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("width: 8", "width: 16"))
    elif damage == "gone":
        file.unlink()
    else:
        cut(file) if damage == "cut" else written(file, "text")
    assert refusal(sample_main, monkeypatch, capsys, "--run", run).startswith(f"{file}: expected the weights of this run's network; ")
    assert not (run / "samples").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num-images", "0"], "--sampling.num_images: expected an integer >= 1, got 0"),
        (["--num-images", "many"], "--sampling.num_images: expected an integer, got 'many'"),
        (["--sampling.steps", "0"], "--sampling.steps: expected an integer >= 1"),
        (["--sampling.sigma_min", "100"], "--sampling.sigma_min: expected a number in"),
        (["--seed", "-1"], "--seed: expected an integer >= 0, got -1"),
        (["--network.width", "16"], "--network.width: expected a field of sampling or compute"),
        (["--compute.device", "cuda:99"], "compute.device: expected a device of this machine"),
        (["--out", "/proc/samples"], "/proc/samples: expected a place that can be written"),
        (["--out", "/dev/null"], "/dev/null: expected a place that can be written"),
    ],
)
def test_bad_sampling_settings_are_refused(flags, expected, run, monkeypatch, capsys):
    assert refusal(sample_main, monkeypatch, capsys, "--run", run, *flags).startswith(expected)
    assert not (run / "samples").exists()


def test_evaluation_needs_sound_samples_and_real_images(run, tmp_path, monkeypatch, capsys):
    evaluate = functools.partial(refusal, evaluate_main, monkeypatch, capsys, "--run", run)
    assert re.match(r".*samples/images\.npz: .*run sample\.py first$", evaluate())
    call(sample_main, "--run", run, "--num-images", "30")
    capsys.readouterr()
    assert evaluate().startswith("data.test_path: expected real images to evaluate against, got null")
    real = ["--data.test_path", private_images(tmp_path / "real.npz", seed=1)]
    assert evaluate("--data.test_path", tmp_path / "gone.npz").startswith(f"{tmp_path / 'gone.npz'}: expected a readable .npz file")
    assert "data.held_out: expected an integer > 0" in evaluate("--evaluation.reference", "held_out")
    assert evaluate(*real, "--compute.device", "cuda:99").startswith("compute.device: ")
    monkeypatch.setattr(features, "find_weights", functools.partial(inception.find_weights, "http://127.0.0.1:9/weights", (tmp_path,)))
    assert re.match("evaluation.features: inception can't be had: .*choose classifier or none", evaluate(*real, "--evaluation.features", "inception"))
    cut(run / "samples/images.npz")
    assert re.match(r".*samples/images\.npz: expected an \.npz file", evaluate(*real))
    np.savez(run / "samples/images.npz", images=np.zeros((30, 28, 28, 1), np.uint8), labels=LABELS)
    assert evaluate(*real).startswith("synthetic images: expected uint8 [N, 8, 8, 1] like the real ones")
    assert not {"evaluation.json", "evaluation.png"} & files(run).keys()


def test_images_that_are_not_finite_are_refused(run, monkeypatch, capsys):
    file = run / WEIGHTS
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}, file)
    assert refusal(sample_main, monkeypatch, capsys, "--run", run).startswith("the model's images are not finite")
