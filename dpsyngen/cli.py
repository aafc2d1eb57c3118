"""YAML files and flags to a `RunConfig`, and what every script does alike: parse, explain, and end in one clear line.

Files are stacked in the order given, the flags on top; where two set the same field the later wins, and `synthetic.options` is
merged key by key, options within options by their dotted names. A file may name others to build on, `base: other.yaml` or a list,
relative to itself. `steps` and `epochs` of a phase are two ways to say one thing: a file, or the flags, that set one of them alone clear
the other. A file may end in `cells`, named mappings that each make a configuration of their own on top of it; `python -m dpsyngen.sweep`
runs them.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import io
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, get_args, get_origin, get_type_hints

from dpsyngen.config import RunConfig
from dpsyngen.errors import InputError, Interrupted
from dpsyngen.field_types import EntryError, convert, describe, flat_options, metavar, plain, show, unconvert
from dpsyngen.strict_yaml import dump_yaml, parse_yaml, read_yaml

CONFIG_FILE: Final = "config.yaml"

_TOP_LEVEL: Final[dict[str, Any]] = get_type_hints(RunConfig)
_SECTIONS: Final[dict[str, Any]] = {name: kind for name, kind in _TOP_LEVEL.items() if dataclasses.is_dataclass(kind)}
_FIELDS: Final[dict[str, Any]] = {name: kind for name, kind in _TOP_LEVEL.items() if name not in _SECTIONS} | {
    f"{section}.{name}": kind for section, cls in _SECTIONS.items() for name, kind in get_type_hints(cls).items()
}
_PAIRS: Final = [(f"{phase}.steps", f"{phase}.epochs") for phase in ("synthetic", "central", "private")]
_HEAD_START: Final = 5.0  # seconds; a launcher ends the other processes as soon as the main one has ended
_UNUSABLE_FILE: Final = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Setting:
    value: Any
    origin: str
    """What an error about it begins with: "FILE: FIELD" or "--FIELD"."""


_Layer = dict[str, _Setting]


def read_config(paths: Sequence[Path], overrides: Sequence[str] = (), cell: str | None = None) -> RunConfig:
    """The configuration of the stacked YAML files with the flags on top; with `cell`, what that one of the last file's cells sets between them.

    `overrides` are `--section.field VALUE` or `--section.field=VALUE`, with dashes or underscores; values are YAML (`1e-5`, `null`,
    `[a, b]`), text is taken as it is. Fields that nothing sets keep the defaults of `dpsyngen.config`.
    Raises InputError, one line with the file or flag and the field, for everything that can't be used; a flag may not set what a cell sets.
    """
    settings, flags = _Layer(), _flag_layer(overrides)
    for path in paths:
        _stack(settings, _file_layer(Path(path), (), with_cells=cell is not None and path is paths[-1]))
    if cell is None:
        _stack(settings, flags)
        return _build(settings)
    label = f"{paths[-1]}: cells: {cell}"
    own = _flatten(_expect_mapping(_cells(paths[-1])[cell], label), f"{label}: ")
    for field in flags:
        if _sets(own, field, flags[field]):
            raise InputError(f"{label}: expected fields that neither a flag nor --grid sets as well, got --{field} too")
    _stack(settings, own)
    _stack(settings, flags)
    try:
        return _build(settings)
    except InputError as error:  # which may blame a field of the file, or a default, that the cell doesn't go with
        raise error if str(error).startswith(label) else InputError(f"{label}: {error}") from None


def cell_names(path: Path) -> list[str]:
    """The names of the cells of a file, in its order; InputError if it has none, or one that names nothing or isn't text."""
    return list(_cells(path))


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a run directory holds, with the flags on top; InputError where there is none."""
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{run_dir}: is not a run directory (it has no {CONFIG_FILE}); run train.py first")
    return read_config([path], overrides)


def dump_config(config: RunConfig) -> str:
    """The configuration as complete YAML; reading it gives an equal `RunConfig`."""
    return dump_yaml(unconvert(config))


# Layers: what one file with its bases, or the flags together, set.


def _file_layer(path: Path, referrers: tuple[Path, ...], *, with_cells: bool = False) -> _Layer:
    label = f"{referrers[-1]}: base: {path}" if referrers else str(path)
    content = _expect_mapping(read_yaml(path, label), label)
    if os.path.realpath(path) in map(os.path.realpath, referrers):
        raise InputError(f"{label}: expected files that don't build on each other in a circle")
    if content.pop("cells", None) is not None and not with_cells:
        raise InputError(f"{label}: cells: expected a file of one configuration; python -m dpsyngen.sweep --cells {path} runs one with cells")
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(f"{path}: base: expected a file or a list of files, got {show(bases)}")
    layer: _Layer = {}
    for base in bases:
        _stack(layer, _file_layer(path.parent / base, (*referrers, path)))
    _stack(layer, _flatten(content, f"{path}: "))
    return layer


def _cells(path: Path) -> dict[str, Any]:
    """What the cells of a file hold, by name, not yet checked."""
    cells = _expect_mapping(read_yaml(path, str(path)), str(path)).get("cells")
    if not isinstance(cells, dict) or not cells:
        raise InputError(f"{path}: cells: expected names of cells with the fields that each sets, got {show(cells)}")
    for name in cells:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InputError(f"{path}: cells: expected a name for each cell (numbers in quotes), got {show(name)}")
    return cells


def _sets(layer: _Layer, field: str, setting: _Setting) -> bool:
    """Whether a layer sets a field, the other one of its pair, or where it holds options one of those that `setting` has."""
    if field in layer and get_origin(_FIELDS[field]) is dict:
        return bool(layer[field].value.keys() & setting.value.keys())
    return field in layer or any(field in pair and not layer.keys().isdisjoint(pair) for pair in _PAIRS)


def _flag_layer(overrides: Sequence[str]) -> _Layer:
    layer: _Layer = {}
    remaining = list(overrides)
    while remaining:
        flag, equals, text = remaining.pop(0).partition("=")
        if not flag.startswith("--") or flag == "--":
            raise InputError(f"{flag}: expected a flag such as --privacy.epsilon 1; a list is one argument, '[a, b]'")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise InputError(f"{flag}: expected a value after it, got none")
            text = remaining.pop(0)
        name = flag.removeprefix("--").replace("-", "_")
        tree: Any = _flag_value(_FIELDS.get(name), text, flag)
        for part in reversed(name.split(".")):
            tree = {part: tree}
        _put(layer, _flatten(tree, "--"))
    return layer


def _flag_value(kind: Any, text: str, flag: str) -> Any:
    """Text for the fields that hold text, so that nobody has to quote twice; YAML for all others."""
    if kind is str:
        return text
    if kind == str | None:
        return None if text in ("null", "") else text
    return parse_yaml(text, flag)


def _flatten(content: Mapping[Any, Any], origin: str) -> _Layer:
    """A nested mapping as {dotted field: setting}; every name is known, the values are not yet checked."""
    layer: _Layer = {}
    for key, value in content.items():
        if key not in _SECTIONS:
            _expect_field(str(key), value, origin)
            layer[key] = _Setting(value, f"{origin}{key}")
            continue
        for name, inner in _expect_mapping(value, f"{origin}{key}").items():
            field = f"{key}.{name}"
            _expect_field(field, inner, origin)
            if get_origin(_FIELDS[field]) is dict:
                inner = flat_options(_expect_mapping(inner, f"{origin}{field}"))
            layer[field] = _Setting(inner, f"{origin}{field}")
    return layer


def _put(below: _Layer, above: _Layer) -> None:
    for field, setting in above.items():
        merges = field in below and get_origin(_FIELDS[field]) is dict
        below[field] = _Setting(below[field].value | setting.value, setting.origin) if merges else setting


def _stack(below: _Layer, above: _Layer) -> None:
    """Put `above` on top of `below`, in place; the one of `steps` and `epochs` that is set alone clears the other."""
    for one, other in [*_PAIRS, *((epochs, steps) for steps, epochs in _PAIRS)]:
        if one in above and above[one].value is not None and other not in above:
            below[other] = _Setting(None, above[one].origin)
    _put(below, above)


def _expect_mapping(value: Any, origin: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{origin}: expected a mapping of fields, got {show(value)}")
    return value


def _expect_field(field: str, value: Any, origin: str) -> None:
    if field in _FIELDS:
        return
    while isinstance(value, dict) and value:  # blame the full name below an unknown section
        key, value = next(iter(value.items()))
        field = f"{field}.{key}"
    nearest = _nearest(field)
    hint = f"did you mean {nearest}?" if nearest else "--help lists the fields"
    shown = field if field.isprintable() else ascii(field)
    raise InputError(f"{origin}{shown}: expected the name of a field, got one that doesn't exist; {hint}")


def _nearest(field: str) -> str | None:
    """The known name whose last part is most like the last part of `field`; the sections decide between equals."""

    def likeness(candidate: str) -> tuple[float, float]:
        (section, _, name), (its_section, _, its_name) = field.rpartition("."), candidate.rpartition(".")
        return difflib.SequenceMatcher(None, name, its_name).ratio(), difflib.SequenceMatcher(None, section, its_section).ratio()

    best = max([*_FIELDS, *_SECTIONS], key=likeness)
    return best if likeness(best)[0] >= 0.6 else None


# From layers to the dataclasses.


def _build(settings: _Layer) -> RunConfig:
    values: dict[str, Any] = {}
    for field, setting in settings.items():
        try:
            values[field] = convert(setting.value, _FIELDS[field])
        except InputError as error:
            raise _blamed(error, settings) from None
        except EntryError as error:
            raise InputError(f"{setting.origin}: {error}") from None
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{setting.origin}: expected {describe(_FIELDS[field])}, got {show(setting.value)}") from None
    try:
        sections = {section: cls(**{field.partition(".")[2]: value for field, value in values.items() if field.startswith(f"{section}.")})
                    for section, cls in _SECTIONS.items()}
        return RunConfig(**{field: value for field, value in values.items() if "." not in field}, **sections)
    except InputError as error:
        raise _blamed(error, settings) from None


def _blamed(error: InputError, settings: _Layer) -> InputError:
    """The error with the file or flag that set its field."""
    field, _, complaint = str(error).partition(": ")
    return InputError(f"{settings[field].origin}: {complaint}" if field in settings else str(error))


# What the scripts share.


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaints are InputErrors, one line instead of a page."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(message)


class ScriptParser(OneLineParser):
    """A script's own flags, defined with dashes; it leaves every other flag to the configuration.

    Underscores in flags are understood as well. --help goes on with the fields of `sections` (all when empty).
    """

    def __init__(self, description: str, sections: Sequence[str] = ()) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self.sections = sections

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The script's own options, and the overrides for `read_config`."""
        dashed = [token.partition("=") if token.startswith("--") else ("", "", token) for token in argv]
        return self.parse_known_args([name.replace("_", "-") + equals + value for name, equals, value in dashed])

    def format_help(self) -> str:
        """The page of `config_help` with the script's own flags."""
        return config_help(self.sections, self.prog, self.description, [action for action in self._actions if action.dest != "help"])


