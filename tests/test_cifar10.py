"""CIFAR-10: files in its format are written here from random images, read back, refused where they are damaged, and trained on."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from running import ROOT, TINY, call, evaluate_main, launch, sample_main

from dpsyngen.config import DataConfig
from dpsyngen.data import load_held_out, load_test, load_train
from dpsyngen.data.cifar10 import CLASS_NAMES, META_FILE, TEST_FILES, TRAINING_FILES
from dpsyngen.errors import InputError

FOLDER = "cifar-10-batches-bin"


def write(folder: Path, each: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The folder of the archive with `each` images a file; images uint8 [6 * each, 3, 32, 32] and labels of all, the test file's last."""
    rng = np.random.default_rng(0)
    count = 6 * each
    images, labels = rng.integers(256, size=(count, 3, 32, 32), dtype=np.uint8), rng.permutation(np.arange(count) % 10).astype(np.uint8)
    folder.mkdir(parents=True)
    for number, name in enumerate((*TRAINING_FILES, *TEST_FILES)):
        mine = range(number * each, (number + 1) * each)
        (folder / name).write_bytes(b"".join(bytes([labels[i]]) + images[i].tobytes() for i in mine))
    (folder / META_FILE).write_text("\n".join(CLASS_NAMES) + "\n\n")
    return images, labels


def config(path: Path, **options: object) -> DataConfig:
    return DataConfig(source="cifar10", path=str(path), **({"image_size": 32, "channels": 3, "expected_size": 50} | options))  # type: ignore[arg-type]


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        load_train(config(path))
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.mark.parametrize("form", ["folder", "what holds it", "archive"])
def test_images_and_labels_are_those_of_the_files_in_their_order(form: str, tmp_path: Path) -> None:
    images, labels = write(tmp_path / FOLDER)
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / FOLDER, FOLDER)
    chosen = config(tmp_path / {"folder": FOLDER, "what holds it": ".", "archive": "cifar.tar.gz"}[form])
    train, test = load_train(chosen), load_test(chosen)
    assert test is not None
    assert train.class_names == test.class_names == CLASS_NAMES
    for dataset, mine in ((train, slice(0, 50)), (test, slice(50, 60))):
        read, read_labels = dataset.read(np.arange(len(dataset)))
        assert np.array_equal(read, images[mine]) and np.array_equal(read_labels, labels[mine])
    assert np.array_equal(load_held_out(config(tmp_path, held_out=5)).images, images[45:50])


def test_the_version_for_python_is_refused_and_no_pickle_is_loaded(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps(Exploit()))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    for path in (folder, tmp_path, tmp_path / "cifar-10-python.tar.gz"):
        refused(path, "data.path: expected the binary version of CIFAR-10", "no pickle is ever read")
    assert not (tmp_path / "executed").exists()


def test_damaged_and_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    write(folder)
    whole = (folder / "data_batch_3.bin").read_bytes()
    for content, parts in ((whole[:-1], ("records of 3073 bytes", "30729")), (b"", ("records",)), (b"\x0a" + whole[1:], ("labels from 0 to 9",))):
        (folder / "data_batch_3.bin").write_bytes(content)
        refused(folder, *parts)
    (folder / "data_batch_3.bin").unlink()
    refused(folder, "data.path", "data_batch_3.bin", "cifar-10-binary.tar.gz")
    (folder / "data_batch_3.bin").symlink_to("data_batch_2.bin")
    refused(folder, "data.path", "under two names")
    (folder / "data_batch_3.bin").unlink()
    (folder / "data_batch_3.bin").write_bytes(whole)
    (folder / META_FILE).write_text("\n".join(reversed(CLASS_NAMES)))
    refused(folder, META_FILE, "ten classes")
    refused(tmp_path / "none", "data.path", "none")
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b no archive")
    refused(tmp_path / "cut.tar.gz", "data.path", "cut.tar.gz")


def test_a_link_in_an_archive_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / FOLDER)
    with tarfile.open(tmp_path / "cifar.tar", "w") as archive:
        for name in (*TRAINING_FILES[:4], META_FILE):
            archive.add(tmp_path / FOLDER / name, f"{FOLDER}/{name}")
        link = tarfile.TarInfo(f"{FOLDER}/{TRAINING_FILES[4]}")
        link.type, link.linkname = tarfile.SYMTYPE, TRAINING_FILES[0]
        archive.addfile(link, io.BytesIO())
    refused(tmp_path / "cifar.tar", "data.path", TRAINING_FILES[4])


def test_a_run_trains_samples_and_is_evaluated_on_the_test_batch(tmp_path: Path) -> None:
    write(tmp_path / FOLDER)
    run = tmp_path / "run"
    flags = ("--data.path", tmp_path, "--data.expected_size=50", "--synthetic.options.copies=4")
    made = launch("train", "--config", ROOT / "configs/cifar10/dp_syngen.yaml", "--config", TINY, *flags, "--run", run)
    assert (made.returncode, made.stderr) == (0, "")
    call(sample_main, "--run", run)
    call(evaluate_main, "--run", run)
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert (evaluation["reference_images"], evaluation["class_names"]) == (10, list(CLASS_NAMES))
