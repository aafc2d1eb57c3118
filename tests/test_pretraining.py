"""The cache of synthetic phases: a run that takes one up ends as if it had trained, and none takes up what is another."""

from pathlib import Path

import pytest
from running import KEY, WEIGHTS, call, files, private_images, refusal, small, train_main
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return private_images(tmp_path_factory.mktemp("images") / "images.npz")


def trained(images: Path, run: Path, *flags: object) -> dict[str, bytes]:
    call(train_main, *small(images, f"--privacy.unsafe_fixed_key={KEY}", *flags), "--run", run)
    return {name: tensor.tobytes() for name, tensor in load_file(run / WEIGHTS).items()}


def phases(run: Path) -> list[str]:
    return [phase for phase in ("synthetic", "private") if f'"phase": "{phase}"' in (run / "metrics.jsonl").read_text()]


def test_a_cached_phase_is_the_phase(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached = f"--synthetic.cache={tmp_path / 'cache'}"
    alone = trained(images, tmp_path / "alone", "--hints.share=0.2")
    assert trained(images, tmp_path / "first", "--privacy.epsilon=3", cached) != alone
    assert trained(images, tmp_path / "second", "--hints.share=0.2", cached) == alone
    assert phases(tmp_path / "first") == ["synthetic", "private"] and phases(tmp_path / "second") == ["private"]
    assert "taken from" in capsys.readouterr().err
    trained(images, tmp_path / "third", "--hints.prototypes=2", "--private.steps=1", cached)  # none of the synthetic phase's business
    assert phases(tmp_path / "third") == ["private"]
    assert str(tmp_path) in (tmp_path / "second/config.yaml").read_text()


@pytest.mark.parametrize("flag", ["seed=1", "network.sigma_data=0.4", "synthetic.learning_rate=1e-3", "hints.synthetic_fade=[0.2,0.3]",
                                  "synthetic.options={leaves: 9}", "stages.variant=coarse"])  # fmt: skip
def test_another_phase_is_not_taken(images: Path, tmp_path: Path, flag: str) -> None:
    cached = f"--synthetic.cache={tmp_path / 'cache'}"
    trained(images, tmp_path / "first", cached)
    trained(images, tmp_path / "other", cached, f"--{flag}")
    assert phases(tmp_path / "other") == ["synthetic", "private"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_networks_of_other_names_or_resolutions_are_not_taken(images: Path, tmp_path: Path) -> None:
    cached = f"--synthetic.cache={tmp_path / 'cache'}"
    for run, private in enumerate(("name: a", "name: b", "name: b, downsampling: 2", "name: b")):
        custom = f"--stages.custom=[{{{private}, source: private, upper: 0}}, {{name: coarse, source: synthetic, lower: 0}}]"
        trained(images, tmp_path / str(run), cached, "--stages.variant=custom", "--stages.holder=routed", custom)
        assert ("synthetic" in phases(tmp_path / str(run))) == (run < 3)


def test_a_damaged_cache_is_one_line(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cached = f"--synthetic.cache={tmp_path / 'cache'}"
    trained(images, tmp_path / "first", cached)
    damaged = next((tmp_path / "cache").rglob("tensors.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-7] + b"damaged")
    capsys.readouterr()
    told = refusal(train_main, monkeypatch, capsys, *small(images, cached), "--run", tmp_path / "second")
    assert str(tmp_path / "cache") in told
    assert "private/journal.jsonl" not in files(tmp_path / "second")
