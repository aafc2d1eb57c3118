"""Under accelerate launch: what it is told is done or refused, and several processes give what one gives."""

import inspect
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import accelerate.utils.launch
import numpy as np
import pytest
import torch
from accelerate.utils.dataclasses import PrecisionType
from running import KEY, WEIGHTS, call, evaluate_main, launch_together, lines, private_images, refusal, sample_main, small, train_main
from safetensors.torch import load_file
from torch import Tensor

from dpsyngen.compute import Compute
from dpsyngen.config import ComputeConfig, RunConfig
from dpsyngen.errors import InputError
from dpsyngen.launcher import settled
from dpsyngen.privacy.randomness import PrivateKey, poisson_sample


def test_fsdp_is_refused_in_one_line(tmp_path: Path) -> None:
    options = ("--use_fsdp",)
    done = launch_together(2, "train.py", *small(private_images(tmp_path / "images.npz")), "--run", tmp_path / "run", options=options)
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1
    assert said[0].startswith("train.py: accelerate launch: expected processes that hold all weights, got FSDP: clipping")
    assert "exitcode  : 2 " in done.stderr
    assert "train.py\", line" not in done.stderr  # no traceback of ours above the launcher's own
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("ACCELERATE_USE_FSDP", "true", "got FSDP: "),
        ("ACCELERATE_USE_DEEPSPEED", "true", "got DeepSpeed: "),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "got Megatron-LM: "),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "expected dynamo_backend no, got inductor: "),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "expected gradient_accumulation_steps 1, got 4: private.batch_size "),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "expected mixed_precision no or bf16, got fp16: "),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "expected mixed_precision no or bf16, got fp8: "),
    ],
)
def test_what_accelerate_asks_for_in_vain_is_refused(
    variable: str, value: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert variable in inspect.getsource(accelerate.utils.launch)  # it still says so by this name
    monkeypatch.setenv(variable, value)
    said = refusal(train_main, monkeypatch, capsys, *small(private_images(tmp_path / "images.npz")), "--run", tmp_path / "run")
    assert said.startswith("accelerate launch: ") and named in said
    if "PRECISION" not in variable:
        with pytest.raises(InputError, match="accelerate launch: "):
            Compute.start(ComputeConfig(device="cpu"))
        for no in ("false", "no", "1") if "STEPS" in variable else ("false", "") if "USE" in variable else ("no", "NO"):
            if "STEPS" not in variable or no == "1":
                monkeypatch.setenv(variable, no)
                settled(RunConfig())


@pytest.mark.parametrize(
    ("named", "accelerate_says", "used"),
    [("auto", None, "float32"), ("auto", "no", "float32"), ("auto", "bf16", "bf16"), ("float32", None, "float32"), ("float32", "no", "float32"),
     ("bf16", None, "bf16"), ("bf16", "no", "bf16"), ("bf16", "bf16", "bf16"), ("float32", "bf16", None), ("bf16", "fp16", None)],
)  # fmt: skip
def test_precision_is_the_configs_or_accelerates(named: str, accelerate_says: str | None, used: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if accelerate_says is None:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", str(PrecisionType(accelerate_says)))  # as the launcher writes it
    config = RunConfig(compute=ComputeConfig(precision=named))  # type: ignore[arg-type]
    if used is None:
        with pytest.raises(InputError, match=f"expected .* {accelerate_says}.*{named}|got {accelerate_says}.*{named}"):
            settled(config)
    else:
        assert settled(config).compute.precision == used
        assert settled(settled(config)) == settled(config)


@pytest.mark.parametrize("whole_chunks", [False, True])
@pytest.mark.parametrize("at_once", [1, 3])
def test_processes_get_equal_parts_of_a_batch_that_are_all_of_it(at_once: int, whole_chunks: bool) -> None:
    config = ComputeConfig(chunk_size=8, chunks_at_once=at_once)
    for size, processes in itertools.product((0, 1, 2, 7, 8, 9, 16, 50, 97), (1, 2, 3, 5)):
        batch, found, shares = np.arange(size) * 7, [], []
        for rank in range(processes):
            dealt = list(Compute(torch.device("cpu"), rank, processes).deal(batch, config, whole_chunks=whole_chunks))
            shares.append(sum(len(piece) for together in dealt for piece in together))
            for together in dealt:
                assert 0 < sum(map(len, together)) <= 8 * at_once
                for piece in together:
                    assert np.array_equal(piece.entries, batch[piece.chunk * 8 : piece.chunk * 8 + 8])
                    assert len(piece) == len(piece.entries[piece.part]) > 0
                    assert not whole_chunks or len(piece) == len(piece.entries)
                    found.append(piece.entries[piece.part])
        assert np.array_equal(np.concatenate([*found, batch[:0]]), batch)
        assert max(shares) - min(shares) <= (8 if whole_chunks else 1) + (size % 8 if whole_chunks else 0)


@dataclass(frozen=True)
class Runs:
    """One process's results, and those of two and three in the same places below "two" and "three"."""

    folder: Path

    def train(self, place: str, *flags: object) -> list[object]:
        flags = ("--stages.variant=dpdm", "--hints.kind=none", "--privacy.unsafe_fixed_key", KEY, *flags)
        return [*small(self.folder / "images.npz", *flags), "--run", self.folder / place]

    def rare(self, place: str) -> list[object]:
        """About one image a step, many times none: most of three processes have nothing to do."""
        return self.train(place, "--private.batch_size=1", f"--private.steps={RARE_STEPS}", "--compute.chunk_size=1", "--private.learning_rate=1e-3",
                          "--tracking.log_every=1", "--tracking.log_private_diagnostics_without_dp=true")  # fmt: skip

    def full(self, place: str, *flags: str) -> list[object]:
        """Batches of 100 in chunks of 8, so that 3 processes have 4 or 5 each, one of them short."""
        return self.train(place, "--private.steps=20", "--compute.chunk_size=8", "--private.learning_rate=1e-3", "--compute.checkpoint_every=100",
                          "--tracking.log_every=10", *flags)  # fmt: skip

    def sample(self, place: str) -> list[object]:
        return ["--run", self.folder / "run", "--out", self.folder / place / "samples", "--num-images=23", "--sampling.batch_size=5"]

    def evaluate(self, place: str) -> list[object]:
        flags = ("classifiers=[logistic_regression, mlp]", "classifier_seeds=2", "classifier_epochs=2", "features=classifier", "fid_images=1100")
        return ["--run", self.folder / "run", "--samples", self.folder / place / "samples", "--data.test_path", self.folder / "test.npz",
                *(f"--evaluation.{flag}" for flag in flags)]  # fmt: skip

    def images(self, place: str) -> np.ndarray:
        with np.load(self.folder / place / "samples/images.npz") as drawn:
            return np.asarray(drawn["images"])

    def weights(self, place: str) -> Tensor:
        tensors = load_file(self.folder / place / WEIGHTS)
        return torch.cat([tensors[name].flatten() for name in sorted(tensors)]).double()


RARE_STEPS = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    private_images(runs.folder / "images.npz")
    private_images(runs.folder / "test.npz", count=1100, seed=1)  # more than two batches of features
    call(train_main, *runs.train("run", "--compute.precision=bf16"))
    call(train_main, *runs.full("full"))
    call(sample_main, *runs.sample("one"))
    return runs


def launch_in_turn(processes: int, scripts: list[list[object]], *options: str) -> None:
    done = launch_together(processes, "tests/in_turn.py", json.dumps(scripts, default=str), options=options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training is finished") == [name for name, *_ in scripts].count("train")  # one process speaks


def test_two_processes_sample_and_evaluate_the_same_to_the_bit(runs: Runs) -> None:
    scripts = [["train", *runs.train("two", "--compute.precision=auto")], ["sample", *runs.sample("two")], ["evaluate", *runs.evaluate("two")]]
    launch_in_turn(2, scripts, "--mixed_precision=bf16")
    assert (runs.folder / "two/config.yaml").read_text() == (runs.folder / "run/config.yaml").read_text()  # auto was accelerate's bf16
    assert (runs.weights("two") - runs.weights("run")).norm() <= 1e-3 * runs.weights("run").norm()
    assert np.array_equal(runs.images("two"), runs.images("one"))
    call(evaluate_main, *runs.evaluate("one"))
    one, two = ((runs.folder / place / "samples/evaluation.json").read_text() for place in ("one", "two"))
    assert one == two
    assert set(json.loads(one)["metrics"]) == {"cas_logistic_regression", "cas_mlp", "fid", "precision", "recall"}


def test_three_processes_train_what_one_does_even_without_images(runs: Runs) -> None:
    training = [["train", *runs.rare("rare3")], ["train", *runs.full("full3", "--compute.chunks_at_once=2")]]
    replaying = ("--stages.variant=finetune_all", "--stages.replay=1", "--stages.replay_batch_size=20", "--synthetic.batch_size=20")
    training.append(["train", *runs.full("replay3", *replaying)])
    launch_in_turn(3, [*training, ["sample", *runs.sample("three")]])
    call(train_main, *runs.rare("rare"))
    call(train_main, *runs.full("replay", *replaying))
    key = PrivateKey.fixed(KEY)
    sizes = [len(poisson_sample(key.substream("batch", step=step), 200, 1 / 200)) for step in range(RARE_STEPS)]
    assert 0 in sizes and 1 in sizes and max(sizes) > 1
    for run in ("rare", "full", "replay"):
        assert (runs.weights(f"{run}3") - runs.weights(run)).norm() <= 1e-5 * runs.weights(run).norm()
    logged, alone = (lines(runs.folder / run / "metrics.jsonl") for run in ("rare3", "rare"))
    assert [line.get("drawn_batch_size_without_dp", 0) for line in logged] == sizes
    for a, b in zip(logged, alone, strict=True):
        assert a.keys() == b.keys()
        assert all(math.isclose(value, b[name], rel_tol=1e-4) for name, value in a.items() if isinstance(value, float))
    assert np.array_equal(runs.images("three"), runs.images("one"))
