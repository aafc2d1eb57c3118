"""One result per (config, seed, key): after 20 private steps the weights are the same however many chunks are computed at once.

On any number of processes as well: test_launch.py.
"""

from pathlib import Path

import pytest
import torch
from running import KEY, WEIGHTS, call, private_images, small, train_main
from safetensors.torch import load_file
from torch import Tensor

STEPS = 20


def arguments(tmp_path: Path, run: str, *flags: object) -> list[object]:
    """Batches of 100 in chunks of 8, so that 3 processes have 4 or 5 each, one of them short."""
    return small(
        tmp_path / "images.npz", "--privacy.unsafe_fixed_key", KEY, "--stages.variant=dpdm", f"--private.steps={STEPS}",
        "--private.learning_rate=1e-3", "--compute.chunk_size=8", "--compute.checkpoint_every=100", "--tracking.log_every=10",
        "--run", tmp_path / run, *flags,
    )  # fmt: skip


def whole(tmp_path: Path, run: str) -> Tensor:
    tensors = load_file(tmp_path / run / WEIGHTS)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)]).double()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    tmp_path = tmp_path_factory.mktemp("one_result")
    private_images(tmp_path / "images.npz")
    call(train_main, *arguments(tmp_path, "alone"))
    return tmp_path, whole(tmp_path, "alone")


@pytest.mark.parametrize("together", [3, 100])
def test_chunks_at_once_change_nothing_but_rounding(reference: tuple[Path, Tensor], together: int) -> None:
    tmp_path, expected = reference
    call(train_main, *arguments(tmp_path, f"{together} at once", f"--compute.chunks_at_once={together}"))
    difference = (whole(tmp_path, f"{together} at once") - expected).norm()
    assert 0 < difference <= 1e-5 * expected.norm()  # rounding there is: the option reaches the computation


def test_another_chunk_size_is_another_result(reference: tuple[Path, Tensor]) -> None:
    tmp_path, expected = reference
    call(train_main, *arguments(tmp_path, "other chunks", "--compute.chunk_size=16"))
    assert (whole(tmp_path, "other chunks") - expected).norm() > 2e-4 * expected.norm()  # other draws, the same noise
