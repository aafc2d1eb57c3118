"""Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747): found on this machine, or downloaded once and checked."""

import gzip
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from tqdm import tqdm

from dpsyngen.config import DataConfig
from dpsyngen.data.arrays import dataset_from_arrays
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.idx import read_idx
from dpsyngen.errors import InputError

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""
DOWNLOAD_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

# Of the uncompressed content: the same images are about in several gzip files.
_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_TIMEOUT_SECONDS = 30


def load_fashion_mnist(config: DataConfig, prefix: str) -> ImageDataset:
    """The 60,000 training (prefix "train") or 10,000 test images ("t10k"), in the order of the original files."""
    images_file, labels_file = find_files(config.path, prefix)
    return dataset_from_arrays(read_idx(images_file), read_idx(labels_file), config, where="fashion_mnist", class_names=CLASS_NAMES)


def find_files(path: str | None, prefix: str, system_folder: Path = SYSTEM_FOLDER, url: str = DOWNLOAD_URL) -> tuple[Path, Path]:
    """The files of images and labels: in `path` if it is given; otherwise in the system's folder, the user's cache, or at the url.

    What is downloaded goes to the cache. Raises InputError that says where was looked and what to do.
    """
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    if path is not None:
        found = _files_in(Path(path).expanduser(), names)
        if found is None:
            raise InputError(f"data.path: expected a folder with {names[0]} and {names[1]}, raw or as .gz, got {path}")
        return found
    cache = _cache_folder()
    for folder in (system_folder, cache):
        if (found := _files_in(folder, names)) is not None:
            return found
    try:
        images_file, labels_file = (_download(name, cache, url) for name in names)
    except (OSError, EOFError, ValueError, zlib.error, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise InputError(
            f"data.source: fashion_mnist is neither in {system_folder} nor in {cache}, and the download from {url} failed ({error}): "
            "apt-get install dataset-fashion-mnist, or set data.path to a folder with its four idx files"
        ) from error
    return images_file, labels_file


def _files_in(folder: Path, names: tuple[str, str]) -> tuple[Path, Path] | None:
    """The two files, raw or .gz, if the folder has both."""
    found = [file for name in names for file in (folder / name, folder / f"{name}.gz") if file.is_file()]
    by_name = {file.name.removesuffix(".gz"): file for file in found}
    return (by_name[names[0]], by_name[names[1]]) if len(by_name) == len(names) else None


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dpsyngen" / "fashion-mnist"


def _download(name: str, folder: Path, url: str) -> Path:
    """Fetch one file into the folder, where it appears complete and checked or not at all. Raises ValueError on other content."""
    with urllib.request.urlopen(f"{url}{name}.gz", timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310 (the scheme is fixed, the content checked)
        size = int(response.headers.get("Content-Length", 0)) or None
        chunks = []
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"downloading {name}.gz", disable=None) as bar:
            while chunk := response.read(1 << 16):
                chunks.append(chunk)
                bar.update(len(chunk))
    data = b"".join(chunks)
    if hashlib.sha256(gzip.decompress(data)).hexdigest() != _SHA256[name]:
        raise ValueError(f"{name}.gz has the wrong SHA-256")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.gz"
    partial = folder / f"{name}.gz.{os.getpid()}.part"
    partial.write_bytes(data)
    os.replace(partial, target)
    return target
