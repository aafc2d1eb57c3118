"""How far a run has come: weights, averaged weights, optimiser, position; saved and taken up again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from dpsyngen.checkpoint import Checkpoint, discard_after, load_newest, save_checkpoint
from dpsyngen.compute import Compute
from dpsyngen.denoiser import Denoiser, RoutedDenoiser
from dpsyngen.run_directory import RunDirectory, append_line, drop_cut_line
from dpsyngen.tracking import Trackers

PHASES = {"synthetic": 0, "central": 5 * 10**7, "private": 10**8}
"""The phases in their order, and from where on the steps of each are counted in the numbers of checkpoints."""


@dataclass
class Progress:
    """The state of a run between two steps. `step` counts within `phase`."""

    run: RunDirectory
    compute: Compute
    denoiser: Denoiser | RoutedDenoiser
    trackers: Trackers
    checkpoints_kept: int
    phase: str = "synthetic"
    step: int = 0
    has_class_means: bool = False
    attempt: int | None = None
    """The attempt of the journal that has computed the weights; None before the first."""
    _restored: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the checkpoint that was resumed from, until the optimiser and the average have taken theirs."""

    @property
    def number(self) -> int:
        """The number of a checkpoint that is written now; it grows over the run."""
        return (PHASES[self.phase] + self.step) * 2 + self.has_class_means

    def resume(self) -> None:
        """Take over the newest checkpoint, if there is one, and take back log lines written after it."""
        found = load_newest(self.run.checkpoints, quiet=not self.compute.is_main)
        position: dict[str, Any] = {"phase": self.phase, "step": 0, "has_class_means": False, "metrics_size": 0}
        if found is not None:
            position = found.state
            self.denoiser.load_state_dict(_under("denoiser.", found.tensors))
            self._restored = found.tensors
        self.phase, self.step, self.has_class_means = position["phase"], position["step"], position["has_class_means"]
        self.attempt = position.get("attempt")  # earlier versions didn't write it
        if self.compute.is_main:
            discard_after(self.run.checkpoints, self.number)
            discard_after(self.run.averages, self.step if self.phase == "private" else 0)
            self.run.rewind_metrics(position["metrics_size"])
            drop_cut_line(self.run.timings)
        self.compute.wait()  # all have read the same checkpoint before one writes the next

    def take_up(self, optimizer: torch.optim.Optimizer, average: AveragedModel, powers: dict[str, Tensor]) -> None:
        """Give optimiser and averages, `powers` in place, the state they had when the resumed checkpoint was written in mid-phase."""
        tensors, self._restored = self._restored, {}
        averaged = _under("average.", tensors)
        if averaged:
            average.load_state_dict(averaged)
            for name, tensor in powers.items():
                tensor.copy_(tensors[f"power.{name}"])
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _under("optimizer.", tensors).items():
                index, entry = name.split(".")
                moments.setdefault(int(index), {})[entry] = tensor
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})

    def save(
        self, optimizer: torch.optim.Optimizer | None = None, average: AveragedModel | None = None, powers: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a checkpoint; the main process does, and the others wait. Without arguments: between two phases."""
        if self.compute.is_main:
            tensors = self._weights()
            if optimizer is not None and average is not None:
                tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
                tensors |= {f"power.{name}": tensor for name, tensor in (powers or {}).items()}
                for index, moments in optimizer.state_dict()["state"].items():
                    tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
            position = self._position | {"attempt": self.attempt, "metrics_size": self.run.metrics_size}
            save_checkpoint(self.run.checkpoints, self.number, Checkpoint(tensors, position), self.checkpoints_kept)
        self.compute.wait()

    def digest(self) -> str:
        """Of all that the next step starts from on any process: position, weights, and what optimiser and average are to take up."""
        return self.compute.joined_digest(Checkpoint(self._restored | self._weights(), self._position).digest)

    def enter(self, phase: str) -> None:
        """Stand at the beginning of the next phase, and save that."""
        self.phase, self.step = phase, 0
        self.save()

    def log(self, values: dict[str, float], seconds: float) -> None:
        """One line in metrics.jsonl, for trackers too, and the time apart, so that metrics of a replayed run are the same bytes."""
        if self.compute.is_main:
            position = {"phase": self.phase, "step": self.step}
            append_line(self.run.metrics, position | values)
            append_line(self.run.timings, position | {"seconds": round(seconds, 4)}, private=True)
            self.trackers.follow(self.phase)

    @property
    def _position(self) -> dict[str, Any]:
        return {"phase": self.phase, "step": self.step, "has_class_means": self.has_class_means}

    def _weights(self) -> dict[str, Tensor]:
        return {f"denoiser.{name}": tensor for name, tensor in self.denoiser.state_dict().items()}


class StepBar(tqdm):
    """The bar of a phase: steps, time, images a second, and the metrics that were logged last, epsilon among them.

    The rate is steps a second times the expected batch size; what was drawn for a private step isn't shown.
    """

    batch_size = 0

    @classmethod
    def of(cls, phase: str, step: int, last: int, batch_size: int, *, shown: bool) -> "StepBar":
        """A bar that stands at `step`; never shown where there is no terminal."""
        line = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}, {image_rate} images/s{postfix}]"
        bar = cls(initial=step, total=last, desc=f"{phase} phase", bar_format=line, disable=None if shown else True, dynamic_ncols=True)
        bar.batch_size = batch_size
        return bar

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's values, and the rate in images."""
        values = super().format_dict
        taken, seconds = values["n"] - values["initial"], values["elapsed"]
        rate = values["rate"] or (taken / seconds if taken and seconds else None)
        return values | {"image_rate": "?" if rate is None else f"{rate * self.batch_size:,.0f}"}


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights with decay min(decay, (1 + t) / (10 + t)); buffers are copied."""

    def lerp(averages: tuple[Tensor, ...], currents: tuple[Tensor, ...], count: Tensor) -> None:
        warm = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, currents, 1 - warm)

    return AveragedModel(module, multi_avg_fn=lerp)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
