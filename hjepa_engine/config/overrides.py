"""Values of the configuration on the command line."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Any, Union, get_args, get_origin

from hjepa_engine.config.describe import format_value, hints_of, is_section, truncate
from hjepa_engine.config.messages import unknown_key
from hjepa_engine.config.parsing import parse_yaml
from hjepa_engine.config.schema import Config
from hjepa_engine.errors import ConfigError


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put ``["--training.lr", "3e-4"]`` or ``["training.lr=3e-4"]`` into the plain data of a configuration.

    Raises:
        ConfigError: one line that names the key.
    """
    for key, text in _pairs(overrides):
        _assign(data, key, text)


def overridden_keys(overrides: Sequence[str]) -> list[str]:
    """The keys that command-line overrides name, in their order."""
    return [key for key, _ in _pairs(overrides)]


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
    hint: Any = Config
    above = ""
    *sections, name = key.split(".")
    for part in (*sections, name):
        known = hints_of(hint) if is_section(hint) else {}
        if part not in known:
            raise ConfigError(unknown_key(key, [f"{above}.{sibling}".strip(".") for sibling in known or [""]], Config))
        hint, above = known[part], f"{above}.{part}".strip(".")
    node = data
    for depth, section in enumerate(sections, start=1):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{'.'.join(sections[:depth])} must be a section with keys, got {format_value(node)}")
    try:
        value = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{key}: {truncate(str(error), 90)}, got {format_value(text)}") from error
    is_union = get_origin(hint) in (Union, types.UnionType)
    wants_string = hint is str or (is_union and str in get_args(hint) and value is not None)
    node[name] = text if wants_string else value
