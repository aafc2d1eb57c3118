"""YAML as this project reads and writes it: YAML 1.2's core schema, no key twice, no aliases, no tags that build objects.

PyYAML follows YAML 1.1, where `1e-5` is text, `no` is false, `1:30` is ninety and `010` is eight; each of these has cost somebody a
wrong experiment. What is written here is quoted so that readers of either version see the same values.
"""

import re
from pathlib import Path
from typing import Any, Final

import yaml

from dpsyngen.errors import InputError

_NULL: Final = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL: Final = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT: Final = re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$")
_FLOAT: Final = re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")
_CORE_SCHEMA: Final = (
    ("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", _BOOL, list("tTfF")),
    ("tag:yaml.org,2002:int", _INT, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, "expected plain values, got an alias (*) or a tag (!)", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                got = f"{key.value!r} twice" if isinstance(key, yaml.ScalarNode) else "a collection"
                raise yaml.constructor.ConstructorError(None, None, f"expected every key to be one name, given once, got {got}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))


class _Dumper(yaml.SafeDumper):
    """Its resolvers are those of YAML 1.1 and 1.2 together: text that either would read as something else is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: Any) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
_Dumper.add_representer(list, _Dumper.represent_list)


def parse_yaml(text: str | bytes, origin: str) -> Any:
    """The value of one YAML document.

    Raises InputError, beginning with `origin`, when the text isn't YAML, has a key twice, an alias or a tag.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        place = f" line {error.problem_mark.line + 1}:" if error.problem_mark and error.problem_mark.line else ""
        problem = error.problem or error.context
        raise InputError(f"{origin}:{place} expected YAML, but: {problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{origin}: expected YAML, but: {str(error).splitlines()[0]}") from None


def read_yaml(path: Path, origin: str) -> Any:
    """The value of the YAML file at `path`; InputError, beginning with `origin`, when it can't be read or parsed."""
    try:
        text = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{origin}: expected a YAML file, but: {getattr(error, 'strerror', error)}") from None
    return parse_yaml(text, origin)


def dump_yaml(value: Any) -> str:
    """`value` (dicts, lists, str, numbers, bool, None) as block YAML, keys in their order, each list on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=100)
