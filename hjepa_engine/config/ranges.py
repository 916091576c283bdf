"""Ranges of dataclass fields: declared where the field is, checked and described in one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any


def limited(default: Any, **limits: float) -> Any:
    """A field with limits: ``least`` and ``most`` are allowed values, ``above`` and ``below`` are not."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=limits)
    return dataclasses.field(default=default, metadata=limits)


def limit_problems(node: Any, prefix: str) -> Iterator[str]:
    """What is out of range in a dataclass and those within, one line each; ``prefix`` comes before every key."""
    for item in dataclasses.fields(node):
        key, value = prefix + item.name, getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            yield from limit_problems(value, key + ".")
        elif value is not None:
            for number in value if isinstance(value, (list, tuple)) else (value,):
                if (item.metadata or isinstance(number, float)) and not _within(number, **item.metadata):
                    rules = [describe_limits(item.metadata), "" if math.isfinite(number) else "finite"]
                    among = "" if number is value else f" in {format_value(list(value))}"
                    yield f"{key} must be {' and '.join(filter(None, rules))}, got {format_value(number)}{among}"
                    break


def _within(
    number: float,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> bool:
    return (
        math.isfinite(number)
        and (least is None or number >= least)
        and (most is None or number <= most)
        and (above is None or number > above)
        and (below is None or number < below)
    )


def describe_limits(limits: Mapping[str, float]) -> str:
    """Limits in words.

    >>> describe_limits({"above": 0, "most": 1}), describe_limits({"least": 1})
    ('above 0 and at most 1', 'at least 1')
    """
    words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    return " and ".join(f"{words[name]} {limits[name]}" for name in words if name in limits)


def format_value(value: Any) -> str:
    """A value in the line of an error."""
    return truncate(" ".join(repr(value).split()), 60)


def truncate(text: str, size: int) -> str:
    """The text in ``size`` characters: what is longer ends with three dots."""
    return text if len(text) <= size else text[: size - 3] + "..."
