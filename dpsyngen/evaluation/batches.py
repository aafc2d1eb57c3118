"""Features of many images, the batches shared out to the processes."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dpsyngen.compute import Compute


def in_batches(
    function: Callable[[np.ndarray], Tensor], images: np.ndarray, size: int, compute: Compute, description: str | None = None
) -> np.ndarray:
    """function of images uint8 [N, C, H, W], `size` of them at a time: its float32 [n, F] joined to [N, F] on every process.

    Batches are those of a single process and only dealt to the others, so results are the same to the bit on processes with equal devices
    and threads; a sum with zeros changes none. With a description the main process shows a progress bar.
    """
    starts = range(0, len(images), size)
    mine = [starts[index] for index in compute.share(len(starts))]
    with torch.inference_mode():
        bar = tqdm(mine, desc=description, leave=False, disable=None if description and compute.is_main else True)
        parts = {start: function(images[start : start + size]).float().cpu() for start in bar}
        whole = torch.zeros(len(images), compute.largest_over_processes(max((part.shape[1] for part in parts.values()), default=0)))
        for start, part in parts.items():
            whole[start : start + len(part)] = part
        return compute.sum_over_processes({"features": whole})["features"].numpy()
