"""Trackers: what metrics.jsonl says, sent to accelerate's trackers as well. No more than that leaves, and no earlier than it may.

A tracker stamps each point with the time, and the time of a private step grows with the number of images that were drawn for it. So
the points of the private phase are sent together when it has ended. What trackers collect by themselves (use of CPU and GPU, terminal
output with its rates, program, host) would tell the same and is switched off.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import tracking as accelerate
from accelerate.tracking import GeneralTracker

from dpsyngen.config import RunConfig, TrackingConfig
from dpsyngen.errors import InputError
from dpsyngen.files import write_json, writing
from dpsyngen.run_directory import RunDirectory


def expect_installed(config: TrackingConfig) -> None:
    """Raise InputError, one line, if a tracker's library isn't there."""
    there = [str(name) for name in accelerate.get_available_trackers()]
    missing = [name for name in config.trackers if name not in there]
    if missing:
        raise InputError(
            f"tracking.trackers: expected trackers that are installed here ({', '.join(sorted(there)) or 'none is'}), got {', '.join(missing)}; "
            f"pip install {' '.join(missing)}"
        )


@dataclass
class Follower:
    """One tracker, and how far it has come: the points up to step `sent` (see `Trackers`) are never sent to it again."""

    tracker: GeneralTracker
    memory: Path
    id: str
    sent: int
    fails: bool = False

    def send(self, points: list[tuple[int, dict[str, float]]]) -> None:
        """Send the points that it lacks. One that fails gets no more, until it is tried again, and doesn't stop the training."""
        try:
            for step, values in points:
                if step > self.sent:
                    self.tracker.log(values, step=step)
                    self.sent, self.fails = step, False
                    self.remember()
        except Exception as error:  # whatever a library raises when its server is away
            self.fails = True
            sys.stderr.write(f"tracking.trackers: {self.tracker.name} lacks the points from step {self.sent + 1} on ({_line(error)})\n")

    def finish(self) -> None:
        """Let the library end its run."""
        try:
            self.tracker.finish()
        except Exception as error:
            sys.stderr.write(f"tracking.trackers: {self.tracker.name} could not end its run ({_line(error)})\n")

    def remember(self) -> None:
        """Write down how far it has come, for a resumed run."""
        write_json(self.memory, {"id": self.id, "sent": self.sent})


@dataclass
class Trackers:
    """Followers of metrics.jsonl. Each gets every line once, also where a run is resumed and lines are written again.

    Trackers count steps over the whole run: those of a phase go on where the one before ended.
    """

    metrics: Path
    followers: list[Follower] = field(default_factory=list)
    live_without_dp: bool = False
    """Whether the private phase is sent line by line too, at times that depend on the private images."""
    _read: int = 0
    _steps: dict[str, int] = field(default_factory=dict)
    _points: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def follow(self, phase: str) -> None:
        """Send new lines, unless they come after the first look at private images and have to wait for the end of the private phase."""
        if phase == "synthetic" or self.live_without_dp:
            self._send([follower for follower in self.followers if not follower.fails])

    def complete(self) -> None:
        """Send all that is left: the private phase has ended. A tracker that failed is tried once more."""
        self._send(self.followers)

    def _send(self, followers: list[Follower]) -> None:
        if followers:
            self._read_lines()
            for follower in followers:
                follower.send(self._points)
            self._points = [point for point in self._points if point[0] > min(follower.sent for follower in self.followers)]

    def _read_lines(self) -> None:
        with writing(self.metrics), self.metrics.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        self._read += len(content)
        for line in content.splitlines():
            values = json.loads(line)
            phase, step = values.pop("phase"), values.pop("step")
            self._steps[phase] = step  # phases come one after another, and the last step of each is logged
            if values:
                self._points.append((sum(self._steps.values()), {f"{phase}/{name}": value for name, value in values.items()}))


@contextmanager
def following(config: RunConfig, run: RunDirectory, *, main: bool) -> Iterator[Trackers]:
    """The trackers of a run on its main process, started or taken up again; on the others, and without any in the config, nothing.

    Raises InputError for one that can't be started.
    """
    live = config.tracking.log_private_diagnostics_without_dp
    trackers = Trackers(run.metrics, [], live)
    try:
        for name in config.tracking.trackers if main else ():
            trackers.followers.append(_start(name, config, run))
        yield trackers
    finally:
        for follower in trackers.followers:
            follower.finish()


