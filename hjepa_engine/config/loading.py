"""Configurations from YAML files and the command line, and back to YAML."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hjepa_engine.config.describe import format_value, hints_of, is_section, truncate, walk
from hjepa_engine.config.fields import is_path
from hjepa_engine.config.messages import error_line
from hjepa_engine.config.overrides import apply_overrides, overridden_keys
from hjepa_engine.config.parsing import dump_yaml, parse_yaml
from hjepa_engine.config.paths import is_timm_name, path_argument
from hjepa_engine.config.schema import Config
from hjepa_engine.errors import ConfigError

_PATHS = tuple(key for key, field in walk(Config) if is_path(field))
_NO_PATHS = {("checkpoint.resume", word) for word in ("auto", "must", "never")}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: YAML file; None: the defaults alone.
        overrides: as on the command line: ``["--training.lr", "3e-4"]`` or ``["training.lr=3e-4"]``.

    Raises:
        ConfigError: one line that names the file (unless it is about a key of ``overrides``), the key, the rule and the
            value, at most 175 characters after the file.
    """
    data: dict[str, Any] = {}
    file = where = "" if path is None else f"{path}: "
    changed: list[str] = []
    try:
        if path is not None:
            data = _read(path_argument(str(path)))
        where = ""
        apply_overrides(data, overrides)
        where, changed = file, overridden_keys(overrides)
        return config_from(data)
    except ConfigError as error:
        if any(_names(key, str(error)) for key in changed):
            where = ""
        raise ConfigError(where + truncate(" ".join(str(error).split()), 175)) from error


def _names(key: str, line: str) -> bool:
    """Whether a line is about a key or one below it."""
    return re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", line) is not None


def config_from(data: dict[str, Any]) -> Config:
    """The configuration that nested plain data describe.

    Raises:
        ConfigError: they do not describe one.
    """
    try:
        return _validator().validate_python(data)
    except ValidationError as error:
        raise ConfigError(error_line(Config, "", Config, error, data)) from None


def dump_config(config: Config, *, absolute: bool = False) -> str:
    """The whole configuration as YAML that :func:`load_config` reads back.

    Args:
        config: any.
        absolute: whether its paths hold wherever the YAML is read.
    """
    data = dataclasses.asdict(config)
    for key in _PATHS if absolute else ():
        *sections, name = key.split(".")
        node = data
        for section in sections:
            node = node[section]
        if node[name] is not None and (key, node[name]) not in _NO_PATHS and not is_timm_name(node[name]):
            node[name] = os.path.abspath(node[name])
    return dump_yaml(data)


@cache
def _validator() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The plain data of a file and of those that it builds on; ``above``: the files that build on this one."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"must hold keys and values, got {format_value(data)}")
    if "base" not in data:
        return data
    base, above = data.pop("base"), (*above, path.resolve())
    if not isinstance(base, str) or not base:
        raise ConfigError(f"base must be the path of a YAML file, got {format_value(base)}")
    if (path.parent / base).resolve() in above:
        raise ConfigError(f"base must not lead back to the file it stands in, got {format_value(base)}")
    try:
        return _merge(_read(path.parent / base, above), data, Config)
    except ConfigError as error:
        raise ConfigError(f"base {base}: {error}") from error


def _merge(base: dict[str, Any], data: dict[str, Any], section: Any) -> dict[str, Any]:
    """Sections are merged key by key; lists, mappings and all else of ``data`` replace what ``base`` has."""
    merged = {**base, **data}
    for name, hint in hints_of(section).items():
        old, new = base.get(name), data.get(name)
        if is_section(hint) and isinstance(old, dict) and isinstance(new, dict):
            merged[name] = _merge(old, new, hint)
    return merged
