"""Named cells of a file and a grid on the command line, FIELD=VALUE,VALUE,..., to one checked configuration per combination."""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsyngen.cli import cell_names, read_config
from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError
from dpsyngen.field_types import plain
from dpsyngen.launcher import settled

CELL = "cell"
"""The column of a table that holds the names of cells."""
_LONGEST_NAME = 120
_OWN_FILES = ("lock", "plots", "table.csv", "table.md")


@dataclass(frozen=True)
class Axis:
    """A field and the texts of the values that it takes, as the command line has them."""

    field: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Axis":
        """The axis that `--grid TEXT` spells; InputError if it isn't FIELD=VALUE,VALUE,... A list is one value: [a, b]."""
        field, equals, values = text.partition("=")
        field = field.strip().removeprefix("--").replace("-", "_")
        if not equals or not field:
            raise InputError(f"--grid {text}: expected FIELD=VALUE,VALUE,..., such as privacy.epsilon=1,10")
        parts = [] if not values.strip() else _split(values)
        if not all(parts) or not parts:
            raise InputError(f"--grid {field}: expected values with commas between them, got {values!r}")
        if field == "name":
            raise InputError("--grid name: expected a field that decides a result; the cells have directories of their own")
        return cls(field, tuple(parts))


@dataclass(frozen=True)
class Cell:
    """One combination: its name in the file of cells, under `CELL`, its values of the grid by field, and the configuration that they make."""

    values: dict[str, Any]
    config: RunConfig

    @property
    def name(self) -> str:
        """A directory's name made of the values alone, so that a cell keeps its run when the grid grows."""
        text = ",".join(value if field == CELL else f"{field}={plain(value)}" for field, value in self.values.items())
        safe = re.sub(r"^[.-]|[^A-Za-z0-9.,=+_-]+", "_", text)
        if safe == text and len(text) <= _LONGEST_NAME and text not in _OWN_FILES:
            return text
        return f"{safe[:_LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def build_cells(configs: Sequence[Path], overrides: Sequence[str], axes: Sequence[Axis], cells_file: Path | None = None) -> list[Cell]:
    """Every combination of the axes' values on top of the YAML files and flags, the last axis fastest; with a file of cells, for each of them.

    Raises InputError for an unknown field, a value that its field or the configuration refuses, and a field or value given twice.
    """
    if not axes and cells_file is None:
        raise InputError("--grid: expected at least one field with its values, such as --grid privacy.epsilon=1,10, or --cells FILE")
    fields = [axis.field for axis in axes]
    flags = {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in overrides if flag.startswith("--")}
    for field in fields:
        if fields.count(field) > 1:
            raise InputError(f"--grid {field}: expected each field once, got it twice")
        if field in flags:
            raise InputError(f"--grid {field}: expected a field that no flag sets as well, got --{field} too")
    files = [*configs, cells_file] if cells_file is not None else configs
    names = cell_names(cells_file) if cells_file is not None else [None]
    cells: list[Cell] = []
    for name, combination in itertools.product(names, itertools.product(*(axis.values for axis in axes))):
        chosen = [f"--{field}={text}" for field, text in zip(fields, combination, strict=True)]
        config = settled(read_config(files, [*overrides, *chosen], name))
        cell = Cell(({} if name is None else {CELL: name}) | {field: value_of(config, field) for field in fields}, config)
        if any(cell.values == other.values for other in cells):
            raise InputError(f"--grid {' '.join(chosen)}: expected each combination once, got a value twice")
        cells.append(cell)
    if len({cell.config.name for cell in cells}) > 1:
        raise InputError(f"{cells_file}: cells: expected fields that decide a result, got name; the cells have directories of their own")
    return cells


def value_of(config: RunConfig, field: str) -> Any:
    """What a configuration holds under a dotted name; entries of `synthetic.options` have one too. InputError for a whole section."""
    value: Any = config
    parts = field.split(".")
    while parts:
        if isinstance(value, dict):  # options, whose names may have dots
            value, parts = value.get(".".join(parts), {}), []
        else:
            value = getattr(value, parts.pop(0))
    if not isinstance(value, bool | int | float | str | tuple | None):
        raise InputError(f"--grid {field}: expected a field, got a group of fields")
    return value


def _split(text: str) -> list[str]:
    """The parts between commas outside brackets, without the spaces around them."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
