"""Kill train.py at random moments, start it again until it finishes, and compare with a run that was never interrupted.

    python tests/kill.py [--only REGEX] [--seed N]

Then the same for sample.py and evaluate.py, whose files must be whole or absent when they are killed.

Everything is done from outside, on the real script: the kills are aimed by what lies in the run directory. Prints a table; exit
status 0 if every run ends with the same bytes, whatever was killed.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals, default_int_handler, signal

import psutil
from running import ENVIRONMENT, KEY, LAUNCHER, ROOT, command, private_images, small

Sight = Callable[[Path], bool]
LENGTHS = (
    "--network.width=24", "--synthetic.steps=45", "--central.steps=15", "--central.batch_size=16", "--private.steps=18",
    "--compute.checkpoint_every=4", "--tracking.log_every=3",
)  # fmt: skip
SYNTHETIC, PRIVATE = r"synthetic step|saving checkpoint \d{1,8}$", r"private step|saving checkpoint 2\d{8}$"
"""Where a kill in a phase may hit: a line of metrics.jsonl is seen, and the checkpoint of the same step may be under way already."""
MOST_LAUNCHES = 12
PATIENCE = 120
"""Seconds after which a process that neither reaches a moment nor ends counts as hung."""


@dataclass(frozen=True)
class Moment:
    """When to strike, as seen from outside, and what the files must show afterwards for the kill to count."""

    name: str
    seen: Sight
    expected: str
    processes: int = 1
    rank: int | None = None
    """Which of several processes is killed alone, so that the launcher has to end the rest; all by default."""
    signal: Signals = SIGKILL
    script: str = "train"


def moments(seed: int) -> list[Moment]:
    """The 21 kills of train.py, three polite signals, and kills of the scripts that come after, at moments that the seed draws."""
    rng = random.Random(seed)
    early = [Moment("start-up", after(rng.uniform(0.2, 4)), "before the first step") for _ in range(2)]
    early.append(Moment("start-up", lambda run: (run / "config.yaml").exists(), "before the first step"))
    synthetic = [Moment("synthetic phase", logged("synthetic", rng.randint(1, 14)), SYNTHETIC) for _ in range(3)]
    central = [Moment("central phase", logged("central", rng.randint(1, 4)), r"central phase|saving checkpoint 1\d{8}$")]
    private = [Moment("private phase", logged("private", rng.randint(1, 5)), PRIVATE) for _ in range(4)]
    checkpoints = (2, 2 * rng.randint(12, 38), 2 * 10**8 + rng.randint(3, 24))
    saving = [Moment("saving a checkpoint", saves(number), "saving checkpoint") for number in checkpoints]
    between = [Moment("between phases", sight, "between phases") for sight in (lambda run: (run / "private/key").exists(), means_begun)]
    ending = [Moment("writing model/", model_begun, "writing model/|finished") for _ in range(2)]
    two = [
        Moment("two processes, second killed", logged("private", rng.randint(1, 4)), PRIVATE, 2, rank=1),
        Moment("two processes, first killed", logged("synthetic", rng.randint(1, 6)), SYNTHETIC, 2, rank=0),
        Moment("two processes, both killed", logged(rng.choice(["synthetic", "private"]), rng.randint(1, 4)), f"{SYNTHETIC}|{PRIVATE}", 2),
    ]
    polite = [
        Moment("SIGTERM", logged("private", rng.randint(1, 4)), PRIVATE, signal=SIGTERM),
        Moment("SIGINT", logged("synthetic", rng.randint(1, 12)), SYNTHETIC, signal=SIGINT),
        Moment("SIGTERM, two processes", logged("private", rng.randint(1, 4)), PRIVATE, 2, signal=SIGTERM),
    ]
    after_training = [
        Moment("sample.py", after(rng.uniform(1, 4)), "", script="sample"),
        Moment("sample.py, writing", lambda run: any(run.glob("samples/.*")), "", script="sample"),
        Moment("evaluate.py", after(rng.uniform(1, 5)), "", script="evaluate"),
        Moment("evaluate.py, writing", lambda run: any(run.glob(".evaluation*")), "", script="evaluate"),
    ]
    return [*early, *synthetic, *central, *private, *saving, *between, *ending, *two, *polite, *after_training]


# What can be seen from outside.


def after(seconds: float) -> Sight:
    ends = 0.0

    def seen(run: Path) -> bool:
        nonlocal ends
        ends = ends or time.monotonic() + seconds
        return time.monotonic() > ends

    return seen


def logged(phase: str, lines: int) -> Sight:
    return lambda run: text(run / "metrics.jsonl").count(f'"{phase}"') >= lines


def saves(number: int) -> Sight:
    """A checkpoint of at least this number is half written."""
    return lambda run: any(int(name[1:-8]) >= number for name in half_written(run / "checkpoints"))


def means_begun(run: Path) -> bool:
    return "class_means" in text(run / "private/journal.jsonl")


def model_begun(run: Path) -> bool:
    return any(run.glob("model*")) or any(run.glob(".model*"))


def half_written(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*.partial")]


def text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def where(run: Path) -> str:
    """Where a killed run had come to, by its files."""
    privacy = text(run / "privacy.json")
    if privacy and json.loads(privacy)["status"] == "finished":
        return "finished, key there" if (run / "private/key").exists() else "finished"
    if model_begun(run):
        return "writing model/"
    if partial := half_written(run / "checkpoints"):
        return f"saving checkpoint {int(partial[0][1:-8])}"
    steps = [json.loads(line).get("step") for line in text(run / "private/journal.jsonl").split("\n")[:-1]]
    numbered = [step for step in steps if isinstance(step, int)]
    if numbered:
        return f"private step {numbered[-1]}"
    if (run / "private/key").exists():
        return "central phase" if '"central"' in text(run / "metrics.jsonl") else "between phases"
    lines = text(run / "metrics.jsonl").count("\n")
    return f"synthetic step {3 * lines} or later" if lines else "before the first step"


# Striking and starting again.


def start(arguments: list[object], run: Path, processes: int) -> "subprocess.Popen[str]":
    line = command("train", *arguments, "--run", run)
    line = line if processes == 1 else [sys.executable, *LAUNCHER, str(ROOT / "train.py"), *line[2:]]
    return subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)  # noqa: PLW1509


def heed_ctrl_c() -> None:
    """Undo that a shell starts what it runs in the background deaf to Ctrl-C, which a child would inherit."""
    signal(SIGINT, default_int_handler)


def strike(moment: Moment, arguments: list[object], run: Path) -> tuple[str, int, str]:
    """Launch train.py and kill it at the moment, or let it finish if that doesn't come: where it was, exit status, stderr."""
    with start(arguments, run, moment.processes) as process:
        place = "finished"
        if wait_for(moment.seen, run, process):
            place = where(run)
            end(process, moment)
        _, said = process.communicate(timeout=PATIENCE)
    return (where(run) if moment.signal is SIGKILL else place), process.returncode, said


