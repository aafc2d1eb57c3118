"""The rows of the ladder, from a YAML file: what each shows, and the configuration that it runs."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsyngen.cli import read_config
from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError
from dpsyngen.field_types import show, unconvert
from dpsyngen.launcher import settled
from dpsyngen.strict_yaml import read_yaml

ROOT = Path(__file__).parents[2]
_ENTRIES = {"shows", "on", "configs", "set"}


@dataclass(frozen=True)
class Row:
    """One run of the ladder."""

    name: str
    shows: str
    """What the row is there for, in words."""
    config: RunConfig

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, by dotted name; but for the run's name, which decides nothing.

        So a field that is added to the configuration later, and is off by default, doesn't make another row of an old one.
        """
        chosen, defaults = _fields(self.config), _fields(RunConfig())
        return {name: value for name, value in chosen.items() if name != "name" and value != defaults[name]}

    @property
    def hash(self) -> str:
        """Twelve hex digits that change with the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]


def read_rows(path: Path, overrides: Sequence[str] = ()) -> dict[str, Row]:
    """The rows of a file by name, in its order, each with the flags `overrides` on top.

    A row has `shows`; `configs`, stacked YAML files relative to the project's root; `set`, dotted fields with their values on top of these;
    and `on`, a row above it whose files and fields it takes over first. Raises InputError that names file, row and what was expected.
    """
    content = read_yaml(path, str(path))
    given = content.get("rows") if isinstance(content, dict) and set(content) == {"rows"} else None
    if not isinstance(given, dict) or not given:
        raise InputError(f"{path}: expected rows, a mapping of names to rows, and nothing else")
    stacks: dict[str, tuple[list[str], dict[str, Any]]] = {}
    rows: dict[str, Row] = {}
    for name, entry in given.items():
        where = f"{path}: rows: {name}"
        _check(entry, str(name), stacks, where)
        files, fields = stacks.get(entry.get("on", ""), ([], {}))
        stacks[name] = [*files, *entry.get("configs", [])], fields | entry.get("set", {})
        rows[name] = Row(name, entry["shows"], _config(*stacks[name], overrides, where))
    return rows


def _config(files: Sequence[str], fields: dict[str, Any], overrides: Sequence[str], where: str) -> RunConfig:
    flags = [f"--{field}={value if isinstance(value, str) else json.dumps(value)}" for field, value in fields.items()]
    try:
        config = settled(read_config([ROOT / file for file in files], [*flags, *overrides]))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if not config.data.public:
        raise InputError(f"{where}: data.public: expected true, since what a row comes to is published, and its metrics and times are not private")
    if config.synthetic.cache is not None:
        raise InputError(f"{where}: synthetic.cache: expected null, since the row's minutes are those of all that it takes")
    return config


def _check(entry: Any, name: str, above: dict[str, Any], where: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise InputError(f"{where}: expected a name of lower-case letters, digits, dashes, dots and underscores")
    if not isinstance(entry, dict) or not set(entry) <= _ENTRIES or not isinstance(entry.get("shows"), str):
        raise InputError(f"{where}: expected shows (text), and on, configs or set beside it, got {show(entry)}")
    if "on" in entry and (not isinstance(entry["on"], str) or entry["on"] not in above):
        raise InputError(f"{where}: on: expected the name of a row above, got {show(entry['on'])}")
    files, fields = entry.get("configs", []), entry.get("set", {})
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise InputError(f"{where}: configs: expected a list of files, got {show(files)}")
    if not isinstance(fields, dict) or any(isinstance(value, dict) for value in fields.values()):
        raise InputError(f"{where}: set: expected dotted fields with their values, such as privacy.epsilon: 1, got {show(fields)}")


def _fields(config: RunConfig) -> dict[str, Any]:
    """A configuration as {dotted name: value}; options of a family as one value."""
    content = unconvert(config)
    sections = {name: value for name, value in content.items() if isinstance(value, dict)}
    return {name: value for name, value in content.items() if name not in sections} | {
        f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()
    }
