"""What leaves: model/ as a pipeline of diffusers, its card, and the release of a run, which holds these files and no others."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from running import ENVIRONMENT, KEY, TINY, WEIGHTS, call, files, private_images, refusal, sample_main, small, train_main
from safetensors.torch import load_file

from dpsyngen.cli import dump_config, load_run_config, read_config
from dpsyngen.denoiser import build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.evaluation.metrics import NOT_PRIVATE, PUBLIC
from dpsyngen.model_card import model_card
from dpsyngen.pipeline import DPSynGenPipeline
from dpsyngen.privacy.randomness import PrivateKey
from dpsyngen.release import main as release_main
from dpsyngen.saved_model import FILES, write_model

MODEL = {f"model/{name}" for name in FILES}
SAMPLES = {"samples/images.npz", "samples/grid.png", "samples/provenance.json"}
ALWAYS = {"config.yaml", "privacy.json", *MODEL}
NETWORKS = {
    "hinted": ["--sampling.s_churn=5", "--sampling.batch_size=4"],
    "unet in bf16": ["--network.backbone=unet", "--compute.precision=bf16", "--sampling.sampler=ddim"],
    "routed": ["--stages.variant=coarse_cleaning", "--stages.holder=routed", "--data.num_classes=0", "--network.parameterisation=v"],
}


def trained(place: Path, *flags: object) -> Path:
    """A finished run with eight samples, on images in a folder whose name is nobody's business."""
    (place / "ward-7").mkdir()
    images = private_images(place / "ward-7/patients.npz")
    call(train_main, *small(images, "--data.description=Scans of three kinds.", "--tracking.log_every=3", *flags), "--run", place / "run")
    call(sample_main, "--run", place / "run", "--num-images", "8")
    return place / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("finished"), *NETWORKS["hinted"])


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def loaded(directory: Path) -> DPSynGenPipeline:
    pipeline = DPSynGenPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def samples(directory: Path) -> np.ndarray:
    with np.load(directory / "images.npz") as archive:
        return archive["images"]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_pipeline_draws_what_the_script_draws(network, tmp_path, finished):
    run = finished if network == "hinted" else trained(tmp_path, *NETWORKS[network])
    pipeline = loaded(shutil.move(shutil.copytree(run, tmp_path / "copy") / "model", tmp_path / "elsewhere"))
    drawn = pipeline(num_images=8, seed=0, output_type="uint8").images
    assert len(np.unique(drawn)) > 10
    np.testing.assert_array_equal(drawn, samples(run / "samples"))
    if network == "hinted":
        flags = ["--num-images=5", "--seed=7", "--sampling.guidance=2", "--sampling.steps=4", "--out", tmp_path / "other"]
        call(sample_main, "--run", run, *flags)
        drawn = pipeline([0, 1, 2, 0, 1], seed=7, guidance_scale=2.0, num_inference_steps=4, output_type="uint8").images
        np.testing.assert_array_equal(drawn, samples(tmp_path / "other"))


def test_the_model_is_laid_out_as_diffusers_would(finished, tmp_path):
    """And holds the averaged weights under the denoiser's own names, and nothing else."""
    assert {f"model/{name}" for name in files(finished / "model")} == MODEL
    loaded(finished / "model").save_pretrained(tmp_path)
    ours, theirs = files(finished / "model"), files(tmp_path)
    assert theirs.keys() == ours.keys() - {"README.md"}
    for name in theirs.keys() - {"model_index.json"}:
        assert json.loads(theirs[name][0]).items() >= json.loads(ours[name][0]).items() if name.endswith("json") else theirs[name][0] == ours[name][0]
    names = build_denoiser(load_run_config(finished)).state_dict()
    tensors = load_file(finished / WEIGHTS)
    assert tensors.keys() == {f"denoiser.{name}" for name in names}
    newest = load_file(max((finished / "checkpoints").iterdir()) / "tensors.safetensors")
    assert all(torch.equal(tensors[f"denoiser.{name}"], newest[f"average.module.{name}"]) for name in names)


def test_a_pipeline_needs_diffusers_and_this_package_alone(finished, tmp_path):
    """Libraries that only training, accounting or evaluation use can't be imported, and neither the run nor its config is there."""
    shutil.copytree(finished / "model", tmp_path / "model")
    unneeded = ("opacus", "dp_accounting", "cleanfid", "sklearn", "matplotlib", "cryptography", "cattrs", "tyro", "rich", "torchvision")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({unneeded!r}))
