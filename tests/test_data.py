"""Datasets: known facts of real ones, files written by Pillow and NumPy, and every refusal."""

import gzip
import lzma
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest

from dpsyngen.compute import Compute
from dpsyngen.config import ComputeConfig, DataConfig, HintsConfig, RunConfig, SyntheticConfig
from dpsyngen.data import ImageDataset, SyntheticImages, load_held_out, load_test, load_train, synthetic, to_uint8, to_unit_range
from dpsyngen.data.fashion_mnist import SYSTEM_FOLDER, find_files
from dpsyngen.data.folder import SUFFIXES
from dpsyngen.data.idx import read_idx
from dpsyngen.denoiser import build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.hints import synthetic_hints
from dpsyngen.noise_levels import stages_of
from dpsyngen.ordinary_step import Lesson, OrdinaryStep, synthetic_batches

needs_fashion_mnist = pytest.mark.skipif(not SYSTEM_FOLDER.is_dir(), reason=f"Debian's dataset-fashion-mnist is not installed in {SYSTEM_FOLDER}")


def refused(call: Any, *parts: str) -> None:
    """The call raises InputError with one line that has all the parts."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


# --- the dataset and the way between bytes and the networks' range ---


def test_every_byte_survives_the_way_to_the_unit_range_and_back() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(2, 1, 16, 8)
    x = to_unit_range(images)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    back = to_uint8(x)
    assert back.dtype == np.uint8
    assert np.array_equal(back, images.transpose(0, 2, 3, 1))


def test_to_uint8_clamps_and_rounds() -> None:
    x = torch.tensor([-7.0, -1.001, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 254.6 / 127.5 - 1, 1.2]).reshape(1, 1, 1, 6)
    assert to_uint8(x).flatten().tolist() == [0, 0, 0, 1, 255, 255]


def test_a_batch_has_the_asked_images_and_may_be_empty() -> None:
    dataset = ImageDataset(random_images(9, 3, 8, 8), np.arange(9), tuple("abcdefghi"))
    x, labels = dataset.batch(np.array([4, 4, 1]))
    assert np.array_equal(to_uint8(x).transpose(0, 3, 1, 2), dataset.images[[4, 4, 1]])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [4, 4, 1]
    x, labels = dataset.batch(np.empty(0, dtype=np.int64))
    assert x.shape == (0, 3, 8, 8)
    assert labels.shape == (0,)


def test_the_fingerprint_depends_on_shape_images_and_labels() -> None:
    images, labels = random_images(4, 1, 8, 8), np.array([0, 1, 0, 1])
    other_pixel, other_label = images.copy(), labels.copy()
    other_pixel[3, 0, 7, 7] ^= 1
    other_label[3] = 0
    variants = [(images, labels), (other_pixel, labels), (images, other_label), (images.reshape(4, 1, 4, 16), labels)]
    prints = {ImageDataset(i, t, ("a", "b")).fingerprint() for i, t in variants}
    assert len(prints) == 4
    assert all(len(p) == 64 for p in prints)
    assert ImageDataset(images.copy(order="F"), labels.copy(), ("a", "b")).fingerprint() in prints


# --- MNIST ---


@pytest.fixture(scope="module")
def mnist() -> ImageDataset:
    return load_train(DataConfig())


def test_mnist_is_the_real_one(mnist: ImageDataset) -> None:
    assert mnist.images.shape == (60000, 1, 28, 28)
    assert mnist.images.dtype == np.uint8
    assert mnist.labels.dtype == np.int64
    assert mnist.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(mnist.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.images.mean() == pytest.approx(33.318, abs=0.001)
    assert mnist.class_names == tuple("0123456789")
    test = load_test(DataConfig())
    assert test is not None
    assert test.images.shape == (10000, 1, 28, 28)
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert np.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_held_out_images_are_the_last_and_expected_size_is_not_compared_with_the_data(mnist: ImageDataset) -> None:
    config = DataConfig(held_out=5000, expected_size=123)
    train, held_out = load_train(config), load_held_out(config)
    assert (len(train), len(held_out)) == (55000, 5000)
    assert np.array_equal(np.concatenate([train.images, held_out.images]), mnist.images)
    assert np.array_equal(np.concatenate([train.labels, held_out.labels]), mnist.labels)


def test_images_are_resized_and_coloured_as_pillow_does_it(mnist: ImageDataset) -> None:
    test = load_test(DataConfig(image_size=32, channels=3, class_names=tuple("abcdefghij")))
    original = load_test(DataConfig())
    assert test is not None
    assert original is not None
    assert test.images.shape == (10000, 3, 32, 32)
    expected = np.asarray(Image.fromarray(original.images[3, 0]).resize((32, 32), Image.Resampling.LANCZOS))
    assert all(np.array_equal(channel, expected) for channel in test.images[3])
    assert test.class_names == tuple("abcdefghij")


def test_labels_can_be_ignored() -> None:
    test = load_test(DataConfig(num_classes=0))
    assert test is not None
    assert not test.labels.any()
    assert test.class_names == ("image",)


def test_mnist_refuses_what_does_not_fit() -> None:
    refused(lambda: load_test(DataConfig(num_classes=12)), "data.num_classes", "10", "12")
    refused(lambda: load_train(DataConfig(path="/data")), "data.path", "embedded")
    refused(lambda: load_test(DataConfig(test_path="/data")), "data.test_path", "mnist")


# --- Fashion-MNIST ---


@needs_fashion_mnist
def test_fashion_mnist_is_the_real_one() -> None:
    config = DataConfig(source="fashion_mnist")
    train, test = load_train(config), load_test(config)
    assert test is not None
    assert (train.images.shape, test.images.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.images.mean() == pytest.approx(72.940, abs=0.001)
    assert [train.class_names[i] for i in train.labels[:2]] == ["Ankle boot", "T-shirt/top"]


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder that is served on the loopback interface, its URL, and an empty cache in tmp_path/cache."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield folder, f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@needs_fashion_mnist
def test_fashion_mnist_is_downloaded_into_the_cache_once(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    for file in SYSTEM_FOLDER.glob("t10k-*.gz"):
        (folder / file.name).symlink_to(file)
    found = find_files(None, "t10k", system_folder=tmp_path, url=url)
    cache = tmp_path / "cache" / "dpsyngen" / "fashion-mnist"
    assert found == (cache / "t10k-images-idx3-ubyte.gz", cache / "t10k-labels-idx1-ubyte.gz")
    assert read_idx(found[0]).shape == (10000, 28, 28)
    assert sorted(cache.iterdir()) == list(found)
    assert find_files(None, "t10k", system_folder=tmp_path, url="http://127.0.0.1:1/") == found


def test_a_download_of_other_content_is_refused_and_not_kept(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"something else", mtime=0))
    refused(lambda: find_files(None, "t10k", system_folder=tmp_path, url=url), "SHA-256", "t10k-images-idx3-ubyte.gz")
    assert not list((tmp_path / "cache").rglob("*.*"))


@pytest.mark.parametrize("content", [None, b"", b"\x1f\x8bnot gzip", gzip.compress(b"cut off" * 99, mtime=0)[:-12]])
def test_a_failed_download_says_where_was_looked_and_what_to_do(served: tuple[Path, str], tmp_path: Path, content: bytes | None) -> None:
    folder, url = served
    if content is not None:
        (folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    refused(lambda: find_files(None, "train", system_folder=tmp_path, url=url),
            str(tmp_path), str(tmp_path / "cache"), url, "apt-get install dataset-fashion-mnist", "data.path")  # fmt: skip


def test_an_unreachable_server_is_a_failed_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    refused(lambda: find_files(None, "train", system_folder=tmp_path, url="http://127.0.0.1:1/"), "fashion_mnist", "dataset-fashion-mnist")


def test_fashion_mnist_is_read_from_a_given_folder_raw_or_compressed(tmp_path: Path) -> None:
    images, labels = random_images(5, 28, 28), np.array([9, 0, 0, 3, 1], dtype=np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 5, 28, 28) + images.tobytes())
    config = DataConfig(source="fashion_mnist", path=str(tmp_path))
    refused(lambda: load_train(config), "data.path", "train-labels-idx1-ubyte", str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, 5) + labels.tobytes()))
    dataset = load_train(config)
    assert np.array_equal(dataset.images[:, 0], images)
    assert np.array_equal(dataset.labels, labels)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("short", b"\0\0"),
        ("short_header", struct.pack(">4BI", 0, 0, 8, 3, 5)),
        ("floats", struct.pack(">4BI", 0, 0, 0x0D, 1, 1) + bytes(4)),
        ("truncated", struct.pack(">4BI", 0, 0, 8, 1, 5) + bytes(4)),
        ("too_long", struct.pack(">4BI", 0, 0, 8, 1, 5) + bytes(6)),
        ("bad.gz", b"no gzip"),
        ("cut.gz", gzip.compress(bytes(1000), mtime=0)[:-9]),
        ("cut.xz", lzma.compress(bytes(1000))[:-9]),
    ],
)
def test_damaged_idx_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    refused(lambda: read_idx(file), str(file))
    refused(lambda: read_idx(tmp_path / "missing"), "missing")


# --- image folders ---


def write_image(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def folder_config(path: Path, **options: Any) -> DataConfig:
    defaults: dict[str, Any] = {"source": "folder", "path": str(path), "image_size": 16, "num_classes": 2, "expected_size": None}
    return DataConfig(**(defaults | options))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Twenty cats and twenty dogs, grayscale 16 x 16; a cat's top left pixel is below 100, a dog's above."""
    for name, offset in (("dog", 100), ("cat", 0)):
        for i in range(20):
            image = random_images(16, 16, seed=i)
            image[0, 0] = offset + i
            write_image(tmp_path / name / f"{i}.png", image)
    return tmp_path


