"""What the docstrings of handlers say, for pages and figures."""

from __future__ import annotations

import inspect
import re

import hjepa_engine.handlers
from hjepa_engine.state import TrainState

#: Every handler, by name.
HANDLERS: dict[str, type] = {
    name: value
    for name, value in vars(hjepa_engine.handlers).items()
    if isinstance(value, type) and value.__module__.startswith("hjepa_engine.handlers")
}


def purpose(handler: type) -> str:
    """The first sentence, without markup of references."""
    first = " ".join((inspect.getdoc(handler) or "").split("\n\n")[0].split())
    first = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", first).replace("``", "`")
    return re.split(r"(?<=\.) (?=[A-Z])", first)[0]


def section(handler: type, title: str) -> str:
    """What follows ``title:``, up to the next title; empty where there is none."""
    text = inspect.getdoc(handler) or ""
    found = re.search(rf"^{title}: (.*?)(?=^[A-Z][\w ]*:|^$|\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def events(handler: type) -> list[str]:
    """The events that it listens to."""
    return list(dict.fromkeys(re.findall(r"``(?:TrainEvents\.)?([A-Z_]+)``", section(handler, "Listens to"))))


def shared(handler: type, title: str) -> list[str]:
    """Attributes of ``engine.state`` in its ``Reads`` or ``Writes``."""
    named = re.findall(r"``(?:engine\.)?(?:state\.)?(\w+)(?=``|\[)", section(handler, title))
    return [name for name in dict.fromkeys(named) if name in TrainState.__annotations__]


def keys(handler: type) -> list[str]:
    """Keys of the configuration that decide whether and how a run has it."""
    return re.findall(r"``([a-z_.]+\*?)``", section(handler, "Keys"))
