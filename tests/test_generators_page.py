"""docs/generators.md against the families themselves."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from synthetic_generators import available
from synthetic_generators.__main__ import main
from synthetic_generators.description import describe

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/generators.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", available())
def test_every_family_has_a_section_with_its_options_and_defaults_and_small_pictures(name: str) -> None:
    section = SECTIONS[name]
    shown = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section, flags=re.MULTILINE)
    options = [option for option in describe(name).options if not isinstance(option.default, dict)]
    assert shown == [(o.name, str(o.default).lower() if isinstance(o.default, bool) else str(o.default)) for o in options]
    assert f"[`{name}`](#{name})" in PAGE
    pictures = re.findall(r"\]\((generators/.*?)\)", section)
    assert pictures
    for picture in pictures:
        path = ROOT / "docs" / picture
        assert path.stat().st_size < 60_000
        with Image.open(path) as image:
            image.verify()


def test_the_commands_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^python -m synthetic_generators(.*)$", PAGE, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        main(shlex.split(command, comments=True))
    assert (tmp_path / "grid.png").exists()


def test_the_family_of_the_page_works_from_its_file(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "checkers.py").write_text(code)
    program = """
import numpy as np
from synthetic_generators import Streams, make_generator
for channels, side in (1, 28), (3, 9):
    checkers = make_generator("checkers.py:checkers", channels, side, largest=5)
    images = checkers.generate(Streams(0, range(20)))
    assert images.shape == (20, channels, side, side) and images.dtype == np.uint8 and images.std() > 40
    assert max(len(np.unique(image[0])) for image in images) == 2
    assert np.array_equal(checkers.generate(Streams(0, range(7, 9))), images[7:9])
try:
    make_generator("checkers.py:checkers", 1, 28, largest=0)
except ValueError as error:
    assert str(error) == "option largest: expected an integer >= 1, got 0"
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)