def corner(dataset: ImageDataset) -> list[int]:
    return [int(v) for v in dataset.images[:, 0, 0, 0]]


def test_a_folder_has_one_class_per_subfolder(pets: Path) -> None:
    write_image(pets / ".thumbnails" / "0.png", random_images(16, 16))
    write_image(pets / "cat" / ".hidden.png", random_images(16, 16))
    (pets / "cat" / "notes.txt").write_text("not an image")
    dataset = load_train(folder_config(pets))
    assert dataset.class_names == ("cat", "dog")
    assert dataset.images.shape == (40, 1, 16, 16)
    assert dataset.labels.dtype == np.int64
    assert sorted(corner(dataset)) == [*range(20), *range(100, 120)]
    assert np.array_equal(dataset.labels, np.array(corner(dataset)) >= 100)
    assert dataset.fingerprint() == load_train(folder_config(pets)).fingerprint()


def test_class_names_give_the_labels_in_their_order_and_choose_the_subfolders(pets: Path) -> None:
    dataset = load_train(folder_config(pets, class_names=("dog", "cat")))
    assert np.array_equal(dataset.labels, np.array(corner(dataset)) < 100)
    dogs = load_train(folder_config(pets, class_names=("dog",), num_classes=1))
    assert min(corner(dogs)) == 100
    assert len(dogs) == 20


