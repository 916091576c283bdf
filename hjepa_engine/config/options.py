"""The keys of the configuration with all that is known of them, for help and documentation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from hjepa_engine.config.describe import (
    bounds_of,
    default_of,
    describe_bounds,
    fields_of,
    hints_of,
    is_section,
    type_words,
)
from hjepa_engine.config.fields import OnResume, on_resume
from hjepa_engine.config.schema import Config

#: What the key does that only files have.
BASE = "Another YAML file, relative to this one, whose values hold where this file gives none."


@dataclass(frozen=True)
class Option:
    """One key of the configuration."""

    key: str
    type: str
    default: Any
    bounds: str
    description: str
    on_resume: OnResume


def list_options(cls: Any = Config, prefix: str = "", resume: OnResume = "refuse") -> Iterator[Option]:
    """Every key of a section and of those in it.

    Args:
        cls: the section.
        prefix: comes before every key.
        resume: what holds for all of them, if it is not ``refuse``.
    """
    for name, field in fields_of(cls).items():
        inherited = on_resume(field) if resume == "refuse" else resume
        if is_section(field.annotation):
            yield from list_options(field.annotation, f"{prefix}{name}.", inherited)
            continue
        yield Option(
            key=prefix + name,
            type=type_words(hints_of(cls)[name]),
            default=_as_written(default_of(field)),
            bounds=describe_bounds(bounds_of(field)),
            description=" ".join((field.description or "").split()),
            on_resume=inherited,
        )


def _as_written(value: Any) -> Any:
    """A value as one writes it in YAML: of a section, what differs from its defaults."""
    if isinstance(value, (list, tuple)):
        return [_as_written(item) for item in value]
    if not is_section(type(value)):
        return value
    fields = fields_of(type(value)).items()
    given = ((name, getattr(value, name), default_of(field)) for name, field in fields)
    return {name: _as_written(mine) for name, mine, default in given if mine != default}


def json_schema() -> dict[str, Any]:
    """What a YAML file may hold, as a JSON schema that editors complete and check files with."""
    schema = json.loads(json.dumps(TypeAdapter(Config).json_schema()).replace("``", "`"))  # as Markdown has it
    schema["properties"] = {"base": {"type": "string", "description": BASE}, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
