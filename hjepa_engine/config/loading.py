"""Configurations from YAML and the command line: strict, typed, one line per mistake."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from hjepa_engine.config.ranges import describe_limits, format_value, truncate
from hjepa_engine.config.schema import Config
from hjepa_engine.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML with version 1.2's numbers (``1e-4`` is one), without aliases and repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(f"aliases are not allowed{self._place()}")
        return super().compose_node(parent, index)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        self._check_keys(node, "")
        return node

    def _check_keys(self, node: Any, path: str) -> None:
        if isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                self._check_keys(item, f"{path}[{number}]")
        seen: set[str] = set()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"keys must be plain strings, see line {line}")
            name = f"{path}.{key.value}" if path else key.value
            if key.value in seen:
                raise ConfigError(f"{truncate(name, 100)} is given twice, again in line {line}")
            seen.add(key.value)
            self._check_keys(value, name)

    def _place(self) -> str:
        return f" (line {self.peek_event().start_mark.line + 1})"


class _Dumper(yaml.SafeDumper):
    """Quotes what :class:`_StrictLoader` would take for something other than a string (``1e-4``)."""


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    for _class in (_StrictLoader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
# Python refuses to read thousands of digits: they stay a string, which is no number either.
_StrictLoader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(node.value) if len(node.value) < 1000 else node.value
)


def parse_yaml(text: str) -> Any:
    """The plain data in ``text``.

    >>> parse_yaml("lr: 1e-4")
    {'lr': 0.0001}

    Raises:
        ConfigError: it is no safe YAML, repeats a key, uses aliases or is nested too deeply.
    """
    try:
        return _StrictLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConfigError(f"no valid YAML: {' '.join((error.problem or str(error)).split())}{line}") from error
    except (yaml.YAMLError, ValueError, KeyError, AttributeError) as error:  # the last two: a tag on a wrong value
        raise ConfigError(f"no valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError("no valid YAML: nested too deeply") from error


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: YAML file; None: the defaults alone.
        overrides: as on the command line: ``["--training.lr", "3e-4"]`` or ``["training.lr=3e-4"]``.

    Raises:
        ConfigError: one line that names the file, the key, the rule and the value, at most 160 characters after the file.
    """
    data: dict[str, Any] = {}
    try:
        if path is not None:
            data = _read(Path(path))
        for key, text in _pairs(overrides):
            _assign(data, key, text)
        config: Config = _build(Config, data, "")
        return config
    except ConfigError as error:
        where = f"{path}: " if path is not None and not overrides else ""
        raise ConfigError(where + truncate(" ".join(str(error).split()), 160)) from error


def config_from(data: dict[str, Any]) -> Config:
    """The configuration that nested plain data describe.

    Raises:
        ConfigError: they do not describe one.
    """
    config: Config = _build(Config, data, "")
    return config