def test_held_out_images_of_a_folder_mix_the_classes(pets: Path) -> None:
    held_out = load_held_out(folder_config(pets, held_out=12))
    assert 2 <= held_out.labels.sum() <= 10
    assert len(load_held_out(folder_config(pets))) == 0


@pytest.mark.parametrize("added", [f"{name}/new{i}.png" for name in ("cat", "dog") for i in range(4)])
def test_adding_an_image_to_a_folder_changes_the_training_set_by_one(pets: Path, added: str) -> None:
    config = folder_config(pets, held_out=15)
    before = corner(load_train(config))
    write_image(pets / added, np.full((16, 16), 200, dtype=np.uint8))
    after = corner(load_train(config))
    assert len(after) == len(before) + 1
    assert set(before) < set(after)


def test_without_classes_all_images_of_a_folder_are_read(tmp_path: Path) -> None:
    for i in range(3):
        write_image(tmp_path / f"{i}.png", random_images(16, 16, seed=i))
    write_image(tmp_path / "more" / "3.png", random_images(16, 16, seed=3))
    dataset = load_train(folder_config(tmp_path, num_classes=0))
    assert len(dataset) == 4
    assert dataset.labels.tolist() == [0] * 4
    assert dataset.class_names == ("image",)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_is_read(tmp_path: Path, suffix: str, channels: int) -> None:
    colour = np.full((16, 16, 3), (250, 130, 20), dtype=np.uint8)
    write_image(tmp_path / f"image{suffix.upper()}", colour)
    image = load_train(folder_config(tmp_path, num_classes=0, channels=channels)).images[0]
    expected = [250, 130, 20] if channels == 3 else [round(0.299 * 250 + 0.587 * 130 + 0.114 * 20)]
    assert image.shape == (channels, 16, 16)
    assert np.abs(image.astype(int) - np.array(expected)[:, None, None]).max() <= 4


def test_images_are_cropped_to_the_central_square_and_resized(tmp_path: Path) -> None:
    wide = random_images(40, 64, 3)
    write_image(tmp_path / "a" / "wide.png", wide)
    image = load_train(folder_config(tmp_path, num_classes=1, channels=3)).images[0]
    expected = Image.fromarray(wide[:, 12:52]).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(image, np.asarray(expected).transpose(2, 0, 1))


