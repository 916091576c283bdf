"""Import objects by dotted path, and block imports."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


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
