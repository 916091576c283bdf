"""Import objects by dotted path, and block imports."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from hjepa_engine.errors import ConfigError


@contextmanager
def block_import(name: str) -> Iterator[None]:
    """Make ``import name`` fail inside the context, as if it were not installed; an already imported module stays.

    >>> with block_import("this"):
    ...     import this
    Traceback (most recent call last):
    ModuleNotFoundError: import of this halted; None in sys.modules
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(name)


def import_object(path: str) -> Any:
    """Import the object at a dotted ``path``.

    >>> import_object("torch.optim.AdamW").__name__
    'AdamW'

    Raises:
        ValueError: the path has no dot, or its module or name does not exist.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{path!r} must be a dotted path such as package.module.Name")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{path!r} cannot be imported: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{path!r} cannot be imported: {module_name} has no {name}")
    return getattr(module, name)


def qualified_name(found: Any) -> str:
    """The dotted path of a function or class, also inside a ``partial``; of another object, that of its class.

    >>> qualified_name(import_object), qualified_name(partial(len, [])), qualified_name(0)
    ('hjepa_engine.utils.imports.import_object', 'builtins.len', 'builtins.int')
    """
    while isinstance(found, partial):
        found = found.func
    named = found if hasattr(found, "__qualname__") else type(found)
    return f"{named.__module__}.{named.__qualname__}"


def import_callable(key: str, class_path: str) -> Callable[..., Any]:
    """The function or class at a dotted path.

    Args:
        key: section of the configuration whose ``class_path`` it is, for messages.
        class_path: the dotted path.

    Raises:
        ConfigError: it cannot be imported, or is neither.
    """
    try:
        found = import_object(class_path)
    except ValueError as error:
        raise ConfigError(f"{key}.class_path: {error}") from error
    if not callable(found):
        raise ConfigError(f"{key}.class_path: {class_path} must be a function or a class, got {type(found).__name__}")
    return found
