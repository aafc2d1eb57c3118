"""Evaluation against closed forms, brute force, clean-fid and data whose right answer is known."""

import functools
import hashlib
import importlib.util
import io
import itertools
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from dpsyngen.compute import Compute
from dpsyngen.config import EvaluationConfig
from dpsyngen.data import ImageDataset
from dpsyngen.errors import InputError
from dpsyngen.evaluation import (
    build_classifier,
    evaluate,
    features,
    frechet_distance,
    inception,
    metrics_table,
    precision_recall,
    save_picture,
    train_classifier,
)
from dpsyngen.evaluation.classifiers import HalfDropout, apply_in_batches
from dpsyngen.evaluation.metrics import NOT_PRIVATE, PUBLIC
from dpsyngen.files import write_json
from dpsyngen.networks.torchvision_compat import import_torchvision

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
KINDS = ("logistic_regression", "mlp", "cnn")
NO_WEIGHTS = "http://127.0.0.1:9/weights"  # the discard port: nothing listens there


@pytest.fixture(autouse=True)
def brief_feature_network(monkeypatch):
    monkeypatch.setattr(features, "CLASSIFIER_STEPS", 60)


def stripes(n: int, seed: int, classes: int = 3, size: int = 8, channels: int = 1) -> ImageDataset:
    """Images that any classifier can tell: class k is bright in the k-th band of rows, on noise."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (n, channels, size, size))
    labels = np.arange(n) % classes
    band = size // classes
    for image, label in zip(images, labels, strict=True):
        image[:, label * band : (label + 1) * band] += 150
    return ImageDataset(images.astype(np.uint8), labels, tuple("abcdefgh"[:classes]))


def channels_last(data: ImageDataset) -> np.ndarray:
    return data.images.transpose(0, 2, 3, 1)


def relabelled(data: ImageDataset, labels: np.ndarray) -> ImageDataset:
    return ImageDataset(data.images, labels, data.class_names)


# Distances


def with_moments(n: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> np.ndarray:
    """Features [n, F] whose sample mean and unbiased sample covariance are exactly these."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x -= x.mean(0)
    whitened = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def random_covariance(size: int, seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((size, size))
    return root @ root.T + 0.1 * np.eye(size)


def test_frechet_closed_form_of_commuting_covariances():
    a, b = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.25])
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    shift = np.array([1.0, -2.0, 0.5])
    x = with_moments(50, np.zeros(3), rotation @ np.diag(a) @ rotation.T, 1)
    y = with_moments(70, shift, rotation @ np.diag(b) @ rotation.T, 2)
    expected = np.sum(shift**2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-10)


def test_frechet_agrees_with_clean_fid(recwarn):
    import_torchvision()
    from cleanfid.fid import frechet_distance as reference

    size = 12
    moments = [(np.full(size, i / 3), random_covariance(size, i)) for i in range(2)]
    x, y = (with_moments(100, *moment, seed=i) for i, moment in enumerate(moments))
    assert frechet_distance(x, y) == pytest.approx(reference(*moments[0], *moments[1]), rel=1e-8)
    recwarn.clear()  # clean-fid calls scipy in a way that is deprecated


def test_frechet_of_singular_covariances():
    x = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)  # rank 19 of 64
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + np.float32(2)) == pytest.approx(4 * 64, rel=1e-5)
    assert frechet_distance(np.array([[0.0], [2.0]]), np.array([[3.0], [3.0]])) == pytest.approx(2**2 + 2)


def brute_force_coverage(manifold: np.ndarray, points: np.ndarray, k: int) -> float:
    covered = 0
    for point in points:
        for i, centre in enumerate(manifold):
            others = sorted(np.linalg.norm(centre - other) for j, other in enumerate(manifold) if j != i)
            if np.linalg.norm(point - centre) <= others[k - 1]:
                covered += 1
                break
    return covered / len(points)


def test_precision_recall_against_brute_force():
    rng = np.random.default_rng(0)
    real, synthetic = rng.standard_normal((40, 2)), 0.7 * rng.standard_normal((30, 2)) + 1.6
    precision, recall = precision_recall(real, synthetic)
    assert precision == pytest.approx(brute_force_coverage(real, synthetic, 3))
    assert recall == pytest.approx(brute_force_coverage(synthetic, real, 3))
    assert 0 < recall < precision < 1


def test_precision_recall_of_identical_disjoint_and_collapsed_sets():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((50, 4)).astype(np.float32)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    assert precision_recall(real, np.repeat(real[:1], 50, axis=0)) == (1.0, pytest.approx(1 / 50))


