"""What values a field of the configuration takes: checked conversion, and its type in words.

The types are those that `dpsyngen.config` uses: bool, int, float, str, Literal, tuples, a dict of options, dataclasses of these as entries of
a list, and any of them or None.
"""

import dataclasses
import math
import reprlib
from collections.abc import Callable
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import cattrs

_WORDS: Final = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
_PLURALS: Final = {bool: "booleans", int: "integers", float: "numbers", str: "texts"}
_METAVARS: Final = {bool: "{true,false}", int: "INT", float: "FLOAT", str: "TEXT", type(None): "null"}


class EntryError(ValueError):
    """What is wrong in an entry of a list, in words: which entry, which of its fields, and what was expected."""


def convert(value: Any, kind: Any) -> Any:
    """A value as YAML gives it, as the type `kind`.

    Nothing changes silently but whole floats to integers, integers to floats, lists to tuples and mappings to dataclasses.
    Raises TypeError, ValueError or OverflowError when the value isn't of that type; EntryError, a ValueError, where it can say more.
    """
    return _CONVERTER.structure(value, kind)


def unconvert(config: Any) -> Any:
    """A configuration as the dicts, lists and scalars that YAML can write."""
    return _CONVERTER.unstructure(config)


def describe(kind: Any) -> str:
    """A type in words, for "expected ..."."""
    args = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(str(option) for option in args)
    if get_origin(kind) is tuple:
        return f"a list of {_entries(kind)}"
    if get_origin(kind) is dict:
        return "a mapping of names to numbers, texts or booleans, or to such mappings that aren't empty"
    if dataclasses.is_dataclass(kind):
        return f"a mapping with some of {', '.join(get_type_hints(kind))}"
    return " or ".join(describe(option) for option in args) if args else _WORDS[kind]


def _entries(kind: Any) -> str:
    """The entries of a tuple, in words."""
    args = get_args(kind)
    number = "" if args[-1] is Ellipsis else f"{len(args)} "
    if get_origin(args[0]) is tuple:
        return f"{number}lists of {_entries(args[0])}"
    return number + (_PLURALS.get(args[0]) or describe(args[0]).replace("a mapping", "mappings", 1))


def metavar(kind: Any) -> str:
    """A type in short, for --help."""
    args = get_args(kind)
    if get_origin(kind) is Literal:
        return f"{{{','.join(str(option) for option in args)}}}"
    if get_origin(kind) is tuple:
        return f"[{', '.join('...' if item is Ellipsis else metavar(item) for item in args)}]"
    if get_origin(kind) is dict:
        return "{NAME: VALUE, ...}"
    if dataclasses.is_dataclass(kind):
        return "{NAME: VALUE, ...}"
    return "|".join(metavar(option) for option in args) if args else _METAVARS[kind]


def plain(value: Any) -> str:
    """A value as one would write it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {name: given for name, given in vars(value).items() if given is not None and given != _default(type(value), name)}
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {plain(item)}' for name, item in value.items())}}}"
    return f"[{', '.join(plain(item) for item in value)}]" if isinstance(value, tuple) else str(value)


def _default(kind: Any, name: str) -> Any:
    (field,) = (field for field in dataclasses.fields(kind) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def flat_options(options: dict[Any, Any]) -> dict[Any, Any]:
    """Options that hold options under dotted names, {a: {b: 1}} as {a.b: 1}; what isn't a mapping with names of text stays as it is."""
    flat: dict[Any, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict) and value and all(isinstance(key, str) for key in (name, *value)):
            flat |= {f"{name}.{inner}": item for inner, item in flat_options(value).items()}
        else:
            flat[name] = value
    return flat


def show(value: Any) -> str:
    """A value for "got ...": short, on one line, text in quotes."""
    return plain(value) if value is None or isinstance(value, bool) else reprlib.repr(value)


def _check(accepted: bool) -> None:
    if not accepted:
        raise TypeError


def _boolean(value: Any, _: Any) -> bool:
    _check(isinstance(value, bool))
    return bool(value)


def _integer(value: Any, _: Any) -> int:
    _check(type(value) is int or (isinstance(value, float) and value.is_integer()))
    return int(value)


def _number(value: Any, _: Any) -> float:
    _check(type(value) in (int, float) and not math.isnan(value))
    return float(value)


def _text(value: Any, _: Any) -> str:
    _check(isinstance(value, str))
    return str(value)


def _choice(value: Any, kind: Any) -> Any:
    _check(any(type(value) is type(option) and value == option for option in get_args(kind)))
    return value


def _sequence(value: Any, kind: Any) -> tuple[Any, ...]:
    _check(isinstance(value, list))
    kinds = get_args(kind)
    kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
    converted = []
    for number, (item, item_kind) in enumerate(zip(value, kinds, strict=True), start=1):
        try:
            converted.append(convert(item, item_kind))
        except EntryError as error:
            raise EntryError(f"entry {number}: {error}") from None
    return tuple(converted)


def _record(value: Any, kind: Any) -> Any:
    """A mapping as a dataclass whose fields it names."""
    _check(isinstance(value, dict))
    kinds, values = get_type_hints(kind), {}
    for name, item in value.items():
        if name not in kinds:
            raise EntryError(f"{show(name)}: expected one of {', '.join(kinds)}")
        try:
            values[name] = convert(item, kinds[name])
        except EntryError as error:
            raise EntryError(f"{name}: {error}") from None
        except (TypeError, ValueError, OverflowError):
            raise EntryError(f"{name}: expected {describe(kinds[name])}, got {show(item)}") from None
    for field in dataclasses.fields(kind):
        if field.name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise EntryError(f"{field.name}: expected {describe(kinds[field.name])}, got nothing")
    return kind(**values)


def _options(value: Any, kind: Any) -> dict[str, Any]:
    scalars = get_args(get_args(kind)[1])
    _check(isinstance(value, dict))
    options = flat_options(value)
    _check(all(isinstance(key, str) and type(item) in scalars for key, item in options.items()))
    return options


def _made_of(origin: Any) -> Callable[[Any], bool]:
    return lambda kind: get_origin(kind) is origin


def _strict_converter() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=False, unstruct_collection_overrides={tuple: list})
    scalars: dict[type, Callable[[Any, Any], Any]] = {bool: _boolean, int: _integer, float: _number, str: _text}
    for scalar, hook in scalars.items():
        converter.register_structure_hook(scalar, hook)
    converter.register_structure_hook_func(_made_of(Literal), _choice)
    converter.register_structure_hook_func(_made_of(tuple), _sequence)
    converter.register_structure_hook_func(_made_of(dict), _options)
    converter.register_structure_hook_func(dataclasses.is_dataclass, _record)
    converter.register_unstructure_hook(float, float)  # 300 is written as 300.0, so that equal configurations are equal texts
    return converter


_CONVERTER: Final = _strict_converter()
