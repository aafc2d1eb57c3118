"""Inception's features as clean-fid computes them (Parmar, Zhang and Zhu, arXiv 2104.11222), and where its weights come from."""

import hashlib
import http.client
import os
import threading
import urllib.request
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dpsyngen.compute import Compute
from dpsyngen.evaluation.batches import in_batches
from dpsyngen.networks.torchvision_compat import import_torchvision

WEIGHTS_FILE = "inception-2015-12-05.pt"
CLEAN_FID_FOLDER = Path("/tmp")  # noqa: S108 - only the genuine file is read from there
"""Where clean-fid itself looks, and leaves what it downloads."""
WEIGHTS_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{WEIGHTS_FILE}"
_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
_CONNECT_SECONDS = 5.0  # for name lookup and connection together; without a network, either may hang for minutes
_BATCH = 50


def find_weights(url: str = WEIGHTS_URL, folders: tuple[Path, ...] | None = None) -> Path:
    """The folder that holds Inception's weights, after a download if need be.

    Looks in `folders`, by default clean-fid's and then the user's cache; downloads into the last. Only the file with the known
    SHA-256 will do. Raises OSError that says all this, within a few seconds where there is no network, if they can't be had.
    """
    folders = folders or (CLEAN_FID_FOLDER, _cache_folder())
    for folder in folders:
        if (file := folder / WEIGHTS_FILE).is_file() and _is_genuine(file):
            return folder
    try:
        _download(url, folders[-1] / WEIGHTS_FILE)
    except (OSError, http.client.HTTPException) as error:
        places = " nor in ".join(map(str, folders))
        raise OSError(f"{WEIGHTS_FILE} is neither in {places}, and the download from {url} failed ({error})") from error
    return folders[-1]


def _download(url: str, target: Path) -> None:
    """Fetch the weights; the file appears complete and checked or not at all."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with _connect(url) as response:
            target.parent.mkdir(parents=True, exist_ok=True)
            size = int(response.headers.get("Content-Length", 0)) or None
            with partial.open("wb") as file, tqdm(total=size, unit="B", unit_scale=True, desc="downloading Inception", disable=None) as bar:
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
        if not _is_genuine(partial):
            raise OSError("wrong SHA-256")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dpsyngen" / "inception"


def _is_genuine(file: Path) -> bool:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == _SHA256


def _connect(url: str) -> Any:
    """Open the url, or raise within a few seconds: in a thread, because a name lookup can't be given a time limit."""
    outcome: list[Any] = []

    def attempt() -> None:
        try:
            outcome.append(urllib.request.urlopen(url, timeout=_CONNECT_SECONDS))  # noqa: S310 - the callers' own address
        except (OSError, http.client.HTTPException) as error:
            outcome.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS)
    if not outcome:
        raise TimeoutError(f"no answer within {_CONNECT_SECONDS:.0f} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def load_inception(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Inception from `find_weights`, as a function of float32 [N, 3, 299, 299] in [0, 255] that gives features [N, 2048]."""
    import_torchvision()
    from cleanfid.inception_torchscript import InceptionV3W

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch deprecates the format that the published weights are in
        model: torch.nn.Module = InceptionV3W(str(folder), download=False)
    return model.to(device).eval()


def inception_features(
    images: np.ndarray, inception: Callable[[Tensor], Tensor], compute: Compute, description: str | None = None
) -> np.ndarray:
    """Features float32 [N, 2048] of images uint8 [N, C, H, W], resized to 299 x 299 by clean-fid's bicubic filter.

    Grayscale images are shown as gray RGB. Processes share the work; with a description there is a progress bar.
    """
    import_torchvision()
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")

    def prepare(image: np.ndarray) -> np.ndarray:
        rgb = np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3))
        return np.asarray(resize(rgb), dtype=np.float32).transpose(2, 0, 1)

    with ThreadPoolExecutor() as threads:  # Pillow resizes outside of Python's lock

        def features(batch: np.ndarray) -> Tensor:
            return inception(torch.from_numpy(np.stack(list(threads.map(prepare, batch)))).to(compute.device))

        return in_batches(features, images, _BATCH, compute, description)