# Classifiers


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8), (1, 20, 20), (3, 64, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_classifiers_take_every_shape(kind, shape):
    model = build_classifier(kind, shape, 7).eval()
    x = torch.zeros(2, *shape)
    assert model(x).shape == (2, 7)
    assert model(x).dtype == torch.float32
    assert model.features(x).shape == (2, model.head.in_features)


def test_classifiers_have_the_size_of_dpdm():
    count = {kind: sum(p.numel() for p in build_classifier(kind, (1, 28, 28), 10).parameters()) for kind in KINDS}
    cnn = (9 * 32 + 32) + (9 * 32 * 64 + 64) + (9 * 64 * 128 + 128) + (1152 * 128 + 128) + (128 * 10 + 10)
    assert count == {"logistic_regression": 7850, "mlp": 784 * 100 + 100 + 1010, "cnn": cnn}


def test_unknown_classifier():
    with pytest.raises(ValueError, match=r"^kind: expected logistic_regression, mlp or cnn, got 'svm'$"):
        build_classifier("svm", (1, 28, 28), 10)


def test_half_dropout():
    torch.manual_seed(0)
    dropout = HalfDropout()
    x = torch.rand(40, 16, 13, 11).contiguous(memory_format=torch.channels_last) + 1
    dropped = dropout(x)
    kept = dropped != 0
    assert torch.equal(dropped[kept], 2 * x[kept])
    fractions = kept.double()
    assert fractions.mean().item() == pytest.approx(0.5, abs=0.01)
    for dims in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):  # no image, channel, row or column is favoured
        assert fractions.mean(dims).sub(0.5).abs().max() < 0.06
    neighbours = fractions.flatten()[:-1] * fractions.flatten()[1:]
    assert neighbours.mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_a_function_of_its_arguments(kind):
    data = stripes(60, 0)
    state = torch.get_rng_state()
    first, again, other = (train_classifier(kind, data, 2, seed, CPU) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    logits = [apply_in_batches(trained.model, data.images, Compute(CPU)) for trained in (first, again, other)]
    assert np.array_equal(logits[0], logits[1])
    assert not np.array_equal(logits[0], logits[2])


def test_the_best_epoch_is_kept():
    noisy = relabelled(stripes(100, 0), np.random.default_rng(0).integers(0, 3, 100))
    epochs_seen = itertools.count(1)
    trained = train_classifier("mlp", noisy, 40, 1, CPU, lambda: next(epochs_seen))
    assert 1 <= trained.selected_epoch < 40
    assert next(epochs_seen) - 1 < 40  # stopped early
    shorter = train_classifier("mlp", noisy, trained.selected_epoch, 1, CPU)
    assert shorter.selected_epoch == trained.selected_epoch
    weights = trained.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in shorter.model.state_dict().items())


# The whole evaluation

SHORT = EvaluationConfig(classifier_seeds=2, classifier_epochs=12, features="none")
QUICK = EvaluationConfig(classifiers=("mlp",), classifier_seeds=1, classifier_epochs=5, features="none")


def test_separable_data_gives_full_marks():
    result = evaluate(channels_last(stripes(300, 0)), stripes(300, 0).labels, None, stripes(90, 1), SHORT, seed=0)
    assert list(result["metrics"]) == ["cas_logistic_regression", "cas_mlp", "cas_cnn"]
    for metric in result["metrics"].values():
        assert metric["value"] == 1
        assert metric["std"] == 0
        assert metric["confusion_matrix"] == (60 * np.eye(3, dtype=int)).tolist()  # 30 of a class, twice
        assert metric["reference"] == "90 real test images"
        assert metric["seed"] == 0
        assert metric["private"] == NOT_PRIVATE
    assert result["skipped"] == {"fid": "evaluation.features is none"}


def test_shuffled_labels_give_chance():
    synthetic, real = stripes(600, 0, classes=2), stripes(200, 1, classes=2)
    shuffled = np.random.default_rng(0).permutation(synthetic.labels)
    config = EvaluationConfig(classifiers=("logistic_regression", "mlp"), classifier_seeds=4, classifier_epochs=10, features="none")
    result = evaluate(channels_last(synthetic), shuffled, None, real, config, seed=0)
    accuracies = [a for metric in result["metrics"].values() for a in metric["accuracies"]]
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.25)  # a whole class goes one way or the other, so single ones are coarse
    assert max(np.mean(metric["held_out_synthetic_accuracies"]) for metric in result["metrics"].values()) < 0.75


