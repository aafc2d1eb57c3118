"""Where tensors live and who shares the work: device, precision, processes. Nothing here changes a result but by rounding."""

import atexit
import ctypes
import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor

from dpsyngen.config import ComputeConfig
from dpsyngen.errors import InputError
from dpsyngen.launcher import refuse_unsupported

# How long processes wait for each other before they give up. The main process writes, prices and measures while the others wait; one that
# dies is noticed by the launcher at once.
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Piece:
    """What a process computes of one chunk. Its randomness is drawn for all of the chunk, so that it doesn't matter who computes what."""

    chunk: int
    entries: np.ndarray
    """The whole chunk of the logical batch."""
    part: slice
    """What of these is to be computed, with start and stop."""

    def __len__(self) -> int:
        return int(self.part.stop - self.part.start)


@dataclass(frozen=True)
class Compute:
    """One process's place in the run."""

    device: torch.device
    rank: int = 0
    processes: int = 1
    bf16: bool = False

    @classmethod
    def start(cls, config: ComputeConfig) -> "Compute":
        """Join the processes that `accelerate launch` started, if any, and choose the device.

        InputError if it isn't there or accelerate was told what can't be done. A precision of auto, which the scripts settle
        beforehand, is float32 here.
        """
        refuse_unsupported()
        _expect_device(config.device)
        _keep_freed_memory()
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        on_cpu = config.device == "cpu" or (config.device == "auto" and not accelerated)
        state = PartialState(cpu=on_cpu, timeout=_PATIENCE)  # without cpu=True launched processes would stay apart
        if state.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise InputError(f"accelerate launch: expected CPUs or CUDA devices, got {state.distributed_type.value}")
        several = state.num_processes > 1
        if state.backend == "gloo":
            atexit.register(_leave)
        device = state.device if config.device in ("auto", "cuda") or several else torch.device(config.device)
        device = torch.device("cpu") if device.type == "cpu" else device  # accelerate numbers it, which not every library takes
        return cls(device, state.process_index, state.num_processes, config.precision == "bf16")

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` pieces of work are this process's: its rank, rank + processes, ..., possibly none."""
        return range(self.rank, count, self.processes)

    def deal(self, batch: np.ndarray, config: ComputeConfig, *, whole_chunks: bool = False) -> Iterator[list[Piece]]:
        """This process's part of a logical batch, as much at a time as is to be computed together: `config.chunks_at_once` chunks at most.

        Chunk i is the i-th piece of `config.chunk_size` entries, the last one what is left. Process r has the r-th of `processes` equal parts
        of the batch, so it may share a chunk with the next; with `whole_chunks` parts end where chunks do.
        """
        size, unit = config.chunk_size, config.chunk_size if whole_chunks else 1
        units = -(-len(batch) // unit)
        start, stop = (min(units * rank // self.processes * unit, len(batch)) for rank in (self.rank, self.rank + 1))
        together: list[Piece] = []
        for chunk in range(start // size, -(-stop // size)) if start < stop else ():
            first = chunk * size
            piece = Piece(chunk, batch[first : first + size], slice(max(0, start - first), min(size, stop - first)))
            if sum(map(len, together)) + len(piece) > size * config.chunks_at_once:
                yield together
                together = []
            together.append(piece)
        if together:
            yield together

    def autocast(self) -> AbstractContextManager[None]:
        """The context in which a network computes: bf16 where the config says so."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def sum_over_processes(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor summed over all processes, in one message; tensors of one type, whose type and device the sums have."""
        if self.processes == 1:
            return tensors
        flat = torch.cat([tensor.flatten() for tensor in tensors.values()]).to(self.device)
        torch.distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors.values()])
        return {name: part.view_as(tensor).to(tensor.device) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}

    def joined_digest(self, digest: str) -> str:
        """One digest of those, hexadecimal and of one length, that the processes call this with: the same on all, another if any of them is."""
        if self.processes == 1:
            return digest
        own = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)
        rows = torch.zeros(self.processes, len(own), dtype=torch.int32)
        rows[self.rank] = own
        return hashlib.sha256(bytes(self.sum_over_processes({"rows": rows})["rows"].flatten().tolist())).hexdigest()

    @torch.no_grad()
    def take_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors on `device` the values that they have on the main process, in place."""
        if self.processes > 1:
            for tensor in tensors:
                sent = tensor.contiguous()
                torch.distributed.broadcast(sent, src=0)
                tensor.copy_(sent)

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
            torch.distributed.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


def _leave() -> None:
    """End gloo's threads before the interpreter ends, or now and then the process aborts and its launcher ends the others with it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
