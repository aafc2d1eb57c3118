"""runs/NAME/averages/: snapshots of two power-function averages of the weights, taken during the private phase.

Like the weights they are averages of, they are post-processing of private steps.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dpsyngen.checkpoint import Checkpoint, save_checkpoint
from dpsyngen.power_average import TRACKED, gamma_of, kept


def tensor_name(sigma_rel: float, parameter: str) -> str:
    """The name of a parameter's average in a snapshot."""
    return f"{sigma_rel:.2f}.{parameter}"


@dataclass(frozen=True)
class Snapshots:
    """The averages as they run along, and when and where they are written. With `count` 0 there are none, and nothing is done."""

    directory: Path
    count: int
    """How many in a whole phase, evenly spaced; at most one a step."""
    steps: int
    """The phase's length as planned."""
    running: dict[str, Tensor]
    """Both averages of each parameter, by `tensor_name`."""

    @classmethod
    def of(cls, directory: Path, count: int, steps: int, module: nn.Module) -> "Snapshots":
        """Before the first step, or to be given the averages of a checkpoint."""
        lengths = TRACKED if count else ()
        return cls(directory, count, steps, {
            tensor_name(sigma_rel, name): parameter.detach().clone() for sigma_rel in lengths for name, parameter in module.named_parameters()
        })  # fmt: skip

    def update(self, step: int, module: nn.Module) -> None:
        """Take in the weights after step `step` = 1, 2, ..."""
        if not self.running:
            return
        parameters = dict(module.named_parameters())
        for sigma_rel in TRACKED:
            averages = [self.running[tensor_name(sigma_rel, name)] for name in parameters]
            torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters.values()], 1 - kept(sigma_rel, step))

    def due(self, step: int) -> bool:
        """Whether one of the evenly spaced steps is this."""
        return step * self.count // self.steps > (step - 1) * self.count // self.steps

    def write(self, step: int) -> None:
        """Write the snapshot after `step`, complete or absent; InputError if it can't be written."""
        if self.running:
            state = {"step": step, "gammas": {f"{sigma_rel:.2f}": gamma_of(sigma_rel) for sigma_rel in TRACKED}}
            save_checkpoint(self.directory, step, Checkpoint(self.running, state), keep=None)