import numpy
from dpsyngen.pipeline import DPSynGenPipeline
numpy.save("drawn.npy", DPSynGenPipeline.from_pretrained("model")(num_images=8, seed=0, output_type="uint8").images)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "drawn.npy"), samples(finished / "samples"))


def test_pipeline_arguments(finished):
    pipeline = loaded(finished / "model")
    state = torch.random.get_rng_state()
    picture = pipeline(2, seed=1).images
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [(image.mode, image.size) for image in picture] == [("L", (8, 8))]
    array, whole = (pipeline([2, 3], seed=1, output_type=kind, return_dict=False)[0] for kind in ("np", "uint8"))  # 3: no class
    assert (array.dtype, whole.shape) == (np.float32, (2, 8, 8, 1))
    np.testing.assert_array_equal(np.round(array * 255), whole)
    np.testing.assert_array_equal(np.asarray(picture[0]), whole[0, :, :, 0])
    first, second, again = (pipeline(1, 2, generator=g, output_type="uint8").images for g in [torch.Generator().manual_seed(3)] * 2 + [
        torch.Generator().manual_seed(3)])  # fmt: skip
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    for message, arguments in {
        "class_labels: expected integers from 0 to 3": {"class_labels": [4]},
        "class_labels: expected integers": {"class_labels": 0.5},
        "num_images: expected 2, ": {"class_labels": [0, 1], "num_images": 3},
        "num_images: expected an integer >= 1": {"num_images": 0},
        "seed: expected an integer >= 0": {"seed": -1},
        "seed: expected .* no generator": {"seed": 1, "generator": torch.Generator()},
        "sampling.steps: ": {"num_inference_steps": 0},
        "output_type: expected pil, np or uint8": {"output_type": "latent"},
    }.items():
        with pytest.raises(InputError, match=message):
            pipeline(**arguments)


