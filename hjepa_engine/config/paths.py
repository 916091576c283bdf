"""Paths as people write them: ``~`` and variables stand for what the shell would put there."""

from __future__ import annotations

import os
import re
from argparse import ArgumentTypeError
from pathlib import Path

from hjepa_engine.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def expand(path: str) -> str:
    """The path with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` replaced; what is unknown stays as it is."""
    return os.path.expanduser(os.path.expandvars(path))


def unknown_variable(path: str) -> str | None:
    """The first variable, or user's home, in the path that there is none of; None: all are known."""
    for match in _VARIABLE.finditer(path):
        if (match[1] or match[2]) not in os.environ:
            return match[0]
    home = path.partition("/")[0]
    return home if home.startswith("~") and os.path.expanduser(home) == home else None


def is_timm_name(text: str) -> bool:
    """Whether ``text`` names weights that timm knows, ``timm/NAME``, and not a path."""
    return text.startswith("timm/") and not os.path.exists(text)


class _NoSuchName(ConfigError, ArgumentTypeError):
    """Of an option, argparse prints the message of such an error alone."""


def path_argument(text: str) -> Path:
    """A path on the command line.

    Raises:
        ConfigError: it has a variable, or a user's home, that there is none of.
    """
    if name := unknown_variable(text):
        raise _NoSuchName(f"{text}: there is no {name}")
    return Path(expand(text))
