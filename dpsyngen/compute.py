"""Where tensors live and who shares the work: device, precision, processes. Nothing here changes a result but by rounding."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed
from accelerate import PartialState
from torch import Tensor

from dpsyngen.config import ComputeConfig
from dpsyngen.errors import InputError


@dataclass(frozen=True)
class Compute:
    """One process's place in the run."""

    device: torch.device
    rank: int = 0
    processes: int = 1
    bf16: bool = False

    @classmethod
    def start(cls, config: ComputeConfig) -> "Compute":
        """Join the processes that `accelerate launch` started, if any, and choose the device; InputError if it isn't there."""
        _expect_device(config.device)
        _keep_freed_memory()
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        state = PartialState(cpu=config.device == "cpu" or (config.device == "auto" and not accelerated))  # or launched processes stay apart
        several = state.num_processes > 1
        device = state.device if config.device in ("auto", "cuda") or several else torch.device(config.device)
        device = torch.device("cpu") if device.type == "cpu" else device  # accelerate numbers it, which not every library takes
        return cls(device, state.process_index, state.num_processes, config.precision == "bf16")

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def deal(self, batch: np.ndarray, config: ComputeConfig) -> Iterator[dict[int, np.ndarray]]:
        """This process's chunks of a logical batch, by number, as many at a time as are to be computed together.

        Chunk i is the i-th piece of `config.chunk_size` entries, the last one what is left; process r has chunks r, r + processes, ...
        """
        mine = range(self.rank, -(-len(batch) // config.chunk_size), self.processes)
        for first in range(0, len(mine), config.chunks_at_once):
            numbers = mine[first : first + config.chunks_at_once]
            yield {number: batch[number * config.chunk_size : (number + 1) * config.chunk_size] for number in numbers}

    def autocast(self) -> AbstractContextManager[None]:
        """The context in which a network computes: bf16 where the config says so."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def sum_over_processes(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor summed over all processes, float32, in one message."""
        if self.processes == 1:
            return tensors
        flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
        torch.distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors.values()])
        return {name: part.view_as(tensor) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}

    def largest_over_processes(self, number: int) -> int:
        """The largest of the numbers that the processes call this with; the same on all of them."""
        if self.processes == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return int(largest)

    def wait(self) -> None:
        """Let all processes come to this point."""
        if self.processes > 1:
            torch.distributed.barrier()


def _expect_device(device: str) -> None:
    """Raise InputError if this machine doesn't have the device that compute.device names."""
    if device == "mps" and not torch.backends.mps.is_available():
        raise InputError("compute.device: expected a device of this machine, got 'mps', and there is none")
    if device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(device.partition(":")[2] or 0) >= count:
            raise InputError(f"compute.device: expected a device of this machine, got {device!r}, and there are {count} CUDA devices")


def _keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of giving them back to the kernel.

    By default each tensor of a few megabytes is mapped, zeroed page by page and unmapped again; on a CPU that costs a private
    step up to a third of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)
