"""Images that stay on disk: every source against the same pictures, its memory, its refusals, and the real train.py on it."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from running import ENVIRONMENT, KEY, ROOT, TINY, call, refusal, train_main, weights

from dpsyngen.compute import Compute
from dpsyngen.config import DataConfig, PrivateConfig, RunConfig
from dpsyngen.data import Dataset, load_held_out, load_test, load_train
from dpsyngen.data.zip_directory import members
from dpsyngen.denoiser import build_denoiser
from dpsyngen.errors import InputError
from dpsyngen.moments import release_moments
from dpsyngen.privacy.plan import PrivacyPlan
from dpsyngen.privacy.randomness import SecureStream

CLASSES = ("cat", "dog", "eel")
SIZE = 8


def pictures(count: int = 60) -> dict[str, np.ndarray]:
    """Path below the root: grayscale image."""
    rng = np.random.default_rng(0)
    return {f"{CLASSES[i % 3]}/{'deep/' if i % 7 == 0 else ''}{i}.png": rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8) for i in range(count)}


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    return stream.getvalue()


def write_folder(root: Path, images: dict[str, np.ndarray]) -> Path:
    for name, image in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(image))
    return root


def write_zip(path: Path, images: dict[str, np.ndarray], **extra: bytes) -> Path:
    """Every other member deflated, the others stored."""
    with zipfile.ZipFile(path, "w") as archive:
        contents = {name: png(image) for name, image in images.items()} | extra
        for i, (name, content) in enumerate(contents.items()):
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED)
    return path


def write_tar(path: Path, files: dict[str, bytes], **options: Any) -> Path:
    with tarfile.open(path, **({"mode": "w"} | options)) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(images: dict[str, np.ndarray]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for name, image in images.items():
        stem = name.removesuffix(".png")
        files |= {f"{stem}.json": b"{}", f"{stem}.png": png(image), f"{stem}.cls": f"{CLASSES.index(name.split('/')[0])}\n".encode()}
    return files


def write_shards(folder: Path, images: dict[str, np.ndarray]) -> Path:
    """Three shards with a third of the images each."""
    folder.mkdir(parents=True)
    for i in range(3):
        write_tar(folder / f"part-{i:03}.tar", samples(dict(list(images.items())[i::3])))
    return folder


def write_npy(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    return folder


def written(source: str, folder: Path, images: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    match source:
        case "folder":
            return write_folder(folder / "images", images)
        case "zip":
            return write_zip(folder / "images.zip", images)
        case "webdataset":
            return write_shards(folder / "shards", images)
    return write_npy(folder / "arrays", np.stack(list(images.values())), np.array([CLASSES.index(name.split("/")[0]) for name in images], np.int16))


def config_of(source: str, path: object, **options: Any) -> DataConfig:
    defaults: dict[str, Any] = {"source": source, "path": str(path), "image_size": SIZE, "num_classes": 3, "expected_size": 60, "in_memory": "never"}
    return DataConfig(**(defaults | options))


def in_order(source: str, images: dict[str, np.ndarray]) -> list[str]:
    """The order that the documentation promises: arrays as they are, names by their SHA-256, of which shards leave out the suffix."""
    if source == "npy":
        return list(images)
    return sorted(images, key=lambda name: hashlib.sha256((name.removesuffix(".png") if source == "webdataset" else name).encode()).digest())


def everything(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    return dataset.read(np.arange(len(dataset)))


def refused(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


SOURCES = ["folder", "zip", "webdataset", "npy"]


# --- the same pictures from every source ---


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_pictures_in_the_promised_order(tmp_path: Path, source: str) -> None:
    images = pictures()
    dataset = load_train(config_of(source, written(source, tmp_path, images)))
    order = in_order(source, images)
    assert len(dataset) == len(order)
    assert dataset.image_shape == (1, SIZE, SIZE)
    assert dataset.class_names == (CLASSES if source in ("folder", "zip") else ("0", "1", "2"))
    read, labels = everything(dataset)
    assert read.dtype == np.uint8 and labels.dtype == np.int64
    assert np.array_equal(read[:, 0], [images[name] for name in order])
    assert labels.tolist() == [CLASSES.index(name.split("/")[0]) for name in order]


@pytest.mark.parametrize("source", SOURCES)
def test_in_memory_or_not_is_the_same(tmp_path: Path, source: str) -> None:
    path = written(source, tmp_path, pictures())
    for held_out in (0, 25):
        sets = [load_train(config_of(source, path, in_memory=where, held_out=held_out)) for where in ("never", "always", "auto")]
        for indices in (np.arange(60 - held_out), np.array([7, 8, 9, 3, 34, 3, 0]), np.array([], dtype=np.int64)):
            reads = [dataset.batch(indices) for dataset in sets]
            assert all(np.array_equal(reads[0][part], other[part]) for other in reads[1:] for part in (0, 1))
            assert reads[0][0].shape == (len(indices), 1, SIZE, SIZE)
        parts = [load_held_out(config_of(source, path, in_memory=where, held_out=25)) for where in ("never", "always")]
        assert np.array_equal(parts[0].images, parts[1].images)
        assert np.array_equal(parts[0].images, everything(load_train(config_of(source, path)))[0][35:])
        inner = sets[0].slice(5, 30).slice(2, 4)
        assert np.array_equal(everything(inner)[0], sets[1].read(np.array([7, 8]))[0])


def test_images_of_arrays_are_fitted_as_those_in_memory(tmp_path: Path) -> None:
    colour = np.random.default_rng(1).integers(0, 256, (9, 20, 24, 3), dtype=np.uint8)
    path = write_npy(tmp_path, colour, np.arange(9).reshape(9, 1))
    np.savez(tmp_path / "same.npz", images=colour, labels=np.arange(9))
    options = {"num_classes": 9, "image_size": 16}
    for channels in (1, 3):
        disk, memory = (load_train(config_of(source, place, channels=channels, **options)) for source, place in
                        (("npy", path), ("npz", tmp_path / "same.npz")))  # fmt: skip
        assert all(np.array_equal(one, other) for one, other in zip(everything(disk), everything(memory), strict=True))
    assert load_train(config_of("npy", path, num_classes=0)).read(np.arange(9))[1].tolist() == [0] * 9


@pytest.mark.parametrize("source", ["zip", "webdataset"])
def test_images_without_classes(tmp_path: Path, source: str) -> None:
    dataset = load_train(config_of(source, written(source, tmp_path, pictures()), num_classes=0))
    assert dataset.class_names == ("image",)
    assert (len(dataset), dataset.read(np.arange(60))[1].tolist()) == (60, [0] * 60)


def test_shards_are_named_by_a_range_a_folder_or_one_by_one(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", pictures())
    whole = everything(load_train(config_of("webdataset", folder)))[0]
    assert np.array_equal(everything(load_train(config_of("webdataset", folder / "part-{000..002}.tar")))[0], whole)
    assert len(load_train(config_of("webdataset", folder / "part-{001..002}.tar"))) == 40
    assert len(load_train(config_of("webdataset", folder / "part-001.tar"))) == 20
    refused(lambda: load_train(config_of("webdataset", folder / "part-{000..003}.tar")), "data.path", "part-003.tar")


def test_the_directory_of_a_zip_is_read_as_zipfile_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"something before")
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK, but no end"
        for i, name in enumerate(("a.png", "b/", "b/\u00fc.png", "b/c.png")):
            member = zipfile.ZipInfo(name)
            member.compress_type, member.comment, member.extra = 8 * (i % 2), b"?" * i, bytes([7, 7, i, 0, *range(i)])
            with archive.open(member, "w", force_zip64=name == "b/c.png") as stream:
                stream.write(b"x" * i)
    with zipfile.ZipFile(path) as archive:
        truth = [(member.filename, member.compress_type, member.compress_size, member.header_offset) for member in archive.infolist()]
    assert [(member.name, member.method, member.size, member.where) for member in members(path)] == truth


def test_the_directory_of_a_zip_beyond_the_limits_of_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 400)  # zipfile takes larger offsets for too large
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    images = pictures(9)
    path = write_zip(tmp_path / "a.zip", images)
    assert path.read_bytes().count(b"PK\6\6") == 1
    assert sorted(member.name for member in members(path)) == sorted(images)
    assert np.array_equal(everything(load_train(config_of("zip", path)))[0][:, 0], [images[name] for name in in_order("zip", images)])


def test_a_zip_leaves_out_what_a_folder_leaves_out(tmp_path: Path) -> None:
    extra = {"cat/.hidden.png": b"x", "__MACOSX/cat/0.png": b"x", ".git/a.png": b"x", "cat/notes.txt": b"x", "outside.png": b"x"}
    path = write_zip(tmp_path / "a.zip", pictures(), **extra)
    assert len(load_train(config_of("zip", path))) == 60
    assert len(load_train(config_of("zip", path, class_names=("dog",), num_classes=1))) == 20


@pytest.mark.parametrize("source", ["folder", "zip", "webdataset"])
def test_adding_an_image_changes_the_training_set_by_one(tmp_path: Path, source: str) -> None:
    images = pictures()
    before = everything(load_train(config_of(source, written(source, tmp_path / "before", images), held_out=20)))[0]
    images |= {"cat/new.png": np.full((SIZE, SIZE), 7, np.uint8)}
    after = everything(load_train(config_of(source, written(source, tmp_path / "after", images), held_out=20)))[0]
    assert len(after) == len(before) + 1
    assert {image.tobytes() for image in before} < {image.tobytes() for image in after}


def test_evaluation_reads_a_bounded_number_of_images_from_disk(tmp_path: Path) -> None:
    path = write_npy(tmp_path, np.zeros((70_000, 8, 8), np.uint8), np.arange(70_000))
    test = load_test(config_of("npy", path, test_path=str(path), num_classes=70_000))
    assert test is not None
    assert test.labels.tolist() == [i * 7 // 5 for i in range(50_000)]
    held_out = load_held_out(config_of("npy", path, num_classes=70_000, held_out=100))
    assert held_out.labels.tolist() == list(range(69_900, 70_000))


# --- fingerprints and kept indices ---


@pytest.mark.parametrize("source", SOURCES)
def test_the_fingerprint_changes_with_the_files_even_if_their_times_are_set_back(tmp_path: Path, source: str) -> None:
    path = written(source, tmp_path, pictures())
    config = config_of(source, path)
    first = load_train(config).fingerprint()
    assert load_train(config).fingerprint() == first
    assert load_train(config).slice(0, 59).fingerprint() != first
    file = next(file for file in sorted(path.rglob("*")) if file.suffix in (".png", ".tar", ".npy")) if path.is_dir() else path
    status = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns
    assert load_train(config).fingerprint() != first


@pytest.mark.parametrize("source", ["zip", "webdataset"])
def test_an_index_is_kept_and_made_anew_when_the_files_change(tmp_path: Path, source: str) -> None:
    images = pictures()
    path, kept = written(source, tmp_path, images), tmp_path / "kept"
    config = config_of(source, path, index=str(kept))
    expected = everything(load_train(config_of(source, path)))
    (file,) = [load_train(config) and file for file in kept.iterdir() if file.suffix == ".npy"] if load_train(config) else []
    assert file.stat().st_mode & 0o777 == 0o600 and kept.stat().st_mode & 0o777 == 0o700
    np.save(file, np.load(file)[:30])  # whoever reads this index finds half of the images
    assert np.array_equal(everything(load_train(config))[0], expected[0][:30])
    os.utime(path if path.is_file() else path / "part-000.tar")
    assert np.array_equal(everything(load_train(config))[0], expected[0])
    assert not list(kept.glob("*.partial"))
    refused(lambda: load_train(config_of("npy", tmp_path, index=str(kept))), "data.index")


# --- refusals ---


def test_an_image_is_never_counted_twice(tmp_path: Path) -> None:
    images = pictures(9)
    folder = write_folder(tmp_path / "folder", images)
    (folder / "cat" / "again.png").symlink_to(folder / "dog" / "1.png")
    refused(lambda: load_train(config_of("folder", folder)), "again.png", "dog/1.png", "same file")
    (folder / "cat" / "again.png").unlink()
    os.link(folder / "dog" / "1.png", folder / "cat" / "again.png")
    refused(lambda: load_train(config_of("folder", folder)), "again.png", "same file")
    (folder / "cat" / "again.png").unlink()
    (folder / "fox").symlink_to(folder / "cat")
    refused(lambda: load_train(config_of("folder", folder, num_classes=4)), "fox/", "cat/", "same file")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(write_zip(tmp_path / "a.zip", images), "a") as archive:
        archive.writestr("cat/3.png", png(images["dog/1.png"]))
    refused(lambda: load_train(config_of("zip", tmp_path / "a.zip")), "a.zip: cat/3.png", "two of that name")
    shards = write_shards(tmp_path / "shards", images)
    write_tar(shards / "more.tar", {"dog/1.png": png(images["dog/1.png"]), "dog/1.cls": b"1"})
    refused(lambda: load_train(config_of("webdataset", shards)), "dog/1.png", "two of that name")
    (shards / "more.tar").unlink()
    (shards / "more.tar").symlink_to(shards / "part-000.tar")
    refused(lambda: load_train(config_of("webdataset", shards)), "data.path", "two names")


def test_links_to_files_that_are_there_once_are_followed(tmp_path: Path) -> None:
    store = write_folder(tmp_path / "store", pictures(9))
    for file in store.rglob("*.png"):
        link = tmp_path / "linked" / file.relative_to(store)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    linked, plain = (everything(load_train(config_of("folder", path))) for path in (tmp_path / "linked", store))
    assert np.array_equal(linked[0], plain[0]) and np.array_equal(linked[1], plain[1])


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"a.png": b"x"}, ["a.cls", "found none"]),
        ({"a.cls": b"1"}, ["a.cls", "expected an image"]),
        ({"a.png": b"x", "a.jpg": b"x", "a.cls": b"1"}, ["a.jpg", "one image"]),
        ({"a.png": b"x", "a.cls": b"3"}, ["a.cls", "from 0 to 2"]),
        ({"a.png": b"x", "a.cls": b"-1"}, ["a.cls", "from 0 to 2"]),
        ({"a.png": b"x", "a.cls": b"cat"}, ["a.cls", "an integer"]),
        ({"a.json": b"x"}, ["data.path", "found none"]),
    ],
)
def test_wrong_samples_are_refused(tmp_path: Path, files: dict[str, bytes], parts: list[str]) -> None:
    path = write_tar(tmp_path / "a.tar", files)
    refused(lambda: load_train(config_of("webdataset", path)), "a.tar", *parts)


def test_wrong_tar_files_are_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", samples(pictures(6))).read_bytes()
    config = config_of("webdataset", tmp_path / "a.tar")
    for cut in (1000, 512 * 3 + 10, 512 * 4, 512 * 12):  # in a file, in a header, and between two
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        refused(lambda: load_train(config), "a.tar", "expected")
    (tmp_path / "a.tar").write_bytes(whole[: 512 * 12] + b"garbage" + whole[512 * 12 + 7 :])
    refused(lambda: load_train(config), "a.tar", "damaged at 6144")
    for content in (b"", b"no tar at all" * 100):
        (tmp_path / "a.tar").write_bytes(content)
        refused(lambda: load_train(config), "a.tar", "readable .tar")
    write_tar(tmp_path / "a.tar.gz", samples(pictures(6)), mode="w:gz")
    for path in (tmp_path, tmp_path / "a.tar.gz"):
        refused(lambda path=path: load_train(config_of("webdataset", path)), "a.tar.gz", "not compressed")
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar.gz").read_bytes())
    refused(lambda: load_train(config), "a.tar", "readable .tar")
    (tmp_path / "empty").mkdir()
    refused(lambda: load_train(config_of("webdataset", tmp_path / "empty")), "data.path", "found none")


def test_wrong_zip_files_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", pictures(6))
    refused(lambda: load_train(config_of("zip", tmp_path / "b.zip")), "data.path", "b.zip")
    refused(lambda: load_train(config_of("zip", path, num_classes=4)), "data.num_classes", "expected 3")
    refused(lambda: load_train(config_of("zip", path, class_names=("cat", "cat", "dog"))), "data.class_names")
    refused(lambda: load_train(config_of("zip", path, class_names=("a", "b", "c"))), "data.path", "'a'", "found none")
    refused(lambda: load_train(config_of("zip", path, held_out=6)), "data.held_out")
    path.write_bytes(path.read_bytes()[:-40])
    refused(lambda: load_train(config_of("zip", path)), "a.zip", "readable .zip")
    write_zip(path, {}, **{"cat/a.txt": b"", "dog/a.txt": b"", "eel/a.txt": b""})
    refused(lambda: load_train(config_of("zip", path)), "data.path", "found none")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("cat/a.png", b"x")
    refused(lambda: load_train(config_of("zip", path, num_classes=1)), "a.zip: cat/a.png", "deflated or stored")


@pytest.mark.parametrize(
    ("images", "labels", "parts"),
    [
        (np.zeros((9, 8, 8), np.float32), np.zeros(9, int), ["images.npy", "uint8", "float32"]),
        (np.zeros((9, 3, 8, 8), np.uint8), np.zeros(9, int), ["images.npy", "[9, 3, 8, 8]"]),
        (np.zeros((0, 8, 8), np.uint8), np.zeros(0, int), ["images.npy", "at least one image"]),
        (np.asfortranarray(np.zeros((9, 8, 8), np.uint8)), np.zeros(9, int), ["images.npy", "C order"]),
        (np.zeros((9, 8, 8), np.uint8), np.zeros(8, int), ["labels.npy", "one integer per image", "[8]"]),
        (np.zeros((9, 8, 8), np.uint8), np.zeros(9), ["labels.npy", "one integer per image", "float64"]),
        (np.zeros((9, 8, 8), np.uint8), np.full(9, 3), ["labels.npy", "from 0 to 2"]),
        (np.zeros((9, 8, 8), np.uint8), np.full(9, -1), ["labels.npy", "from 0 to 2"]),
        (np.array([None] * 9), np.zeros(9, int), ["images.npy", "object"]),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, images: np.ndarray, labels: np.ndarray, parts: list[str]) -> None:
    refused(lambda: load_train(config_of("npy", write_npy(tmp_path, images, labels))), *parts)


def test_arrays_that_are_missing_or_cut_are_refused(tmp_path: Path) -> None:
    refused(lambda: load_train(config_of("npy", tmp_path)), "data.path", "images.npy")
    path = write_npy(tmp_path, np.zeros((9, 8, 8), np.uint8), np.zeros(9, int))
    (path / "labels.npy").unlink()
    refused(lambda: load_train(config_of("npy", path)), "labels.npy")
    assert load_train(config_of("npy", path, num_classes=0)).class_names == ("image",)
    whole = (path / "images.npy").read_bytes()
    for content in (whole[:-1], whole + b"x", whole[:20], b"", b"no array"):
        (path / "images.npy").write_bytes(content)
        refused(lambda: load_train(config_of("npy", path, num_classes=0)), "images.npy")


# --- class means ---


class Sums(Compute):
    """One of several processes: keeps what it would send to the others, and gets what they sent."""

    def __init__(self, rank: int, processes: int, others: list[dict[str, torch.Tensor]]) -> None:
        super().__init__(torch.device("cpu"), rank, processes)
        object.__setattr__(self, "others", others)
        object.__setattr__(self, "own", {})

    def sum_over_processes(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.own.update(tensors)
        return {name: torch.stack([tensor, *(other[name] for other in self.others)]).sum(dim=0) for name, tensor in tensors.items()}


class Noise:
    def begin_class_means(self) -> SecureStream:
        return SecureStream(bytes(32))


def test_processes_share_the_images_of_the_class_means(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = write_npy(tmp_path, rng.integers(0, 256, (2500, 8, 8), dtype=np.uint8), rng.integers(0, 3, 2500))
    dataset = load_train(config_of("npy", path))
    config = RunConfig(data=config_of("npy", path, expected_size=2500), private=PrivateConfig(steps=1, epochs=None, batch_size=10))
    plan = PrivacyPlan.with_noise(config, 2500, 1.0)

    def released(compute: Compute) -> torch.Tensor:
        denoiser = build_denoiser(config)
        release_moments(config, plan, Noise(), dataset, compute, denoiser)
        return denoiser.class_means

    means = [released(Compute(torch.device("cpu")))]
    for processes in (2, 5):  # three blocks of images, so some of five have none
        sent: list[dict[str, torch.Tensor]] = []
        for rank in range(1, processes):
            compute = Sums(rank, processes, [])
            released(compute)
            sent.append(compute.own)
        means.append(released(Sums(0, processes, sent)))
    assert torch.equal(means[0], means[1]) and torch.equal(means[0], means[2])


# --- train.py ---


def training(source: str, path: object, *flags: object, in_memory: str = "never") -> list[object]:
    data = {"source": source, "path": path, "image_size": SIZE, "num_classes": 3, "expected_size": 60, "in_memory": in_memory}
    return ["--config", TINY, *(f"--data.{name}={value}" for name, value in data.items()), f"--privacy.unsafe_fixed_key={KEY}", *flags]


def test_train_gives_the_same_weights_from_a_folder_in_memory_and_from_a_zip_on_disk(tmp_path: Path) -> None:
    for run, source, where in (("memory", "folder", "always"), ("disk", "zip", "never")):
        call(train_main, *training(source, written(source, tmp_path / source, pictures()), "--run", tmp_path / run, in_memory=where))
    assert weights(tmp_path / "memory") == weights(tmp_path / "disk")


@pytest.mark.parametrize("source", ["folder", "zip", "webdataset"])
def test_an_image_that_is_damaged_during_training_ends_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    path = written(source, tmp_path, pictures())
    file = path if source == "zip" else path / {"folder": "eel/2.png", "webdataset": "part-002.tar"}[source]
    content = file.read_bytes()
    place = content.index(png(pictures()["eel/2.png"])) + 30
    file.write_bytes(content[:place] + bytes(20) + content[place + 20 :])  # which no index sees
    run, flags = tmp_path / "run", ["--hints.kind=none", "--private.batch_size=60"]  # every image is in the first private step
    message = refusal(train_main, monkeypatch, capsys, *training(source, path, "--run", run, *flags))
    assert message.startswith(f"{path}{'/part-002.tar' if source == 'webdataset' else ''}{'/' if source == 'folder' else ': '}eel/2.png: expected")
    assert (run / "private" / "journal.jsonl").read_text().count('"step": 0') == 1


def sparse(folder: Path, count: int) -> Path:
    """`count` black images 28 x 28 that take no disk."""
    folder.mkdir()
    for name, shape in (("images", (count, 28, 28)), ("labels", (count,))):
        with (folder / f"{name}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.truncate(file.tell() + int(np.prod(shape)))
    return folder


TRAIN_TWICE = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
from running import call, train_main
for arguments in json.loads(sys.argv[2]):
    call(train_main, *arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak)
"""


def test_memory_is_the_same_for_ten_thousand_and_ten_million_images(tmp_path: Path) -> None:
    runs = []
    for count in (10**4, 10**7):
        path = sparse(tmp_path / str(count), count)
        flags = [f"--data.expected_size={count}", "--data.image_size=28", "--data.num_classes=10", "--hints.kind=none", "--stages.variant=dpdm",
                 "--private.batch_size=64", f"--data.held_out={count // 10}", "--run", tmp_path / f"run{count}"]  # fmt: skip
        runs.append([str(argument) for argument in training("npy", path, *flags, in_memory="auto")])
    command = [sys.executable, "-c", TRAIN_TWICE, str(ROOT / "tests"), json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    small, large = (int(line) for line in done.stdout.splitlines() if line.isdigit())
    assert large < 1.08 * small  # half of that is the accountant; eight bytes an image would be 16 %