def test_a_model_that_cannot_be_written_leaves_none(tmp_path):
    """The disk is full, as far as this process can tell, after the first kilobytes."""
    config = read_config([TINY])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    report = {"epsilon": None, "guarantee": "none", "caveats": []}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        with pytest.raises(InputError, match=r"model: expected a place that can be written .*File too large"):
            write_model(tmp_path / "model", config, build_denoiser(config), report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_the_card_says_what_privacy_json_says(finished):
    _, front, body = (finished / "model/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "diffusers"
    report = json.loads((finished / "privacy.json").read_text())
    shown = float(body.split("| epsilon | ")[1].split(" |")[0])
    assert 0 <= shown - report["epsilon"] <= 1e-4  # rounded up, never down
    assert f"noise multiplier {report['mechanisms'][1]['noise_multiplier']:.6g}" in body
    for text in (report["unit"], report["adjacency"], report["accountant"], *report["caveats"], "| delta | 1e-05 |", "DP class means (Gaussian)"):
        assert text in body
    assert "Scans of three kinds." in body and "## Limits" in body and "## Metrics" not in body
    assert "ward-7" not in body and "patients" not in body
    nothing = model_card(load_run_config(finished), {"epsilon": None, "guarantee": "none: no protection", "caveats": ["careful"]})
    assert "NO privacy guarantee" in nothing and "**Nothing is guaranteed:** none: no protection." in nothing and "careful" in nothing


def test_a_release_holds_what_may_leave_and_nothing_else(run, tmp_path, capsys):
    for stray in ("model/notes.txt", "model/optimizer.bin", "samples/evaluation.json", "private/diary.txt", "evaluation.png"):
        (run / stray).write_text("stray")
    PrivateKey.fresh().save(run / "private/key")
    secret = (run / "private/key").read_bytes().partition(b"\n")[2]
    call(release_main, "--run", run, "--to", tmp_path / "new/out")
    released = files(tmp_path / "new/out")
    assert released.keys() == ALWAYS | SAMPLES | {"metrics.jsonl"}
    assert not (run / "private/key").exists()
    for content, _ in released.values():
        assert not any(word in content for word in (secret, secret.hex().encode(), b"ward-7", b"patients", b"stray", str(tmp_path).encode()))
    original = files(run)
    for name in released.keys() - {"config.yaml"}:
        assert released[name][0] == original[name][0]
        assert released[name][1] > original[name][1]  # its own time
    assert load_file(tmp_path / "new/out" / WEIGHTS).keys() == {f"denoiser.{name}" for name in build_denoiser(load_run_config(run)).state_dict()}
    config = load_run_config(tmp_path / "new/out")
    assert dump_config(config).replace("not-released", load_run_config(run).data.path) == (run / "config.yaml").read_text()
    assert "without evaluation.png: it was computed against images that data.public doesn't declare public" in capsys.readouterr().out
    call(sample_main, "--run", tmp_path / "new/out", "--num-images", "8", "--out", tmp_path / "again")
    np.testing.assert_array_equal(samples(tmp_path / "again"), samples(run / "samples"))


@pytest.mark.parametrize(
    ("public", "mark", "flags", "copied"),
    [
        (False, NOT_PRIVATE, [], False),
        (True, NOT_PRIVATE, [], False),
        (False, PUBLIC, [], False),
        (True, PUBLIC, [], True),
        (False, NOT_PRIVATE, ["--include-evaluation-that-is-not-private"], True),
    ],
)
def test_metrics_leave_only_where_images_are_public_or_the_user_says_so(public, mark, flags, copied, run, tmp_path):
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("public: false", f"public: {str(public).lower()}"))
    record = {"value": 0.51234, "reference": "20 real test images", "protocol": "a protocol"}
    (run / "evaluation.json").write_text(json.dumps({"metrics": {"cas_mlp": record}, "private": mark}))
    (run / "evaluation.png").write_text("picture")
    call(release_main, "--run", run, "--to", tmp_path / "out", *flags)
    assert ({"evaluation.json", "evaluation.png"} <= files(tmp_path / "out").keys()) is copied
    card = (tmp_path / "out/model/README.md").read_text()
    assert card == (run / "model/README.md").read_text() if not copied else ("| cas_mlp | 0.5123 | 20 real test images |" in card and mark in card)


def test_private_diagnostics_and_a_fixed_key_stay_behind(tmp_path, capsys):
    flags = ["--tracking.log_private_diagnostics_without_dp=true", f"--privacy.unsafe_fixed_key={KEY}", "--stages.variant=dpdm"]
    run = trained(tmp_path, *flags, "--data.public=true")
    call(release_main, "--run", run, "--to", tmp_path / "out")
    assert files(tmp_path / "out").keys() == ALWAYS | SAMPLES
    assert not any(KEY.encode() in content for content, _ in files(tmp_path / "out").values())
    assert "without metrics.jsonl: it holds private diagnostics" in capsys.readouterr().out


def test_what_cannot_be_released_is_refused(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def said(*flags: object) -> str:
        return refusal(release_main, monkeypatch, capsys, "--run", run, "--to", out, *flags)

    report = json.loads((run / "privacy.json").read_text())
    assert "is not a run directory" in refusal(release_main, monkeypatch, capsys, "--run", tmp_path / "nowhere", "--to", out)
    (run / "privacy.json").write_text(json.dumps(report | {"status": "running"}))
    PrivateKey.fresh().save(run / "private/key")
    assert said().startswith(f"{run}: training is not finished; run train.py")
    assert (run / "private/key").exists()  # to resume with
    (run / "privacy.json").write_text(json.dumps(report | {"epsilon": None}))
    assert "expected a guarantee, but epsilon is null; --include-model-that-is-not-private releases" in said()
    for taken in (run, run / "config.yaml"):
        assert "expected a directory that doesn't exist yet, or is empty" in said("--include-model-that-is-not-private", "--to", taken)
    (run / "model/model_index.json").rename(tmp_path / "saved")
    (run / "privacy.json").write_text(json.dumps(report))
    assert said().startswith(f"{run}/model/model_index.json: expected a file that training wrote")
    (tmp_path / "saved").rename(run / "model/model_index.json")
    (run / WEIGHTS).write_bytes((run / WEIGHTS).read_bytes()[:5000])
    assert said().startswith(f"{run / WEIGHTS}: expected the weights of this run's network")
    assert not out.exists()
    assert (run / "private/key").exists()
