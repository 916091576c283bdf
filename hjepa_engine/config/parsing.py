"""YAML, read strictly: numbers as in YAML 1.2, no repeated keys, no aliases, no tags that make objects."""

from __future__ import annotations

import re
from typing import Any

import yaml

from hjepa_engine.config.describe import truncate
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
                raise ConfigError(f"keys must be strings, see line {line}")
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


def dump_yaml(data: Any, flow: bool = False) -> str:
    """Plain data as YAML that :func:`parse_yaml` reads back.

    >>> dump_yaml({"lr": 0.1, "tags": ["true"]}, flow=True)
    "{lr: 0.1, tags: ['true']}"

    Args:
        data: dicts, lists, tuples, strings, numbers, true, false, null.
        flow: in one line.
    """
    if not flow:
        return yaml.dump(_plain(data), Dumper=_Dumper, sort_keys=False)
    # A list around it: YAML ends a lone value with a line of its own.
    return yaml.dump([_plain(data)], Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=2**20)[1:-2]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