def dump_config(config: Config) -> str:
    """The whole configuration as YAML that :func:`load_config` reads back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return yaml.dump(plain(dataclasses.asdict(config)), Dumper=_Dumper, sort_keys=False)


@dataclasses.dataclass(frozen=True)
class Option:
    """One key of the configuration."""

    key: str
    type: str
    default: Any
    limits: str
    description: str


def list_options(cls: type = Config, prefix: str = "") -> Iterator[Option]:
    """Every key of the configuration, with what is known of it."""
    hints, descriptions = _hints(cls), _descriptions(cls)
    for item in dataclasses.fields(cls):
        key, hint = prefix + item.name, hints[item.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from list_options(hint, key + ".")
        else:
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            default = list(default) if isinstance(default, tuple) else default  # as it is written in YAML
            yield Option(
                key, _type_words(hint), default, describe_limits(item.metadata), descriptions.get(item.name, "")
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"must hold keys and values, got {format_value(data)}")
    return data


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    words = iter(overrides)
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                raise ConfigError(f"unexpected argument {format_value(word)}, expected --KEY VALUE")
            following = next(words, None)
            if following is None:
                raise ConfigError(f"{truncate(key, 100)} needs a value")
            text = following
        yield key, text


def _assign(data: dict[str, Any], key: str, text: str) -> None:
    """Put a command-line value into the nested data."""
    hint: Any = Config
    above = ""
    *sections, name = key.split(".")
    for part in (*sections, name):
        known = _hints(hint) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else {}
        if part not in known:
            raise ConfigError(_unknown(key, [f"{above}.{sibling}".strip(".") for sibling in known or [""]]))
        hint, above = known[part], f"{above}.{part}".strip(".")
    node = data
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{section} must be a section with keys, got {format_value(node)}")
    try:
        value = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{key}: {truncate(str(error), 90)}, got {format_value(text)}") from error
    is_union = get_origin(hint) in (Union, types.UnionType)
    wants_text = hint is str or (is_union and str in get_args(hint) and value is not None)
    node[name] = text if wants_text else value


def _build(hint: Any, value: Any, key: str) -> Any:
    """``value`` as ``hint``, or a ConfigError that names ``key``."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build_dataclass(hint, value, key)
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if type(value) is int and abs(value) >= 2**63:
        raise ConfigError(f"{key} must be {_type_words(hint)} below 2**63 in size, got {format_value(value)}")
    if origin in (Union, types.UnionType):
        return _build_union(hint, value, key)
    if origin is Literal and any(value == known and type(value) is type(known) for known in arguments):
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is str and value == "":
        raise ConfigError(f"{key} must be a string that is not empty, got ''")
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if origin is list and isinstance(value, list):
        return [_build(arguments[0], item, f"{key}[{number}]") for number, item in enumerate(value)]
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        pairs = enumerate(zip(arguments, value, strict=True))
        return tuple(_build(inner, item, f"{key}[{number}]") for number, (inner, item) in pairs)
    if origin is dict and isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return value
    note = ", whose keys must be strings" if origin is dict and isinstance(value, dict) else ""
    choices = [str(known) for known in arguments] if origin is Literal else []
    for near in difflib.get_close_matches(str(value).lower(), choices, 1):
        note = f", did you mean {near}?"
    raise ConfigError(f"{key} must be {_type_words(hint)}, got {format_value(value)}{note}")


def _build_union(hint: Any, value: Any, key: str) -> Any:
    options = get_args(hint)
    if value is None and type(None) in options:
        return None
    inner = [option for option in options if option is not type(None)]
    if len(inner) == 1 and value is not None:
        return _build(inner[0], value, key)
    for option in inner:
        try:
            return _build(option, value, key)
        except ConfigError:
            continue
    raise ConfigError(f"{key} must be {_type_words(hint)}, got {format_value(value)}")


def _build_dataclass(cls: Any, value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{key or 'the configuration'} must be a section with keys, got {format_value(value)}")
    hints, prefix = _hints(cls), f"{key}." if key else ""
    for name in value:
        if name not in hints:
            raise ConfigError(_unknown(f"{prefix}{name}", [prefix + known for known in hints]))
    for item in dataclasses.fields(cls):
        if item.name not in value and item.default is item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{item.name} must be given")
    built = {name: _build(hints[name], inner, f"{prefix}{name}") for name, inner in value.items()}
    try:
        return cls(**built)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


def _unknown(key: str, siblings: Sequence[str]) -> str:
    """The line for an unknown key; ``siblings``: the known ones of its section."""
    known = [option.key for option in list_options()]
    *sections, last = key.split(".")
    if key in known:  # with its points in a YAML file
        nested = "".join(f"{section}: {{" for section in sections) + f"{last}: ..." + "}" * len(sections)
        return f"unknown key {key}, did you mean {nested}?"
    names = {name.rpartition(".")[2]: name for name in siblings}
    near = difflib.get_close_matches(key.lower(), [*siblings, *known], 1, cutoff=0.85)
    near = near or [names[name] for name in difflib.get_close_matches(last.lower(), names, 1)]
    near = near or [name for name in known if name.rpartition(".")[2] == last][:1]
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
    return f"unknown key {truncate(key, 80)}, {hint}"


def _type_words(hint: Any) -> str:
    """A type in words for people who do not read Python."""
    if dataclasses.is_dataclass(hint):
        return "a section with keys " + ", ".join(item.name for item in dataclasses.fields(hint))
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_words(option) for option in arguments)
    if origin is Literal:
        return ", ".join(str(option) for option in arguments)
    if origin is list and dataclasses.is_dataclass(arguments[0]):
        return _type_words(arguments[0]).replace("a section", "a list of sections", 1)
    if origin is list:
        return f"a list of {_type_words(arguments[0]).removeprefix('a ').removeprefix('an ')}s"
    if origin is tuple:
        return f"a list of {len(arguments)} numbers"
    if origin is dict:
        return "a mapping"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


@cache
def _descriptions(cls: Any) -> dict[str, str]:
    """The text under each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(field.target): " ".join(str(text.value.value).split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
