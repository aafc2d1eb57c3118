"""The real train.py killed, interrupted and kept out, one moment of each kind; `tests/kill.py` (make test-kill) has the many.

The moments are random. A failure prints the seed they came from; KILL_SEED=N in the environment draws them again.
"""

import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGSTOP, SIGTERM
from types import SimpleNamespace

import pytest
import torch
from kill import PRIVATE, SYNTHETIC, Sight, arguments_for, heed_ctrl_c, logged, outcome, saves, wait_for, where
from running import ENVIRONMENT, ROOT, call, command, refusal, train_main

from dpsyngen.checkpoint import load_newest

SHORT = ("--network.width=16", "--synthetic.steps=36", "--private.steps=18", "--compute.checkpoint_every=4", "--tracking.log_every=3")
SEED = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))
PROCESSES = multiprocessing.get_context("forkserver")  # forks processes that have imported torch already, which takes seconds each
PROCESSES.set_forkserver_preload(["dpsyngen.training", "dpsyngen.pipeline"])


def be_train(arguments: list[str], environment: dict[str, str], said: Path) -> None:
    """Run train.py as the command line would, in this process."""
    os.environ.update(environment)
    heed_ctrl_c()
    torch.set_num_threads(1)
    for descriptor, file in ((1, Path(os.devnull)), (2, said)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


class Launched:
    """train.py in a process of its own."""

    def __init__(self, arguments: list[object], run: Path, **environment: str) -> None:
        self.said = run.with_name(f"{run.name}.stderr{environment.get('RANK', '')}")
        self.process = PROCESSES.Process(target=be_train, args=([str(one) for one in (*arguments, "--run", run)], environment, self.said))
        self.process.start()

    def reaches(self, seen: Sight, run: Path) -> bool:
        """Wait for the moment: whether it came before the process ended."""
        return wait_for(seen, run, SimpleNamespace(poll=lambda: self.process.exitcode, pid=self.process.pid, kill=self.process.kill))

    def send(self, *signals: int) -> None:
        for number in signals:
            os.kill(self.process.pid, number)

    def end(self, *, kill: bool = False) -> tuple[int, str]:
        """Wait until it ends, or make it: exit status and stderr."""
        if kill:
            self.process.kill()
        self.process.join()
        return self.process.exitcode, self.said.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], dict[str, bytes]]:
    """Arguments, and what a run with them comes to that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = arguments_for(folder, *SHORT)
    call(train_main, *arguments, "--run", folder / "run")
    return arguments, outcome(folder / "run")


@pytest.fixture
def rng() -> random.Random:
    print(f"KILL_SEED={SEED}")  # noqa: T201 - pytest shows it where a test fails
    return random.Random(SEED)


def kill_at(seen: Sight, expected: str, arguments: list[object], run: Path) -> None:
    """Launch train.py and kill it at the moment; again, further on, where it was a blink too late."""
    places: list[str] = []
    while not (places and re.search(expected, places[-1])):
        assert len(places) < 8, f"expected to hit it {expected}, hit {places}"
        process = Launched(arguments, run)
        assert process.reaches(seen, run), process.end()
        process.end(kill=True)
        places.append(where(run))


def newest_step(run: Path) -> int:
    return int(json.loads((max((run / "checkpoints").glob("[0-9]*")) / "state.json").read_text())["state"]["step"])


def test_a_run_killed_in_either_phase_and_while_saving_ends_in_the_same_bytes(whole, rng, tmp_path):
    (arguments, expected), run = whole, tmp_path / "run"
    kill_at(logged("synthetic", rng.randint(1, 6)), SYNTHETIC, arguments, run)
    kill_at(saves(2 * rng.randint(16, 30)), "saving checkpoint", arguments, run)
    kill_at(logged("private", rng.randint(1, 5)), PRIVATE, arguments, run)
    call(train_main, *arguments, "--run", run)
    assert outcome(run) == expected
    assert json.loads(expected["privacy.json"])["steps_begun"] == 18


def two_processes(arguments: list[object], run: Path) -> list[Launched]:
    """What a launcher starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return [Launched(arguments, run, RANK=rank, LOCAL_RANK=rank, **there) for rank in "01"]


def test_two_processes_killed_end_in_the_same_bytes(rng, tmp_path, monkeypatch, capsys):
    """And keep others out while they are at work, stopped though they be."""
    arguments, run = arguments_for(tmp_path, *SHORT), tmp_path / "killed"
    pair = two_processes(arguments, run)
    assert pair[0].reaches(logged(*rng.choice([("synthetic", rng.randint(1, 10)), ("private", rng.randint(1, 4))])), run)
    for process in pair:
        process.send(SIGSTOP)
    assert refusal(train_main, monkeypatch, capsys, *arguments, "--run", run) == f"{run}: another train.py is at work in this run directory"
    for process in pair:
        process.end(kill=True)
    for name in ("killed", "whole"):
        assert [process.end() for process in two_processes(arguments, tmp_path / name)] == [(0, "")] * 2
    assert outcome(run) == outcome(tmp_path / "whole")


def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(whole, rng, tmp_path, monkeypatch, capsys):
    """Each ends the run after the step in hand, which is the one that the line on stderr names and the newest checkpoint has."""
    (arguments, expected), run = whole, tmp_path / "run"
    polite: tuple[tuple[str, Sight, int], ...] = (
        ("synthetic", logged("synthetic", rng.randint(1, 10)), SIGINT), ("private", logged("private", rng.randint(1, 4)), SIGTERM),
    )  # fmt: skip
    for phase, seen, number in polite:
        process = Launched(arguments, run)
        assert process.reaches(seen, run)
        process.send(SIGSTOP)
        assert re.search("another train.py is at work", refusal(train_main, monkeypatch, capsys, *arguments, "--run", run))
        process.send(number, SIGCONT)
        status, said = process.end()
        line = re.fullmatch(rf"train\.py: interrupted, step (\d+) of the {phase} phase is saved; run the same command again to go on\n", said)
        assert line is not None, (status, said)
        assert (status, newest_step(run)) == (128 + number, int(line[1]))
    call(train_main, *arguments, "--run", run)
    assert outcome(run) == expected


ON_A_SMALL_DISK = """
size=$1 run=$2 kept=$3; shift 3
mount -t tmpfs -o size=$size none "$run" || exit 77
"$@"; status=$?
cp -a "$run" "$kept"; exit $status
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare, which lets anyone mount a small disk")
def test_a_disk_that_is_full_while_saving_stops_the_run_and_loses_nothing(whole, tmp_path):
    """On a disk with room for two checkpoints and a half: one line, both are whole, and with more room the run goes on."""
    (arguments, expected), run, kept = whole, tmp_path / "run", tmp_path / "kept"
    size = next(len(content) for name, content in expected.items() if name.endswith("tensors.safetensors")) * 5 // 2
    run.mkdir()
    small_disk = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh", str(size), str(run), str(kept)]
    stopped = subprocess.run([*small_disk, *command("train", *arguments, "--run", run)], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    if stopped.returncode == 77 or stopped.stderr.startswith("unshare"):
        pytest.skip("no disk may be mounted here")
    line = rf"train\.py: {run}/checkpoints/000000024: expected a place that can be written \(No space left on device\); "
    assert re.fullmatch(line + "what was saved before is whole: run the same command again to go on\n", stopped.stderr)
    assert stopped.returncode == 2
    assert sorted(path.name for path in (kept / "checkpoints").iterdir()) == ["000000008", "000000016"]
    assert load_newest(kept / "checkpoints").state["step"] == 8
    call(train_main, *arguments, "--run", kept)
    assert outcome(kept) == expected
