"""What is wrong with a configuration, in one line: key, rule, value, and what was meant."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from hjepa_engine.config.describe import (
    bounds_of,
    describe_bounds,
    fields_of,
    format_value,
    hints_of,
    is_section,
    truncate,
    type_words,
    walk,
    without_none,
)

_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
_OUT_OF_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


class _Located(NamedTuple):
    """Where in a configuration an error is."""

    key: str
    hint: Any
    field: FieldInfo | None
    """The key's own, also for an item of its list."""
    value: Any
    whole: Any
    """The list that the value is an item of, or the value itself."""
    rest: Sequence[int | str]
    """What pydantic says beyond the key: a name that its section does not have, or which type of several."""


def error_line(root: Any, prefix: str, cls: Any, error: ValidationError, data: Mapping[str, Any]) -> str:
    """The first of pydantic's errors in one line; unknown names come first, then missing ones.

    Args:
        root: the section that all others are in, for keys that may have been meant.
        prefix: comes before every key.
        cls: the section that ``data`` was given for.
        error: pydantic's description of it.
        data: its values.
    """
    details = error.errors(include_url=False)
    first = min(details, key=lambda each: (each["type"] not in _UNKNOWN, each["type"] != "missing"))
    loc, kind = first["loc"], first["type"]
    if kind == "too_large" and isinstance(first["input"], list):
        loc = (*loc, next(at for at, number in enumerate(first["input"]) if too_large(number)))
    if kind == "missing" and isinstance(loc[-1], int):  # a pair of one number
        loc, kind = loc[:-1], "tuple_type"
    found = _locate(cls, loc, data, prefix)
    key = found.key
    if kind in _UNKNOWN and is_section(found.hint):
        start = f"{key}." if key else ""
        return unknown_key(f"{start}{found.rest[0]}", [start + name for name in fields_of(found.hint)], root)
    if kind == "missing":
        return f"{key} must be given"
    if kind == "value_error":
        return f"{key}.{first['ctx']['error']}".removeprefix(".")
    if kind == "unknown_variable":
        return f"{key}: there is no {first['ctx']['name']}, got {format_value(found.value)}"
    if kind in _OUT_OF_BOUNDS and found.value is not found.whole:
        key = key.rpartition("[")[0]  # the line shows the whole list
    return f"{key} must be {_rule(found, kind)}"


def too_large(value: Any) -> bool:
    """Whether a value is an integer that 64 bits do not hold."""
    return type(value) is int and abs(value) >= 2**63


def _rule(found: _Located, kind: str) -> str:
    value, hint = found.value, found.hint
    got = f"got {format_value(value)}"
    if kind == "too_large":
        return f"{type_words(hint)} below 2**63 in size, {got}"
    if kind in _OUT_OF_BOUNDS and found.field is not None:
        rules = [describe_bounds(bounds_of(found.field)), "" if math.isfinite(value) else "finite"]
        among = "" if found.whole is value else f" in {format_value(list(found.whole))}"
        return f"{' and '.join(filter(None, rules))}, {got}{among}"
    if kind == "string_too_short":
        return f"a string that is not empty, {got}"
    if is_section(hint):
        return f"a section with keys, {got}"
    note = ""
    if get_origin(hint) is dict and isinstance(value, dict):
        note = ", whose keys must be strings"
    choices = [str(known) for known in get_args(hint)] if get_origin(hint) is Literal else []
    for near in difflib.get_close_matches(str(value).lower(), choices, 1):
        note = f", did you mean {near}?"
    return f"{type_words(hint)}, {got}{note}"


def _locate(cls: Any, loc: Sequence[int | str], data: Any, prefix: str) -> _Located:
    key, hint, field, value, whole = prefix.rstrip("."), cls, None, data, data
    for number, part in enumerate(loc):
        inner = without_none(hint)
        if is_section(inner) and part in hints_of(inner):
            name = str(part)
            key, hint, field = f"{key}.{name}".strip("."), hints_of(inner)[name], fields_of(inner)[name]
            value = whole = value.get(name) if isinstance(value, dict) else getattr(value, name)
        elif get_origin(inner) in (list, tuple) and isinstance(part, int):
            items = get_args(inner)
            key, hint = f"{key}[{part}]", items[0]
            value = value[part]
        elif get_origin(inner) is dict and part in value and "[key]" not in loc:
            key, hint = f"{key}.{part}", get_args(inner)[1]
            value = whole = value[part]
        else:
            return _Located(key, inner, field, value, whole, loc[number:])
    return _Located(key, hint, field, value, whole, ())


def unknown_key(key: str, siblings: Sequence[str], root: Any) -> str:
    """The line for an unknown key.

    Args:
        key: as it was given.
        siblings: the known ones of its section.
        root: the section that all others are in.
    """
    known = [name for name, field in walk(root) if not is_section(field.annotation)]
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
