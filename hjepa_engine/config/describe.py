"""What the sections' fields hold, in words: types, bounds, values."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def is_section(hint: Any) -> bool:
    """Whether a type is a section."""
    return isinstance(hint, type) and hasattr(hint, "__pydantic_fields__")


def fields_of(cls: Any) -> dict[str, FieldInfo]:
    """The keys of a section."""
    fields: dict[str, FieldInfo] = cls.__pydantic_fields__
    return fields


def default_of(field: FieldInfo) -> Any:
    """The default of a key."""
    make: Any = field.default_factory
    return field.default if make is None else make()


def walk(cls: Any, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key and section below a section, each section before its keys."""
    for name, field in fields_of(cls).items():
        yield prefix + name, field
        if is_section(field.annotation):
            yield from walk(field.annotation, f"{prefix}{name}.")


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    """The types of a section's keys, without bounds."""
    return get_type_hints(cls)


def bounds_of(field: FieldInfo) -> dict[str, float]:
    """The bounds of a key: its own, or those of the numbers in its list.

    Returns:
        What there is of ``ge``, ``gt``, ``le`` and ``lt``.
    """

    def markers(hint: Any) -> Iterator[Any]:
        for inner in get_args(hint):
            yield from markers(inner)
        for marker in getattr(hint, "__metadata__", ()):
            yield from getattr(marker, "metadata", ())

    found = (*field.metadata, *markers(field.annotation))
    return {name: getattr(marker, name) for name in BOUNDS for marker in found if hasattr(marker, name)}


def without_none(hint: Any) -> Any:
    """A type that may be null, without that."""
    inner = [option for option in get_args(hint) if option is not type(None)]
    return inner[0] if get_origin(hint) in (Union, types.UnionType) and len(inner) == 1 else hint


def type_words(hint: Any) -> str:
    """A type in words for people who do not read Python."""
    if is_section(hint):
        return "a section with keys " + ", ".join(fields_of(hint))
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        *first, last = (type_words(option) for option in arguments)
        return ", ".join(first) + (", " if " or " in last else " or ") + last
    if origin is Literal:
        return ", ".join(str(option) for option in arguments)
    if origin is list and is_section(arguments[0]):
        return type_words(arguments[0]).replace("a section", "a list of sections", 1)
    if origin is list:
        return f"a list of {type_words(arguments[0]).removeprefix('a ').removeprefix('an ')}s"
    if origin is tuple:
        return f"a list of {len(arguments)} numbers"
    if origin is dict:
        return "a mapping"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))


def describe_bounds(bounds: Mapping[str, float]) -> str:
    """Bounds in words.

    >>> describe_bounds({"gt": 0, "le": 1}), describe_bounds({"ge": 1})
    ('above 0 and at most 1', 'at least 1')
    """
    return " and ".join(f"{BOUNDS[name]} {bounds[name]}" for name in BOUNDS if name in bounds)


def format_value(value: Any) -> str:
    """A value in the line of an error."""
    return truncate(" ".join(repr(value).split()), 60)


def truncate(text: str, size: int) -> str:
    """The text in ``size`` characters: what is longer ends with three dots."""
    return text if len(text) <= size else text[: size - 3] + "..."
