"""The protocol that generators follow, and the table in which they are found by name."""

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from synthetic_generators.streams import Streams

Nested = dict[str, dict[str, Any]]
"""The type of a field that takes the options which have options of their own, as {option: {its option: value}}."""


class Generator(Protocol):
    """A source of images of one fixed shape."""

    channels: int
    image_size: int

    def generate(self, streams: Streams) -> np.ndarray:
        """One image for each of the n >= 0 streams, uint8 [n, C, H, W].

        Each is a function of its own stream alone, bit for bit: whatever others are drawn with it, in which order, on which process.
        """


class UnknownFamilyError(ValueError):
    """There is no family of this name."""


_FAMILIES: dict[str, type] = {}
_FILES: dict[Path, ModuleType] = {}
_Family = TypeVar("_Family", bound=type)


def register(name: str) -> Callable[[_Family], _Family]:
    """Class decorator: make a generator dataclass known to `make_generator` as `name`."""

    def add(family: _Family) -> _Family:
        if name in _FAMILIES:
            raise ValueError(f"a generator named {name!r} is registered already")
        _FAMILIES[name] = family
        return family

    return add


def available() -> tuple[str, ...]:
    """The names of all families that were registered, sorted."""
    return tuple(sorted(_FAMILIES))


def find_family(name: str) -> type:
    """The class of a family: NAME, or one's own as FILE.py:NAME or MODULE:NAME, which is imported. Raises UnknownFamilyError, in one line."""
    source, colon, registered = name.rpartition(":")
    if colon:
        _import(source)
    if registered not in _FAMILIES:
        raise UnknownFamilyError(f"unknown generator {registered!r}: {_suggestion(registered, available())}")
    return _FAMILIES[registered]


def code_files() -> tuple[Path, ...]:
    """The Python files that images depend on: this package's, and those of families from elsewhere."""
    own = Path(__file__).parent.glob("*.py")
    others = (Path(inspect.getfile(family)) for family in _FAMILIES.values())
    return tuple(sorted({path.resolve() for path in (*own, *others)}))


def make_generator(name: str, channels: int, image_size: int, **options: Any) -> Generator:
    """Build the generator `name` (see `find_family`) for images uint8 [n, channels, image_size, image_size].

    Options of options are nested mappings or dotted names, `dead_leaves={"weight": 2}` or `**{"dead_leaves.weight": 2}`.
    Raises ValueError, in one line, for an unknown name or option (naming the nearest right one) and for a value
    that the option can't take.
    """
    family = find_family(name)
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels!r}")
    if image_size < 1:
        raise ValueError(f"image_size: expected an integer >= 1, got {image_size!r}")
    kinds = option_types(family)
    nesting = next((option for option, kind in kinds.items() if kind == Nested), None)
    plain, nested = _split(options)
    for option, inner in nested.items():
        if nesting is None:
            full = ".".join([option, *list(inner)[:1]])
            raise ValueError(f"unknown option {full!r} of {name}: {_suggestion(option, kinds)}")
    for option, value in plain.items():
        if nesting is not None and option in _FAMILIES:
            raise ValueError(f"option {option}: expected options of its own, such as {option}.weight, got {value!r}")
        if option not in kinds or option == nesting:
            raise ValueError(f"unknown option {option!r} of {name}: {_suggestion(option, [name for name in kinds if name != nesting])}")
    checked = {option: _checked(option, kinds[option], value) for option, value in plain.items()}
    if nesting is not None and nested:
        checked[nesting] = nested
    try:
        generator: Generator = family(channels=channels, image_size=image_size, **checked)
    except UnknownFamilyError as error:  # which an option names
        raise ValueError(f"option of {name}: {error}") from error
    return generator


def make_wrapped(name: str, channels: int, image_size: int, families: Nested) -> Generator:
    """The generator `name` for a family that wraps another, whose options are given under that name, and only under that.

    Raises ValueError, in one line, as `make_generator` does.
    """
    require(set(families) <= {name}, "family", f"the one whose options are given, {', '.join(families)}", name)
    return make_generator(name, channels, image_size, **families.get(name, {}))


def option_types(family: type) -> dict[str, Any]:
    """The options of a family with their types."""
    types = get_type_hints(family)
    return {field.name: types[field.name] for field in dataclasses.fields(family) if field.name not in ("channels", "image_size")}


def require(condition: bool, option: str, expected: str, value: object) -> None:
    """Raise ValueError in the registry's form unless the condition holds."""
    if not condition:
        raise ValueError(f"option {option}: expected {expected}, got {value!r}")


def _import(source: str) -> None:
    """Import a user's module, or a file by its path, once; UnknownFamilyError with one line if that fails."""
    try:
        if not source.endswith(".py"):
            importlib.import_module(source)
            return
        path = Path(source).resolve()
        if path in _FILES:
            return
        spec = importlib.util.spec_from_file_location(f"family_in_{path.stem}_{len(_FILES)}", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"no way to import {path}")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look types up
        spec.loader.exec_module(module)
        _FILES[path] = module
    except Exception as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise UnknownFamilyError(f"{source}: expected Python code that can be imported, got {' '.join(reason.split())}") from error


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], Nested]:
    """Options with a value, and those with options of their own."""
    plain: dict[str, Any] = {}
    nested: Nested = {}
    for option, value in options.items():
        dot = option.find(".", option.find(":") + 1)  # one before a colon belongs to the path of a file or module
        if isinstance(value, Mapping):
            nested.setdefault(option, {}).update(value)
        elif dot >= 0:
            nested.setdefault(option[:dot], {})[option[dot + 1 :]] = value
        else:
            plain[option] = value
    return plain, nested


def _suggestion(wrong: str, known: Iterable[str]) -> str:
    names = list(known)
    if not names:
        return "it has none"
    nearest = difflib.get_close_matches(wrong, names, n=1, cutoff=0.0)[0]
    return f"did you mean {nearest!r}? (there are {', '.join(names)})"


def _checked(option: str, kind: Any, value: Any) -> Any:
    """The value as the option's declared type: configurations write 3 for 3.0."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            raise ValueError(f"option {option}: unknown choice {value!r}: {_suggestion(str(value), choices)}")
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is float:
        require(is_number, option, "a finite number", value)
        return float(value)
    if kind is int:
        require(is_number and value == int(value), option, "an integer", value)
        return int(value)
    require(isinstance(value, kind), option, f"a {kind.__name__}", value)
    return value
