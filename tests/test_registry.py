"""Finding families by name, refusing what doesn't exist, families of one's own, and the command that shows them."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from running import ENVIRONMENT, TINY, call, launch, train_main

import synthetic_generators
from dpsyngen.config import RunConfig, StageConfig, StagesConfig, SyntheticConfig
from dpsyngen.errors import InputError
from dpsyngen.privacy.journal import fingerprint
from synthetic_generators import Streams, available, code_files, describe, make_generator, register, registry

# The example of the package's docstring, so that it is known to work.
EXAMPLE = (synthetic_generators.__doc__ or "").partition("under a name:")[2].partition("Importing this")[0]
OWN_FAMILY = f"""from dataclasses import dataclass
import numpy as np
from synthetic_generators import Streams, register
{textwrap.dedent(EXAMPLE)}"""


def draw(name: str, n: int, channels: int = 1, image_size: int = 28, **options: Any) -> np.ndarray:
    return make_generator(name, channels, image_size, **options).generate(Streams(0, range(n)))


def test_available_lists_the_registered_families() -> None:
    assert {"dead_leaves", "salt_and_pepper"} <= set(available())
    assert list(available()) == sorted(available())
    with pytest.raises(ValueError, match="registered already"):
        register("dead_leaves")(dict)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dead_leafs", {}, "unknown generator 'dead_leafs': did you mean 'dead_leaves'"),
        ("salt", {}, "did you mean 'salt_and_pepper'"),
        ("dead_leaves", {"exponnt": 3}, "unknown option 'exponnt' of dead_leaves: did you mean 'exponent'"),
        ("salt_and_pepper", {"grains": 2}, "did you mean 'grain'"),
        ("dead_leaves", {"image_size": 3}, "unknown option 'image_size'|multiple values"),
        ("dead_leaves", {"shape": "squares"}, "did you mean 'square'"),
        ("dead_leaves", {"shape": 3}, "option shape: unknown choice 3"),
        ("dead_leaves", {"exponent": "three"}, "option exponent: expected a finite number, got 'three'"),
        ("dead_leaves", {"exponent": float("nan")}, "option exponent: expected a finite number"),
        ("dead_leaves", {"leaves": 10.5}, "option leaves: expected an integer, got 10.5"),
        ("dead_leaves", {"leaves": True}, "option leaves: expected an integer, got True"),
        ("dead_leaves", {"leaves": 4, "leaves_min": 5}, "option leaves: expected"),
        ("dead_leaves", {"radius_min": 0}, "option radius_min: expected a number > 0"),
        ("dead_leaves", {"radius_max": 0.01}, "option radius_max: expected"),
        ("dead_leaves", {"silhouettes": 1.5}, "option silhouettes: expected"),
        ("dead_leaves", {"supersampling": 0}, "option supersampling: expected"),
        ("salt_and_pepper", {"density": 1.1}, "option density: expected"),
        ("salt_and_pepper", {"grain": 29}, "option grain: expected an integer from 1 to 28"),
        ("salt_and_pepper", {"binary": 1}, "option binary: expected a bool, got 1"),
        ("salt_and_pepper", {"levels": 1}, "option levels: expected an integer from 2 to 256"),
        ("salt_and_pepper", {"levels": 3, "binary": True}, "option levels: expected 2, since binary is true"),
        ("salt_and_pepper", {"density_max": 2}, "option density_max: expected a number in"),
        ("dead_leaves", {"contrast": -1}, "option contrast: expected a number in"),
    ],
)
def test_wrong_names_and_options_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        make_generator(name, 1, 28, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("channels", "image_size"), [(2, 28), (1, 0)])
def test_wrong_image_shapes_are_refused(channels: int, image_size: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        make_generator("dead_leaves", channels, image_size)


def test_numbers_may_be_written_as_yaml_gives_them() -> None:
    assert np.array_equal(draw("dead_leaves", 5, exponent=3, leaves=20.0), draw("dead_leaves", 5, exponent=3.0, leaves=20))


@pytest.fixture(autouse=True)
def forget_new_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ("_FAMILIES", "_FILES"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    """A file with a family `checkerboard`."""
    path = tmp_path / "my_family.py"
    path.write_text(OWN_FAMILY)
    return path


def test_a_family_of_ones_own_is_named_by_file_or_module(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_path = f"{own_file}:checkerboard"
    images = draw(by_path, 3, 3, 12, squares=2)
    assert len({tuple(pixel) for pixel in images[0].reshape(3, -1).T}) == 2
    assert np.array_equal(images[:, :, :6, :6], images[:, :, 6:, 6:])
    assert np.array_equal(draw(by_path, 3, 3, 12, squares=2), images)
    assert own_file.resolve() in code_files()
    options = {f"{by_path}.weight": 1, f"{by_path}/coarse.weight": 1, f"{by_path}/coarse.squares": 1}
    assert 60 < sum(len(np.unique(image)) == 1 for image in draw("mixture", 200, **options)) < 140
    option = describe(by_path).options[0]
    assert (option.name, option.default, option.meaning) == ("squares", 4, "Squares along a side.")

    own_file.with_name("my_module_with_a_family.py").write_text(OWN_FAMILY.replace('"checkerboard"', '"squares"'))
    monkeypatch.syspath_prepend(str(own_file.parent))
    assert np.array_equal(draw("my_module_with_a_family:squares", 3, 3, 12, squares=2), images)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.py:a", None, "gone.py: expected Python code that can be imported, got no such file"),
        ("no_such_module:a", None, "no_such_module: expected Python code that can be imported, got ModuleNotFoundError"),
        ("broken.py:a", "1 +", "broken.py: expected Python code that can be imported, got SyntaxError"),
        ("failing.py:a", "raise RuntimeError('one\\ntwo')", "RuntimeError: one two"),
        ("twice.py:a", "import synthetic_generators as s\ns.register('dead_leaves')(dict)", "a generator named 'dead_leaves' is registered already"),
        ("empty.py:dead_leafs", "", "unknown generator 'dead_leafs': did you mean 'dead_leaves'"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    name: str, content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name.partition(":")[0]).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make_generator(name, 1, 28)
    assert "\n" not in str(caught.value)


def test_training_takes_a_family_of_ones_own(own_file: Path) -> None:
    family = f"--synthetic.family={own_file}:checkerboard"
    done = launch("train", "--config", TINY, "--dry-run", family, "--synthetic.options.squares=2")
    assert done.returncode == 0, done.stderr
    assert f"{own_file}:checkerboard" in done.stdout
    with pytest.raises(InputError, match=r"synthetic.options: unknown option 'sqares' of .*my_family.py:checkerboard: did you mean 'squares'"):
        call(train_main, "--config", TINY, "--dry-run", family, "--synthetic.options.sqares=2")


def test_the_code_of_a_family_is_part_of_the_fingerprint(own_file: Path) -> None:
    """Programmatic images may be replayed in private steps, so other code of theirs makes another computation."""
    assert Path(registry.__file__).resolve() in code_files()
    make_generator(f"{own_file}:checkerboard", 1, 28)
    before = fingerprint("", "", torch.device("cpu"), 1)
    own_file.write_text(OWN_FAMILY + "# one more comment")
    assert fingerprint("", "", torch.device("cpu"), 1) != before


def test_the_folder_of_a_family_of_ones_own_is_not_released() -> None:
    own = "/home/me/secret.d/my_family.py:x"
    options = {f"{own}/small.weight": 2, "family": own, "b": 1}
    stage = StageConfig("s", "synthetic", family=own, options=options)
    config = RunConfig(synthetic=SyntheticConfig(family=own, options=options), stages=StagesConfig("custom", custom=(stage,))).without_secrets
    for part in (config.synthetic, *config.stages.custom):
        assert part.family == "my_family.py:x"
        assert part.options == {"my_family.py:x/small.weight": 2, "family": "my_family.py:x", "b": 1}
    assert RunConfig().without_secrets.synthetic == SyntheticConfig()


def shown(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "synthetic_generators", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=ENVIRONMENT)


def test_every_family_and_option_says_what_it_is() -> None:
    for name in available():
        family = describe(name)
        assert family.meaning
        assert all(option.meaning for option in family.options), family


def test_the_command_lists_describes_and_draws(tmp_path: Path) -> None:
    listed = shown()
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(available())
    described = shown("dead_leaves").stdout
    assert "\nexponent = 3.0    (a number)\n" in described
    done = shown("dead_leaves", "--out", tmp_path / "grid.png", "--channels", 3, "--size", 64, "--rows", 2, "--option", "exponent=2",
                 "--option", "shape=circle", "--seed", 4)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 + 2 * 66, 2 + 2 * 66, 3)
    images = make_generator("dead_leaves", 3, 64, exponent=2, shape="circle").generate(Streams(4, range(4)))
    assert np.array_equal(grid[68:132, 2:66].transpose(2, 0, 1), images[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dead_leafs"], "unknown generator 'dead_leafs': did you mean 'dead_leaves'"),
        (["dead_leaves", "--out", "grid.png", "--option", "exponent=three"], "option exponent: expected a finite number, got 'three'"),
        (["dead_leaves", "--out", "grid.png", "--option", "exponent"], "--option exponent: expected NAME=VALUE"),
        (["dead_leaves", "--out", "grid.png", "--channels", "2"], "channels: expected 1 or 3, got 2"),
        (["dead_leaves", "--out", "grid.png", "--rows", "0"], "--rows: expected an integer >= 1"),
        (["dead_leaves", "--out", "no/such/folder/grid.png"], "No such file or directory"),
        (["dead_leaves", "--out"], "argument --out: expected one argument"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "synthetic_generators", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("synthetic_generators: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