def config_help(
    sections: Sequence[str] = (), prog: str | None = None, description: str | None = None, own: Sequence[argparse.Action] = ()
) -> str:
    """The page of --help, as wide as the terminal: each field with its type, its meaning (its docstring in `dpsyngen.config`) and default.

    It has the fields of `sections` alone when there are any, after a script's `own` flags.
    """
    import tyro  # here, since --help alone needs it
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _leaf(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type not in (bool, int, float, str) and not get_args(info.type):
            return None  # a section, or a part of a type that is shown whole
        return PrimitiveConstructorSpec(nargs=1, metavar=metavar(info.type), instance_from_str=lambda given: given[0], is_instance=lambda _: True,
                                        str_from_instance=lambda value: [plain(value)])

    parts = {section: _SECTIONS[section] for section in sections} or {"": RunConfig}
    shown = dataclasses.make_dataclass("shown", [
        *((flag.dest, Annotated[str, tyro.conf.arg(help=flag.help, metavar=_metavar(flag), help_behavior_hint="")], "") for flag in own),
        *((name or "everything", Annotated[part, tyro.conf.arg(name=name)], dataclasses.field(default_factory=part)) for name, part in parts.items()),
    ])
    page = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding or "utf-8")  # tyro draws what the encoding can hold
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        tyro.cli(shown, prog=prog, description=description, args=["--help"], registry=registry, config=(tyro.conf.FlagConversionOff,),
                 use_underscores=True)
    page.seek(0)
    return page.read()


