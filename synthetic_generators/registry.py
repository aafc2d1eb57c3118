"""The protocol that generators follow, and the table in which they are found by name."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from synthetic_generators.streams import Streams


class Generator(Protocol):
    """A source of images of one fixed shape."""

    channels: int
    image_size: int

    def generate(self, streams: Streams) -> np.ndarray:
        """One image for each of the n >= 0 streams, uint8 [n, C, H, W].

        Each is a function of its own stream alone, bit for bit: whatever others are drawn with it, in which order, on which process.
        """


_FAMILIES: dict[str, type] = {}
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
    """The names that `make_generator` takes, sorted."""
    return tuple(sorted(_FAMILIES))


def make_generator(name: str, channels: int, image_size: int, **options: float | int | str | bool) -> Generator:
    """Build the generator `name` for images uint8 [n, channels, image_size, image_size].

    Raises ValueError, in one line, for an unknown name or option (naming the nearest right one) and for a value
    that the option can't take.
    """
    if name not in _FAMILIES:
        raise ValueError(f"unknown generator {name!r}: {_suggestion(name, available())}")
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels!r}")
    if image_size < 1:
        raise ValueError(f"image_size: expected an integer >= 1, got {image_size!r}")
    family = _FAMILIES[name]
    types = get_type_hints(family)
    kinds = {f.name: types[f.name] for f in dataclasses.fields(family) if f.name not in ("channels", "image_size")}
    for option in options:
        if option not in kinds:
            raise ValueError(f"unknown option {option!r} of {name}: {_suggestion(option, kinds)}")
    checked = {option: _checked(option, kinds[option], value) for option, value in options.items()}
    generator: Generator = family(channels=channels, image_size=image_size, **checked)
    return generator


def require(condition: bool, option: str, expected: str, value: object) -> None:
    """Raise ValueError in the registry's form unless the condition holds."""
    if not condition:
        raise ValueError(f"option {option}: expected {expected}, got {value!r}")


def _suggestion(wrong: str, known: Iterable[str]) -> str:
    names = list(known)
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
