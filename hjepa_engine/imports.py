"""Objects by their dotted path."""

from __future__ import annotations

import importlib
from typing import Any


def import_object(path: str) -> Any:
    """The object that ``path`` names.

    >>> import_object("torch.optim.AdamW").__name__
    'AdamW'

    Raises:
        ValueError: the path has no dot, or its module or name does not exist.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{path!r} must be a dotted path like package.module.Name")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{path!r} cannot be imported: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{path!r} cannot be imported: {module_name} has no {name}")
    return getattr(module, name)
