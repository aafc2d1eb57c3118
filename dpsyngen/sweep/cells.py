"""Running the cells of a sweep: each trains, samples and evaluates in child processes, so that a crash stays its own."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from dpsyngen.cli import dump_config
from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError
from dpsyngen.files import write_file, writing
from dpsyngen.run_directory import RunDirectory, append_line, drop_cut_line

SCRIPTS = Path(__file__).parents[2]
_POLL_SECONDS = 0.05


@dataclass
class Job:
    """A run that is to be trained, sampled from and evaluated."""

    config: RunConfig
    run: RunDirectory
    failure: str | None = None
    """The last line that the failing script wrote to stderr."""

    @property
    def config_text(self) -> str:
        """The run directory's config.yaml."""
        return dump_config(self.config)

    @property
    def remaining(self) -> list[str]:
        """The scripts that have not finished yet, in their order, by what they leave last."""
        samples = self.run.path / "samples"
        done = {
            "train": self.run.is_finished,
            "sample": (samples / "provenance.json").is_file() and (samples / "images.npz").is_file(),
            "evaluate": (self.run.path / "evaluation.json").is_file(),
        }
        waiting = [name for name, finished in done.items() if not finished]
        return list(done)[list(done).index(waiting[0]) :] if waiting else []

    @property
    def status(self) -> str:
        """finished, failed, or unfinished where it was not its turn yet."""
        return "failed" if self.failure is not None else "unfinished" if self.remaining else "finished"

    @property
    def clock(self) -> Path:
        """A line for each time that a script ran, with its seconds. Private, as `RunDirectory.timings` are."""
        return self.run.key.parent / "scripts.jsonl"

    def seconds(self) -> dict[str, float]:
        """How long each script took in all, by name, with all parts of an interrupted one but those that ended with this process."""
        took: dict[str, float] = {}
        for line in self.clock.read_text().splitlines() if self.clock.is_file() else []:
            part = json.loads(line)
            took[part["script"]] = took.get(part["script"], 0.0) + part["seconds"]
        return took

    def prepare(self) -> None:
        """Freeze the configuration in the run directory; InputError if that holds a run of another one."""
        self.run.expect_config(self.config_text)
        if not self.run.config.exists():
            private = self.run.key.parent
            with writing(self.run.path):
                private.mkdir(parents=True, exist_ok=True)
                private.chmod(0o700)
            write_file(self.run.config, self.config_text)


@dataclass
class _Running:
    job: Job
    slot: int
    scripts: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] = field(init=False)
    began: float = field(init=False)

    def start(self) -> None:
        name = self.scripts[0]
        configured = ["--config", str(self.job.run.config)] if name == "train" else []
        command = [sys.executable, "-m", "dpsyngen.sweep.child", str(os.getpid()), str(SCRIPTS / f"{name}.py"), *configured]
        self.began = time.monotonic()
        with writing(self.log), os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as log:
            self.process = subprocess.Popen(  # noqa: S603 - this project's own scripts
                [*command, "--run", str(self.job.run.path)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, env=self.environment
            )

    @property
    def log(self) -> Path:
        return self.job.run.key.parent / "stderr.log"  # how fast a private step went can be read off it

    def advance(self) -> bool:
        """Whether there is more to wait for; goes on to the next script when one has ended."""
        status = self.process.poll()
        if status is None:
            return True
        self.note_time()
        if status != 0:
            said = self.log.read_text(errors="replace").strip().splitlines()
            self.job.failure = said[-1] if said else f"{self.scripts[0]}.py ended with status {status} and said nothing"
            return False
        self.scripts.pop(0)
        if self.scripts:
            self.start()
        return bool(self.scripts)

    def note_time(self) -> None:
        """Add what the script took to its run's clock."""
        drop_cut_line(self.job.clock)
        append_line(self.job.clock, {"script": self.scripts[0], "seconds": round(time.monotonic() - self.began, 2)}, private=True)


def run_jobs(jobs: Sequence[Job], environments: Sequence[dict[str, str]], after: Callable[[], None], *, silent: bool = False) -> None:
    """Run what is unfinished, as many at a time as there are environments; `after` is called whenever one has ended.

    A job that fails keeps its message and stops no other. If this process is interrupted, its children are ended first.
    """
    waiting = [job for job in jobs if job.remaining]
    for job in waiting:
        job.prepare()
    running: list[_Running] = []
    finished = len(jobs) - len(waiting)
    with tqdm(total=len(jobs), initial=finished, desc="cells", unit="cell", disable=True if silent else None, dynamic_ncols=True) as bar:
        try:
            while waiting or running:
                free = sorted(set(range(len(environments))) - {one.slot for one in running})
                for slot in free[: len(waiting)]:
                    job = waiting.pop(0)
                    running.append(_Running(job, slot, job.remaining, dict(environments[slot])))
                    running[-1].start()
                time.sleep(_POLL_SECONDS)
                for one in [one for one in running if not one.advance()]:
                    running.remove(one)
                    bar.update()
                    after()
        finally:
            for one in running:
                one.process.terminate()
            for one in running:
                one.process.wait()
                one.note_time()


def environments(parallel: int | None, device: str) -> list[dict[str, str]]:
    """The environments of the children that run at the same time: a CUDA device each, round robin, or a share of the CPU's cores.

    `parallel` is None for one per device that `device` (compute.device) leaves open, and one at a time elsewhere.
    """
    visible = _cuda_devices() if device in ("auto", "cuda") else []
    count = parallel if parallel is not None else max(1, len(visible))
    base = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH")]))}
    if visible:
        return [base | {"CUDA_VISIBLE_DEVICES": visible[slot % len(visible)]} for slot in range(count)]
    if count > 1 and "OMP_NUM_THREADS" not in base and device in ("auto", "cpu"):
        base |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return [dict(base) for _ in range(count)]


def _cuda_devices() -> list[str]:
    import torch  # takes seconds

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or [str(number) for number in range(count)]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make the sweep's directory and hold its lock; InputError if another sweep is at work there."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{directory}: another sweep is at work in this directory") from None
        yield


def expect_scripts() -> None:
    """Raise InputError where the package is installed without the scripts that a cell runs."""
    if not (SCRIPTS / "train.py").is_file():
        raise InputError(f"{SCRIPTS / 'train.py'}: expected the project's scripts beside the package; run the sweep from a checkout")
