"""The families of programmatic images: what there is, and pictures of it.

    python -m synthetic_generators                                  all families, a line each
    python -m synthetic_generators dead_leaves                      what it draws, and its options
    python -m synthetic_generators dead_leaves --out grid.png --channels 3 --size 64 --option exponent=2

Bad input is one line on stderr and exit status 2.
"""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

from synthetic_generators.description import describe
from synthetic_generators.registry import available, find_family, make_generator
from synthetic_generators.streams import Streams

_GAP = 2  # pixels between the images of a grid
_EDGE = 32  # pixels: smaller images are enlarged to at least this, so that one can see them


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: list[str]) -> None:
    """List the families, describe one, or draw a grid of one; ValueError or OSError for what can't be done."""
    parser = _OneLineParser(
        "python -m synthetic_generators", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("family", nargs="?", help="a name from the list, or one's own family, FILE.py:NAME or MODULE:NAME")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw a grid of images into this file")
    parser.add_argument("--channels", type=int, default=1, metavar="C", help="1 (the default) or 3")
    parser.add_argument("--size", type=int, default=28, metavar="PIXELS", help="side of an image, 28 by default")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="rows and columns of the grid, 8 by default")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the family; may be given several times")
    given = parser.parse_args(argv)
    if given.family is None:
        for name in available():
            print(f"{name:<18} {_first_sentence(describe(name).meaning)}")
        return
    find_family(given.family)
    if given.out is None:
        _print_description(given.family)
        return
    if given.rows < 1 or given.seed < 0:
        raise ValueError("--rows: expected an integer >= 1, and --seed one >= 0")
    generator = make_generator(given.family, given.channels, given.size, **dict(_parsed(option) for option in given.option))
    _save_grid(generator.generate(Streams(given.seed, range(given.rows**2))), given.out)


def _print_description(name: str) -> None:
    family = describe(name)
    print(family.meaning)
    for option in family.options:
        default = str(option.default).lower() if isinstance(option.default, bool) else option.default
        print(f"\n{option.name} = {default}    ({option.kind})")
        print(textwrap.indent(textwrap.fill(option.meaning, 110), "    "))


def _parsed(option: str) -> tuple[str, bool | float | str]:
    name, equals, text = option.partition("=")
    if not (name and equals):
        raise ValueError(f"--option {option}: expected NAME=VALUE")
    if text in ("true", "false"):
        return name, text == "true"
    try:
        return name, float(text)
    except ValueError:
        return name, text


def _first_sentence(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def _save_grid(images: np.ndarray, path: Path) -> None:
    """uint8 [rows^2, C, H, W] as one picture."""
    n, channels, side, _ = images.shape
    rows, scale = round(n**0.5), -(-_EDGE // side)
    tiles = np.repeat(np.repeat(images, scale, axis=2), scale, axis=3)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (_GAP, 0), (_GAP, 0)), constant_values=96)
    edge = side * scale + _GAP
    grid = tiles.reshape(rows, rows, channels, edge, edge).transpose(0, 3, 1, 4, 2).reshape(rows * edge, rows * edge, channels)
    grid = np.pad(grid, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=96)
    Image.fromarray(grid[:, :, 0] if channels == 1 else grid).save(path, format="PNG")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.stderr.write(f"synthetic_generators: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