def test_mean_and_deviation():
    noisy = np.random.default_rng(0).integers(0, 3, 100)
    config = EvaluationConfig(classifiers=("mlp",), classifier_seeds=3, classifier_epochs=2, features="none")
    metric = evaluate(channels_last(stripes(100, 0)), noisy, None, stripes(50, 1), config, seed=0)["metrics"]["cas_mlp"]
    assert len(set(metric["accuracies"])) > 1
    assert metric["value"] == pytest.approx(np.mean(metric["accuracies"]))
    assert metric["std"] == pytest.approx(np.std(metric["accuracies"], ddof=1))
    assert np.sum(metric["confusion_matrix"]) == 150
    assert np.trace(metric["confusion_matrix"]) / 150 == pytest.approx(metric["value"])


def test_real_labels_choose_nothing():
    synthetic, real = stripes(100, 0), stripes(60, 1)
    noisy = np.random.default_rng(0).permutation(synthetic.labels)
    swapped = relabelled(real, 2 - real.labels)
    before, after = (evaluate(channels_last(synthetic), noisy, None, r, SHORT, seed=0)["metrics"] for r in (real, swapped))
    for name in before:
        assert before[name]["selected_epochs"] == after[name]["selected_epochs"]
        assert before[name]["held_out_synthetic_accuracies"] == after[name]["held_out_synthetic_accuracies"]
        assert before[name]["confusion_matrix"] == after[name]["confusion_matrix"][::-1]  # the same predictions, other truths


