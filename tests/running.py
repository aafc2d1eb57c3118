"""What the tests of the scripts share: a small private dataset, the scripts called as functions or launched as a user would, and a run's files."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpsyngen.cli import run_script

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.yaml"
KEY = "ab" * 32
WEIGHTS = "model/denoiser/diffusion_pytorch_model.safetensors"
needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
LAUNCHER = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
            "--dynamo_backend=no", "--main_process_port=0")  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def script(name: str) -> Callable[[list[str]], None]:
    """The main function of train.py, sample.py or evaluate.py."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


train_main, sample_main, evaluate_main = script("train"), script("sample"), script("evaluate")


def call(main: Callable[[list[str]], None], *arguments: object) -> None:
    main([str(argument) for argument in arguments])


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)]


def launch(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(name, *arguments), capture_output=True, text=True, check=False, env=ENVIRONMENT)


def launch_together(processes: int, file: str, *arguments: object, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A file of the repository under `accelerate launch`, on a CPU by gloo. With accelerate's --cpu it would be one process."""
    defaults = ("--multi_gpu", "--mixed_precision=no", "--dynamo_backend=no")
    given = {option.partition("=")[0] for option in options} | ({"--multi_gpu"} if "--use_fsdp" in options else set())
    chosen = (*options, *(option for option in defaults if option.partition("=")[0] not in given))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}", "--num_machines=1", "--main_process_port=0"]
    line = [*launcher, *chosen, str(ROOT / file), *map(str, arguments)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            said, complained = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:  # processes out of step would wait for each other for hours
            process.terminate()  # and the launcher ends those that it started
            raise
    return subprocess.CompletedProcess(line, process.returncode, said, complained)


def refusal(main: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the script says when it refuses its arguments: one line on stderr and exit status 2."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    assert captured.err.startswith("script.py: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err.removeprefix("script.py: ").removesuffix("\n")


def private_images(path: Path, *, count: int = 200, channels: int = 1, seed: int = 0, **replaced: Any) -> Path:
    """An .npz file of uint8 images [count, 8, 8, channels] with labels in three classes."""
    rng = np.random.default_rng(seed)
    arrays = {"images": rng.integers(0, 256, (count, 8, 8, channels), dtype=np.uint8), "labels": rng.integers(0, 3, count)}
    np.savez(path, **{name: array for name, array in (arrays | replaced).items() if array is not None})
    return path


def small(images: Path, *flags: object, config: Path | None = None) -> list[object]:
    """Arguments that train on the images of `private_images`, in a second or two."""
    configs = ["--config", config, "--config", TINY] if config is not None else ["--config", TINY]
    data = {"source": "npz", "path": images, "image_size": 8, "num_classes": 3, "expected_size": 200}
    return [*configs, *(f"--data.{name}={value}" for name, value in data.items()), "--private.batch_size=100", "--compute.chunk_size=32", *flags]


def stop_at_first_log(run: Path) -> None:
    """Let the run fail at the first line of metrics.jsonl, by a disk that is full for this file alone."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").symlink_to("/dev/full")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def files(run: Path) -> dict[str, tuple[bytes, int]]:
    """Name: (content, time of the last change) of every file of a run."""
    return {str(file.relative_to(run)): (file.read_bytes(), file.stat().st_mtime_ns) for file in sorted(run.rglob("*")) if file.is_file()}


def weights(run: Path) -> bytes:
    return (run / WEIGHTS).read_bytes()