def test_orientation_is_followed_and_transparency_laid_on_black(tmp_path: Path) -> None:
    half = np.zeros((16, 16), dtype=np.uint8)
    half[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    write_image(tmp_path / "turned" / "a" / "turned.png", half, exif=exif)
    turned = load_train(folder_config(tmp_path / "turned", num_classes=1)).images[0, 0]
    assert np.array_equal(turned, np.rot90(half, -1))
    rgba = np.full((16, 16, 4), 255, dtype=np.uint8)
    rgba[:8, :, 3] = 0
    write_image(tmp_path / "clear" / "a" / "clear.png", rgba)
    clear = load_train(folder_config(tmp_path / "clear", num_classes=1)).images[0, 0]
    assert np.array_equal(clear, 255 - half)


def test_a_test_folder_is_labelled_as_the_training_folder(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("test")
    for name in ("ant", "cat", "dog"):
        write_image(other / name / "0.png", np.full((16, 16), 150 if name == "dog" else 50, dtype=np.uint8))
    assert load_test(folder_config(pets)) is None
    test = load_test(folder_config(pets, test_path=str(other)))
    assert test is not None
    assert test.class_names == ("cat", "dog")
    assert sorted(zip(corner(test), test.labels.tolist(), strict=True)) == [(50, 0), (150, 1)]


def test_unreadable_images_are_refused_by_name(pets: Path) -> None:
    file = pets / "cat" / "7.png"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not an image\nat all"):
        file.write_bytes(content)
        refused(lambda: load_train(folder_config(pets)), str(file), "readable image")
    deep = random_images(16, 16).astype(np.uint16) * 256
    write_image(file, deep)
    refused(lambda: load_train(folder_config(pets)), str(file), "8 bits")


def test_wrong_folders_are_refused(pets: Path) -> None:
    refused(lambda: load_train(folder_config(pets / "none")), "data.path", "none")
    refused(lambda: load_test(folder_config(pets, test_path=str(pets / "none"))), "data.test_path", "none")
    refused(lambda: load_train(folder_config(pets, num_classes=3)), "data.num_classes", "3")
    refused(lambda: load_train(folder_config(pets, class_names=("cat", "cow"))), "data.path", "'cow'")
    refused(lambda: load_train(folder_config(pets, class_names=("cat", "cat"))), "data.class_names")
    refused(lambda: load_train(folder_config(pets, class_names=("cat", "../dog"))), "data.class_names")
    refused(lambda: load_train(folder_config(pets, held_out=40)), "data.held_out")
    empty = pets / "empty"
    empty.mkdir()
    refused(lambda: load_train(folder_config(empty, num_classes=0)), "data.path", "found none")


# --- npz files ---


def npz_config(path: Path, **options: Any) -> DataConfig:
    return folder_config(path, **({"source": "npz", "num_classes": 4} | options))


def test_a_plain_npz_file_is_read_in_its_order(tmp_path: Path) -> None:
    images, labels = random_images(6, 16, 16), np.array([3, 0, 1, 2, 2, 0], dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    config = npz_config(tmp_path / "a.npz", held_out=2)
    train = load_train(config)
    assert np.array_equal(train.images[:, 0], images[:4])
    assert train.labels.tolist() == [3, 0, 1, 2]
    assert train.class_names == ("0", "1", "2", "3")
    assert load_held_out(config).labels.tolist() == [2, 0]
    assert load_test(config) is None


def test_a_medmnist_file_brings_its_test_images(tmp_path: Path) -> None:
    train, test = random_images(5, 16, 16, 3), random_images(3, 16, 16, 3, seed=1)
    np.savez_compressed(tmp_path / "m.npz", train_images=train, train_labels=np.array([[0], [1], [2], [3], [0]]),
                        test_images=test, test_labels=np.array([[3], [2], [1]]), val_images=test, val_labels=np.zeros((3, 1)))  # fmt: skip
    config = npz_config(tmp_path / "m.npz", channels=3)
    loaded, loaded_test = load_train(config), load_test(config)
    assert loaded_test is not None
    assert np.array_equal(loaded.images, train.transpose(0, 3, 1, 2))
    assert loaded.labels.tolist() == [0, 1, 2, 3, 0]
    assert np.array_equal(loaded_test.images, test.transpose(0, 3, 1, 2))
    assert loaded_test.labels.tolist() == [3, 2, 1]
    # The same file, or a plain one, given as test_path.
    again = load_test(npz_config(tmp_path / "m.npz", channels=3, test_path=str(tmp_path / "m.npz")))
    assert again is not None
    assert again.fingerprint() == loaded_test.fingerprint()
    np.savez(tmp_path / "plain.npz", images=test, labels=np.array([1, 1, 1]))
    plain = load_test(npz_config(tmp_path / "m.npz", test_path=str(tmp_path / "plain.npz")))
    assert plain is not None
    assert plain.labels.tolist() == [1, 1, 1]


def test_npz_images_are_resized_and_converted(tmp_path: Path) -> None:
    images = random_images(2, 20, 30, 3)
    np.savez(tmp_path / "a.npz", images=images)
    loaded = load_train(npz_config(tmp_path / "a.npz", num_classes=0))
    expected = Image.fromarray(images[1, :, 5:25]).convert("L").resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(loaded.images[1, 0], np.asarray(expected))
    assert loaded.class_names == ("image",)
    assert loaded.labels.tolist() == [0, 0]


GOOD = random_images(3, 16, 16)


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"pictures": GOOD}, ["data.path", "images or train_images"]),
        ({"images": GOOD.astype(np.float32), "labels": np.zeros(3, int)}, ["uint8", "float32"]),
        ({"images": GOOD[0], "labels": np.zeros(16, int)}, ["[N, H, W]", "[16, 16]"]),
        ({"images": random_images(3, 16, 16, 4), "labels": np.zeros(3, int)}, ["[3, 16, 16, 4]"]),
        ({"images": GOOD[:0], "labels": np.zeros(0, int)}, ["at least one image"]),
        ({"images": GOOD}, ["expected labels", "data.num_classes is 4"]),
        ({"images": GOOD, "labels": np.zeros(2, int)}, ["one integer per image", "[2]"]),
        ({"images": GOOD, "labels": np.zeros((3, 14), int)}, ["one integer per image", "[3, 14]"]),
        ({"images": GOOD, "labels": np.zeros(3)}, ["one integer per image", "float64"]),
        ({"images": GOOD, "labels": np.array([0, 4, 1])}, ["labels from 0 to 3", "data.num_classes is 4"]),
        ({"images": GOOD, "labels": np.array([0, -1, 1])}, ["labels from 0 to 3"]),
        ({"images": GOOD, "labels": np.array(["a", None, 1], dtype=object)}, ["plain arrays"]),
    ],
)
def test_wrong_arrays_are_refused_with_the_file_named(tmp_path: Path, arrays: dict[str, Any], parts: list[str]) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, **arrays)
    refused(lambda: load_train(npz_config(file)), str(file), *parts)


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    refused(lambda: load_train(npz_config(file)), str(file))
    np.savez(file, images=GOOD, labels=np.zeros(3, int))
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[300] ^= 0xFF
    for content in (whole[: len(whole) // 2], b"", b"text", b"PK\x03\x04", bytes(damaged)):
        file.write_bytes(content)
        refused(lambda: load_train(npz_config(file)), str(file), "readable .npz")
    with file.open("wb") as stream:
        np.save(stream, GOOD)
    refused(lambda: load_train(npz_config(file)), str(file), "readable .npz")
    file.write_bytes(whole)
    np.savez(tmp_path / "other.npz", pictures=GOOD)
    refused(lambda: load_test(npz_config(file, test_path=str(tmp_path / "other.npz"))), "data.test_path", "other.npz")


# --- programmatic images ---


def test_a_synthetic_image_is_a_function_of_seed_and_index_alone() -> None:
    def source(seed: int) -> SyntheticImages:
        return SyntheticImages("dead_leaves", {"leaves": 40}, (1, 28, 28), seed)

    batch = source(7).batch(range(30, 46))
    assert batch.dtype == torch.float32
    assert batch.shape == (16, 1, 28, 28)
    assert batch.min() >= -1
    assert batch.max() <= 1
    assert torch.equal(batch[5:9], source(7).batch([35, 36, 37, 38]))
    assert torch.equal(batch.flip(0), source(7).batch(np.arange(45, 29, -1)))
    others = [source(7).batch(range(16)), source(8).batch(range(30, 46))]
    assert len({image.numpy().tobytes() for images in [batch, *others] for image in images}) == 48
    assert source(7).batch(range(0)).shape == (0, 1, 28, 28)


@pytest.mark.parametrize("family", ["dead_leaves", "variations"])
@pytest.mark.parametrize("kept", [True, False])
def test_distinct_images_come_again_and_are_the_first_of_the_sequence(family: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kept:
        monkeypatch.setattr(synthetic, "_MOST_BYTES_KEPT", 100)
    endless, source = SyntheticImages(family, {}, (1, 8, 8), 3), SyntheticImages(family, {}, (1, 8, 8), 3, distinct=20)
    for places in (np.arange(4, 9), np.arange(2, 30), np.arange(100, 150)):
        assert torch.equal(source.batch(places), endless.batch(places % 20))
        if family == "variations":
            for found, expected in zip(source.with_class_means(places, 4), endless.with_class_means(places % 20, 4), strict=True):
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk_size", [3, 8, 64])
def test_a_synthetic_batch_does_not_depend_on_the_chunk_size(chunk_size: int) -> None:
    config = RunConfig(hints=HintsConfig(kind="none"), synthetic=SyntheticConfig(batch_size=10), compute=ComputeConfig(chunk_size=chunk_size))
    given = []

    def batches(places: np.ndarray, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, None]:
        given.append(places)
        return torch.zeros(len(places), 1, 28, 28), torch.zeros(len(places), dtype=torch.int64), None

    lesson = Lesson(stages_of(config, "synthetic")[0], build_denoiser(config), batches)
    OrdinaryStep((lesson,), 10, config.synthetic, config, Compute(torch.device("cpu")), public=True)(2)
    assert np.array_equal(np.concatenate(given), np.arange(20, 30))


def test_wrong_synthetic_settings_are_input_errors() -> None:
    shape = (1, 28, 28)
    refused(lambda: SyntheticImages("dead_leafs", {}, shape, 0), "synthetic.family", "'dead_leaves'")
    refused(lambda: SyntheticImages("dead_leaves", {"leafs": 3}, shape, 0), "synthetic.options", "'leaves'")
    refused(lambda: SyntheticImages("dead_leaves", {"leaves": 0}, shape, 0), "synthetic.options", "leaves")
    refused(lambda: SyntheticImages("degraded", {"family": "leaves"}, shape, 0), "synthetic.options: option of degraded: unknown generator 'leaves'")


def test_a_class_mean_is_the_mean_of_the_other_versions_of_the_figure() -> None:
    source = SyntheticImages("variations", {"copies": 4}, (1, 12, 12), seed=3)
    indices = np.array([9, 2, 10, 11, 7])  # versions of figures 2, 0, 2, 2, 1
    images, means = source.with_class_means(indices)
    assert torch.equal(images, source.batch(indices))
    for index, mean in zip(indices.tolist(), means, strict=True):
        others = [other for other in range(index // 4 * 4, index // 4 * 4 + 4) if other != index]
        assert torch.allclose(mean, source.batch(others).mean(dim=0), atol=1e-6)


def test_a_hint_of_nearest_versions_is_their_mean() -> None:
    source = SyntheticImages("variations", {"copies": 6}, (1, 12, 12), seed=3)
    indices = np.array([9, 2, 10, 11])
    _, means = source.with_class_means(indices, 2)
    for index, mean in zip(indices.tolist(), means, strict=True):
        image = source.batch([index])
        others = source.batch([other for other in range(index // 6 * 6, index // 6 * 6 + 6) if other != index])
        nearest = (others - image).flatten(1).norm(dim=1).argsort()[:2]
        assert torch.allclose(mean, others[nearest].mean(dim=0), atol=1e-6)
    assert torch.equal(source.with_class_means(indices, 5)[1], source.with_class_means(indices)[1])


def test_hints_have_the_noise_that_was_asked_for() -> None:
    config = HintsConfig(synthetic_blur=(0, 0), synthetic_fade=(1, 1), synthetic_noise=(0.1, 0.3))
    hints = synthetic_hints(torch.zeros(500, 1, 20, 20), config, np.random.default_rng(0))
    deviations = hints.flatten(1).std(dim=1).numpy()
    assert kstest((deviations - 0.1) / 0.2, "uniform").pvalue > 1e-3
    assert hints.abs().max() <= 1


def test_hints_from_classes_need_a_family_that_draws_classes() -> None:
    config = RunConfig(hints=HintsConfig(synthetic_from="class"))
    refused(lambda: synthetic_batches(config, stages_of(config, "synthetic")[0]), "hints.synthetic_from", "dead_leaves")