def _start(name: str, config: RunConfig, run: RunDirectory) -> Follower:
    memory = run.trackers / f"{name}.json"
    with writing(run.trackers):
        run.trackers.mkdir(exist_ok=True)
    known = memory.is_file()
    try:
        before: dict[str, Any] = json.loads(memory.read_bytes()) if known else {"id": uuid4().hex, "sent": 0}
        place = _Place(config.tracking.project, config.name, str(run.trackers), before["id"], before["sent"], known)
        tracker = _TRACKERS[name](place)
        tracker.start()
        if not known:
            tracker.store_init_configuration(_hyperparameters(config))
    except Exception as error:  # whatever a library raises when nobody is logged in, or its server is away
        raise InputError(f"tracking.trackers: {name} can't be started ({_line(error)})") from error
    follower = Follower(tracker, memory, _OWN_IDS.get(name, lambda started: before["id"])(tracker), before["sent"])
    follower.remember()
    return follower


def _hyperparameters(config: RunConfig) -> dict[str, bool | int | float | str]:
    """The config as {section.field: value}, without what may not leave."""
    values: dict[str, bool | int | float | str] = {}
    pending = list(asdict(config.without_secrets).items())
    while pending:
        name, value = pending.pop(0)
        if isinstance(value, dict):
            pending = [(f"{name}.{inner}", item) for inner, item in value.items()] + pending
        elif value is not None:
            values[name] = value if isinstance(value, bool | int | float | str) else str(list(value))
    return values


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


@dataclass(frozen=True)
class _Place:
    """Where a tracker files a run."""

    project: str
    name: str
    directory: str
    id: str
    sent: int
    known: bool
    """Whether it followed the run before."""


def _aim(place: _Place) -> GeneralTracker:
    return accelerate.AimTracker(
        place.name, place.directory, run_hash=place.id if place.known else None, experiment=place.project,
        system_tracking_interval=None, log_system_params=False, capture_terminal_logs=False,
    )  # fmt: skip


def _clearml(place: _Place) -> GeneralTracker:
    return accelerate.ClearMLTracker(
        place.name, project_name=place.project, task_name=place.name, reuse_last_task_id=place.id if place.known else False,
        continue_last_task=0 if place.known else False, auto_connect_arg_parser=False, auto_connect_frameworks=False,
        auto_resource_monitoring=False, auto_connect_streams=False,
    )  # fmt: skip


def _comet_ml(place: _Place) -> GeneralTracker:
    from comet_ml import ExperimentConfig

    quiet = ExperimentConfig(
        name=place.name, log_code=False, log_graph=False, log_git_metadata=False, log_git_patch=False, log_env_details=False, parse_args=False,
        auto_output_logging=False, auto_param_logging=False, auto_metric_logging=False, auto_log_co2=False, display_summary_level=0,
    )  # fmt: skip
    return accelerate.CometMLTracker(place.project, experiment_key=place.id, experiment_config=quiet)


def _dvclive(place: _Place) -> GeneralTracker:
    return accelerate.DVCLiveTracker(dir=f"{place.directory}/dvclive", resume=place.known, save_dvc_exp=False, dvcyaml=None, monitor_system=False)


def _mlflow(place: _Place) -> GeneralTracker:
    import mlflow

    mlflow.disable_system_metrics_logging()
    return accelerate.MLflowTracker(place.project, run_id=place.id if place.known else None, run_name=place.name)


def _swanlab(place: _Place) -> GeneralTracker:
    from swanlab import Settings

    quiet = {"hardware": False, "runtime": False, "requirements": False, "conda": False, "git": False, "monitor": False}
    return accelerate.SwanLabTracker(
        place.project, name=place.name, id=place.id, resume="allow", log_dir=f"{place.directory}/swanlab",
        settings=Settings(terminal={"proxy_type": "none"}, probe=quiet),
    )  # fmt: skip


def _tensorboard(place: _Place) -> GeneralTracker:
    """Points after the last one remembered, which a crash may have left in the files, are dropped by those who read them."""
    return accelerate.TensorBoardTracker("tensorboard", place.directory, purge_step=place.sent + 1 if place.known else None)


def _trackio(place: _Place) -> GeneralTracker:
    return accelerate.TrackioTracker(place.project, name=f"{place.name}-{place.id[:8]}", resume="allow", auto_log_gpu=False, auto_log_cpu=False)


def _wandb(place: _Place) -> GeneralTracker:
    quiet = {"x_disable_stats": True, "x_disable_meta": True, "console": "off", "disable_git": True, "disable_code": True}
    return accelerate.WandBTracker(place.project, name=place.name, id=place.id, resume="allow", dir=place.directory, settings=quiet)


_TRACKERS: dict[str, Callable[[_Place], GeneralTracker]] = {
    "aim": _aim,
    "clearml": _clearml,
    "comet_ml": _comet_ml,
    "dvclive": _dvclive,
    "mlflow": _mlflow,
    "swanlab": _swanlab,
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}

_OWN_IDS: dict[str, Callable[[Any], str]] = {
    "aim": lambda started: started.tracker.hash,
    "clearml": lambda started: started.tracker.id,
    "mlflow": lambda started: started.tracker.info.run_id,
}
"""How to learn a run's id from the trackers that choose it themselves."""