def wait_for(seen: Sight, run: Path, process: "subprocess.Popen[str]") -> bool:
    """Whether the moment came before the process ended. Raises TimeoutError, the process killed, if neither happens."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not seen(run):
        time.sleep(0.0002)
        if time.monotonic() > deadline:
            kill(process)
            raise TimeoutError(f"no such moment in {PATIENCE} s, at {where(run)}")
    return process.poll() is None


def kill(process: "subprocess.Popen[str]") -> None:
    """Kill a process and all that it launched."""
    everything = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in everything:
        one.kill()
    psutil.wait_procs(everything[1:], timeout=PATIENCE)


def end(process: "subprocess.Popen[str]", moment: Moment) -> None:
    """Send the moment's signal: to one worker, to the launcher, which passes it on if it can, or to launcher and workers."""
    workers = {one.environ().get("RANK"): one for one in psutil.Process(process.pid).children(recursive=True)} if moment.processes > 1 else {}
    if moment.rank is not None:
        workers[str(moment.rank)].kill()
    elif moment.signal is SIGKILL:
        kill(process)
    else:
        process.send_signal(moment.signal)
    psutil.wait_procs(list(workers.values()), timeout=PATIENCE)


def finish(arguments: list[object], run: Path, processes: int) -> None:
    with start(arguments, run, processes) as process:
        _, said = process.communicate(timeout=PATIENCE)
    if process.returncode != 0:
        raise RuntimeError(f"a restarted run failed: {said}")


def outcome(run: Path) -> dict[str, bytes]:
    """All files of a run but its times, and of its checkpoints the newest: which older ones are left depends on when it was stopped."""
    newest = max((run / "checkpoints").glob("[0-9]*"))
    kept = [path for path in run.rglob("*") if path.is_file() and (run / "checkpoints" not in path.parents or newest in path.parents)]
    return {str(path.relative_to(run)): path.read_bytes() for path in kept if path.name != "timings.jsonl"}


def survive(moment: Moment, arguments: list[object], folder: Path) -> tuple[str, int, Path]:
    """Strike until the moment is hit, then let the run finish: where it hit, how often it was started again, the run directory."""
    restarts = 0
    for attempt in range(MOST_LAUNCHES):
        run = folder / str(attempt)
        while True:
            place, status, said = strike(moment, arguments, run)
            if status == 0 and place == "finished":
                break
            if re.search(moment.expected, place):
                check_manners(moment, status, said)
                finish(arguments, run, moment.processes)
                return place, restarts + 1, run
            restarts += 1
            if restarts > MOST_LAUNCHES:
                raise TimeoutError(f"{moment.name}: hit nothing but {place!r} in {restarts} kills")
    raise TimeoutError(f"{moment.name}: never hit")


