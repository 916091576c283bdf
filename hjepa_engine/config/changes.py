"""How two configurations differ, and which keys may change when a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hjepa_engine.config.describe import fields_of, is_section
from hjepa_engine.config.fields import OnResume, on_resume
from hjepa_engine.config.loading import config_from, dump_config
from hjepa_engine.config.parsing import parse_yaml
from hjepa_engine.config.schema import Config


def _keys(*what: OnResume, cls: Any = Config, prefix: str = "") -> tuple[str, ...]:
    """Keys, and sections with a dot at the end, whose field says one of ``what`` of a difference."""
    found: list[str] = []
    for name, field in fields_of(cls).items():
        dot = "." if is_section(field.annotation) else ""
        if on_resume(field) in what:
            found.append(f"{prefix}{name}{dot}")
        elif dot:
            found += _keys(*what, cls=field.annotation, prefix=f"{prefix}{name}.")
    return tuple(found)


#: What may differ when a run goes on: it does not change what a step computes.
MAY_CHANGE = _keys("allow", "extend")
#: What may differ when another run's checkpoint is the starting point: schedules and objective are computed anew.
MAY_CHANGE_ELSEWHERE = (*MAY_CHANGE, *_keys("elsewhere"))
#: A finished run goes on if one of these has changed.
LENGTH_KEYS = _keys("extend")


class Change(NamedTuple):
    """A key of the configuration that is not what it was."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.old}, is {self.new} now"


def plain_config(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts and lists."""
    return dict(parse_yaml(dump_config(config)))


def config_changes(saved: Mapping[str, Any], config: Config) -> list[Change]:
    """Keys that differ between a saved plain configuration and the present one; keys that it lacks had their default."""
    old, new = (flat(plain_config(each)) for each in (config_from(dict(saved)), config))
    keys = [*new, *(key for key in old if key not in new)]
    return [Change(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their whole keys, ``training.lr``."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return found