def _metavar(flag: argparse.Action) -> str:
    default = {int: "INT", float: "FLOAT", Path: "PATH"}.get(flag.type, "TEXT")  # type: ignore[call-overload]
    return "" if flag.nargs == 0 else str(flag.metavar or default)


def run_script(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the command line, and end as a command should.

    Bad input, a full disk or a file that may not be written: one line on stderr (by the main process; by another only where that one has
    no such trouble) and exit status 2;
    Ctrl-C: one line and 130, while training also SIGTERM, with 143; a reader that hangs up, as `head` does: silence and 141. Anything
    else is a bug and keeps its traceback.
    """
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except InputError as error:
        _end(str(error), 2)
    except Interrupted as interruption:
        _end(str(interruption), interruption.status)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes at its end
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in _UNUSABLE_FILE:
            raise
        _end(f"{error.filename or 'a file that was being written'}: {error.strerror}", 2)


def is_main_process() -> bool:
    """Whether this is the process that speaks, of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def _end(message: str, status: int) -> NoReturn:
    speaker = Path(sys.argv[0]).name
    if not is_main_process():
        if status != 2:
            raise SystemExit(status)
        time.sleep(_HEAD_START)
        speaker += f": process {os.environ['RANK']}"
    sys.stderr.write(f"{speaker}: {' '.join(message.splitlines())}\n")
    raise SystemExit(status)