def test_features_compare_sets_in_the_right_order():
    train, real = stripes(300, 0), stripes(100, 1)
    config = EvaluationConfig(classifiers=(), features="classifier")
    noise = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 1), dtype=np.uint8)
    good, good_again, bad = (evaluate(x, real.labels, train, real, config, 0) for x in [channels_last(stripes(100, 2))] * 2 + [noise])
    assert good == good_again
    assert 0 <= good["metrics"]["fid"]["value"] < 0.1 * bad["metrics"]["fid"]["value"]
    assert good["metrics"]["precision"]["value"] > 0.5 > bad["metrics"]["precision"]["value"]
    assert good["metrics"]["recall"]["value"] > 0.5
    assert "not comparable" in good["metrics"]["fid"]["name"]
    same = evaluate(channels_last(real), real.labels, train, real, config, 0, public=True)
    assert same["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-4)
    assert same["metrics"]["precision"]["value"] == same["metrics"]["recall"]["value"] == 1
    assert same["private"] == same["metrics"]["fid"]["private"] == PUBLIC
    assert same["metrics"]["fid"]["real_training_images"] > 0


def test_images_without_labels():
    plain = ImageDataset(stripes(100, 0).images, np.zeros(100, dtype=np.int64), ("image",))
    config = EvaluationConfig(features="classifier")
    result = evaluate(channels_last(plain), plain.labels, plain, plain, config, seed=0)
    assert set(result["metrics"]) == {"fid", "precision", "recall"}
    assert "no labels" in result["skipped"]["cas"]
    assert "how much an image is turned" in result["metrics"]["fid"]["protocol"]


def test_the_feature_network_tells_turned_images():
    images = np.zeros((64, 1, 8, 8), dtype=np.uint8)
    images[:, :, :3] = np.random.default_rng(0).integers(150, 256, (64, 1, 3, 8))  # bright on top
    model = features.train_feature_network(ImageDataset(images, np.zeros(64, dtype=np.int64), ("image",)), 0, CPU)
    for turns in range(4):
        turned = np.ascontiguousarray(np.rot90(images, turns, (2, 3)))
        assert (apply_in_batches(model, turned, Compute(CPU)).argmax(1) == turns).all()


BAD_INPUT = [
    ({"images": np.zeros((20, 8, 8, 3), np.uint8)}, r"synthetic images: expected uint8 \[N, 8, 8, 1\] like the real ones, got uint8 \[20, 8, 8, 3\]"),
    ({"images": np.zeros((20, 8, 8, 1))}, r"synthetic images: expected uint8 .*, got float64 \[20, 8, 8, 1\]"),
    ({"images": np.zeros((5, 8, 8, 1), np.uint8)}, "synthetic images: expected at least 10, got 5"),
    ({"labels": np.full(20, 3)}, "synthetic labels: expected 0 to 2 like the real ones, got 3 to 3"),
    ({"labels": np.zeros(19, int)}, r"synthetic labels: expected one integer for each of 20 images, got int64 \[19\]"),
    ({"labels": np.zeros(20)}, r"synthetic labels: expected one integer for each of 20 images, got float64 \[20\]"),
    ({"real_reference": stripes(9, 0)}, "real images: expected at least 10 to compare with, got 9"),
    ({"config": EvaluationConfig(features="classifier")}, "evaluation.features: expected none, as there are no real training images .*"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_INPUT)
def test_bad_input(bad, message):
    good = {"images": channels_last(stripes(20, 0)), "labels": stripes(20, 0).labels, "real_train": None, "real_reference": stripes(20, 1),
            "config": QUICK, "seed": 0}
    with pytest.raises(InputError, match=f"^{message}$"):
        evaluate(**(good | bad))


# Inception


class StandIn(torch.nn.Module):
    """The interface of the published TorchScript file, with other features."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((32, 64)), torch.nn.Flatten(), torch.nn.AvgPool1d(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("channels", [1, 3])
def test_inception_features_are_clean_fids(tmp_path, channels):
    import_torchvision()
    from cleanfid.fid import get_files_features

    torch.jit.script(StandIn()).save(tmp_path / inception.WEIGHTS_FILE)
    model = inception.load_inception(tmp_path, CPU)
    images = stripes(4, 0, size=12, channels=channels).images
    files = [tmp_path / f"{i}.png" for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(np.broadcast_to(image.transpose(1, 2, 0), (12, 12, 3)).copy()).save(file)
    expected = get_files_features([str(file) for file in files], model, num_workers=0, device=CPU, verbose=False)
    actual = inception.inception_features(images, model, Compute(CPU))
    assert actual.shape == (4, 2048)
    assert np.allclose(actual, expected, atol=1e-5)


@pytest.fixture
def server():
    """A web server on this machine that gives out what the test puts in `content`; None leaves the caller waiting."""
    release = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.server.content is None:
                release.wait(10)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.content)))
            self.end_headers()
            self.wfile.write(self.server.content)

        def log_message(self, *arguments):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/{inception.WEIGHTS_FILE}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    yield httpd
    release.set()
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_weights_are_downloaded_once_and_checked(server, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    server.content = b"not the weights"
    with pytest.raises(OSError, match=r"neither in .*first nor in .*second, .* failed \(wrong SHA-256\)"):
        inception.find_weights(server.url, (first, second))
    assert list(tmp_path.rglob("*.p*t")) == []
    monkeypatch.setattr(inception, "_SHA256", hashlib.sha256(b"the weights").hexdigest())
    server.content = b"the weights"
    assert inception.find_weights(server.url, (first, second)) == second
    assert [file.name for file in second.iterdir()] == [inception.WEIGHTS_FILE]
    assert inception.find_weights(NO_WEIGHTS, (first, second)) == second
    first.mkdir()
    (first / inception.WEIGHTS_FILE).write_bytes(b"planted")
    assert inception.find_weights(NO_WEIGHTS, (first, second)) == second


def test_a_silent_server_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "_CONNECT_SECONDS", 0.2)
    server.content = None
    with pytest.raises(OSError, match=r"and the download from .* failed"):
        inception.find_weights(server.url, (tmp_path,))


def test_without_inception_auto_takes_the_classifier(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "find_weights", functools.partial(inception.find_weights, NO_WEIGHTS, (tmp_path,)))
    data = stripes(40, 0)
    with pytest.raises(InputError, match=r"^evaluation.features: inception can't be had: .* is neither .*choose classifier or none$"):
        features.build_extractor("inception", data, 0, Compute(CPU))
    extractor = features.build_extractor("auto", data, 0, Compute(CPU))
    assert extractor.name.startswith("FID-classifier")
    assert "since Inception's weights can't be had" in extractor.note
    assert extractor.extract(data.images, None).shape == (40, 128)


def test_torchvision_is_importable():
    torchvision = import_torchvision()
    assert torchvision is import_torchvision() is sys.modules["torchvision"]
    assert torchvision.transforms.functional.hflip(torch.arange(3.0)[None, None]).flatten().tolist() == [2, 1, 0]


# Report and script


@pytest.fixture
def small_result():
    config = EvaluationConfig(classifiers=("logistic_regression", "mlp"), classifier_seeds=2, classifier_epochs=2, features="classifier")
    return evaluate(channels_last(stripes(40, 0)), stripes(40, 0).labels, stripes(50, 2), stripes(30, 1), config, seed=3)


def rendered(result) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(metrics_table(result))
    return console.file.getvalue()


def test_table_says_everything(small_result):
    text = rendered(small_result)
    for part in ("CAS, logistic regression", "CAS, MLP", "±", "FID-classifier (not comparable with Inception FID)", "precision", "recall",
                 "40 synthetic against 30 real images", "seed 3", "not covered by the privacy guarantee"):
        assert part in " ".join(text.split())
    single = evaluate(channels_last(stripes(40, 0)), stripes(40, 0).labels, None, stripes(30, 1), QUICK, seed=3)
    assert "±" not in rendered(single)
    assert "left out: evaluation.features is none" in rendered(single)


@pytest.mark.parametrize("case", ["few classes", "many classes", "no labels"])
def test_picture(small_result, case, tmp_path):
    result, labels = small_result, stripes(40, 0).labels
    if case == "many classes":
        metric = small_result["metrics"]["cas_mlp"] | {"confusion_matrix": np.eye(25, dtype=int).tolist()}
        result = small_result | {"metrics": {"cas_mlp": metric}, "class_names": [f"class {i}" for i in range(25)]}
    elif case == "no labels":
        labels = np.zeros(40, dtype=np.int64)
        result = small_result | {"metrics": {"fid": small_result["metrics"]["fid"]}, "class_names": ["image"]}
    save_picture(result, channels_last(stripes(40, 0)), labels, tmp_path / "evaluation.png")
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.png"]
    with Image.open(tmp_path / "evaluation.png") as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 10


def test_the_record_is_json_and_complete_or_absent(small_result, tmp_path):
    write_json(tmp_path / "evaluation.json", small_result)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == small_result
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "evaluation.json", {"value": float("nan")})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == small_result
    with pytest.raises(InputError, match=r"evaluation\.json: expected a place that can be written"):
        write_json(tmp_path / "missing" / "evaluation.json", small_result)


@pytest.fixture
def run_directory(tmp_path):
    """A run on images of 8 x 8 from an .npz file, with a sample set."""
    for name, seed in (("train", 0), ("test", 1)):
        np.savez(tmp_path / f"{name}.npz", images=channels_last(stripes(60, seed)), labels=stripes(60, seed).labels)
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    np.savez(run / "samples" / "images.npz", images=channels_last(stripes(50, 2)), labels=stripes(50, 2).labels)
    (run / "config.yaml").write_text(
        f"data: {{source: npz, path: {tmp_path}/train.npz, test_path: {tmp_path}/test.npz, image_size: 8, num_classes: 3, expected_size: 60}}\n"
        "private: {batch_size: 16}\n"
        "evaluation: {classifiers: [mlp], classifier_seeds: 2, classifier_epochs: 40, features: none}\n"
        "compute: {device: cpu}\n"
    )
    return run


def test_script(run_directory):
    command = [sys.executable, "-W", "error", ROOT / "evaluate.py", "--run", run_directory, "--evaluation.classifier_seeds", "3"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "CAS, MLP" in done.stdout
    record = json.loads((run_directory / "evaluation.json").read_text())
    assert record["metrics"]["cas_mlp"]["value"] == 1
    assert len(record["metrics"]["cas_mlp"]["accuracies"]) == 3
    assert (run_directory / "evaluation.png").stat().st_size > 1000


def script_main(*arguments: object) -> None:
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.test_path", "null"], "data.test_path: expected real images to evaluate against"),
        (["--data.num_classes", "2"], "expected labels from 0 to 1"),
        (["--data.image_size", "16"], "synthetic images: expected uint8 .N, 16, 16, 1. like the real ones"),
        (["--private.batch_size", "8"], "--private.batch.size: expected a field of evaluation, compute or data"),
        (["--evaluation.reference", "held_out"], "data.held_out: expected an integer > 0"),
    ],
)
def test_script_refuses(run_directory, flags, message):
    with pytest.raises(InputError, match=message):
        script_main("--run", run_directory, *flags)
    assert not (run_directory / "evaluation.json").exists()


def test_script_needs_samples(run_directory):
    (run_directory / "samples" / "images.npz").unlink()
    with pytest.raises(InputError, match=r"samples/images.npz: .*run sample.py first$"):
        script_main("--run", run_directory)


def test_script_on_held_out_images_and_another_sample_set(run_directory, capsys):
    other = run_directory.parent / "other"
    (run_directory / "samples").rename(other)
    script_main("--run", run_directory, "--samples", other, "--data.held_out", 20, "--evaluation.reference", "held_out", "--data.public", "true")
    record = json.loads((other / "evaluation.json").read_text())
    assert record["metrics"]["cas_mlp"]["reference"] == "20 real held-out images"
    assert record["private"] == PUBLIC
    assert "other/evaluation.json" in capsys.readouterr().out
