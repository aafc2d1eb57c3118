"""What families there are and what their options mean, as their own docstrings say it."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from synthetic_generators.registry import Nested, find_family, option_types


@dataclass(frozen=True)
class Option:
    """One setting of a family."""

    name: str
    kind: str
    """What it may be, in words."""
    default: Any
    meaning: str


@dataclass(frozen=True)
class Description:
    """A family: what it draws, where that is from, what can be set."""

    name: str
    meaning: str
    options: tuple[Option, ...]


def describe(name: str) -> Description:
    """The docstrings of a family and of its options. Raises ValueError, in one line, for a family that doesn't exist."""
    family = find_family(name)
    types, meanings = option_types(family), _field_docstrings(family)
    defaults = {field.name: _default(field) for field in dataclasses.fields(family)}
    options = (Option(option, _in_words(kind), defaults[option], meanings.get(option, "")) for option, kind in types.items())
    return Description(name, inspect.cleandoc(family.__doc__ or ""), tuple(options))


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    return "families with options of their own" if kind == Nested else {bool: "true or false", int: "an integer", float: "a number"}.get(kind, "text")


def _field_docstrings(family: type) -> dict[str, str]:
    """The strings that stand below the fields of a class and of those that it inherits from."""
    found: dict[str, str] = {}
    for cls in reversed(family.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        for field, below in itertools.pairwise(getattr(definition, "body", [])):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[ast.unparse(field.target)] = inspect.cleandoc(str(below.value.value))
    return found