def whole_outputs(finished: Path, run: Path) -> dict[str, bytes]:
    """What sample.py and evaluate.py write into a copy of a finished run."""
    shutil.copytree(finished, run)
    for script in ("sample", "evaluate"):
        subprocess.run(command(script, "--run", run), env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True, timeout=PATIENCE)
    return {name: content for name, content in outcome(run).items() if name not in outcome(finished)}


def survive_later(moment: Moment, finished: Path, expected: dict[str, bytes], run: Path) -> tuple[str, str]:
    """Kill sample.py or evaluate.py and run it again: which files there were, and which weren't whole, then or in the end."""
    shutil.copytree(finished, run)
    if moment.script == "evaluate":
        subprocess.run(command("sample", "--run", run), env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True, timeout=PATIENCE)
    line, wrong, place = command(moment.script, "--run", run), [], ""
    for struck in (True, False):
        with subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            if struck and wait_for(moment.seen, run, process):
                kill(process)
            process.communicate(timeout=PATIENCE)
        done = [name for name in expected if name.startswith("samples/") == (moment.script == "sample")]
        found = {name: content for name, content in outcome(run).items() if name in done or "/." in f"/{name}"}
        hidden = [name for name in found if "/." in f"/{name}"]
        if struck:
            place = ", ".join(Path(name).name for name in sorted(found.keys() - hidden)) or "nothing written"
        else:
            wrong += hidden
            wrong += [name for name in done if name not in found]
        wrong += [name for name in found.keys() - hidden if timeless(found[name]) != timeless(expected[name])]
    return place, "yes" if not wrong else "NO: " + ", ".join(sorted(set(wrong)))


def timeless(content: bytes) -> bytes:
    """Without the time of writing, which provenance.json has."""
    return re.sub(rb'"created": "[^"]*"', b"", content)


def check_manners(moment: Moment, status: int, said: str) -> None:
    """A polite signal ends a process with 128 + its number, and one line that says how to go on."""
    if moment.signal is SIGKILL:
        return
    ours = [line for line in said.splitlines() if line.startswith("train.py: ")]
    if len(ours) != 1 or "run the same command again" not in ours[0]:
        raise AssertionError(f"{moment.name}: expected one line, got {said!r}")
    if moment.processes == 1 and (status != 128 + moment.signal or said.count("\n") != 1):
        raise AssertionError(f"{moment.name}: expected exit status {128 + moment.signal} and nothing else, got {status}: {said!r}")


def arguments_for(folder: Path, *flags: str) -> list[object]:
    """A run of a few seconds with all phases and class means, whose private draws are fixed."""
    images = private_images(folder / "images.npz")
    return small(images, f"--privacy.unsafe_fixed_key={KEY}", f"--data.test_path={images}", *(flags or LENGTHS))


Files = dict[str, bytes]


def verdict_on(moment: Moment, arguments: list[object], folder: Path, whole: dict[int, Files], later: Files) -> tuple[str, int, str]:
    """Where the moment hit, how often the run was started again, and "yes" if it ended in the same bytes."""
    try:
        if moment.script != "train":
            place, verdict = survive_later(moment, folder.parent / "whole1", later, folder)
            return place, 1, verdict
        place, restarts, run = survive(moment, arguments, folder)
        found, expected = outcome(run), whole[moment.processes]
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        return place, restarts, "yes" if not wrong else "NO: " + ", ".join(wrong)
    except (AssertionError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return "", 0, f"FAILED: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill train.py at random moments; each run must end with the bytes of an uninterrupted one.")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the moments whose name matches, ignoring case")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="draws the moments; by default another each time")
    options = parser.parse_args()
    chosen = [moment for moment in moments(options.seed) if re.search(options.only, moment.name, re.IGNORECASE)]
    failures = 0
    print(f"--seed {options.seed}")
    print(f"{'moment':28}  {'where it hit':36}  {'restarts':>8}  same bytes?", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        arguments, whole = arguments_for(folder), {}
        for processes in sorted({moment.processes for moment in chosen}):
            finish(arguments, folder / f"whole{processes}", processes)
            whole[processes] = outcome(folder / f"whole{processes}")
        later = whole_outputs(folder / "whole1", folder / "later") if any(moment.script != "train" for moment in chosen) else {}
        for number, moment in enumerate(chosen):
            place, restarts, verdict = verdict_on(moment, arguments, folder / str(number), whole, later)
            failures += verdict != "yes"
            print(f"{moment.name:28}  {place:36}  {restarts:8}  {verdict}", flush=True)
    print(f"{len(chosen) - failures} of {len(chosen)} runs ended as if nothing had happened")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
