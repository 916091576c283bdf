"""Tensors inside dicts, lists and tuples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hjepa_engine.errors import ConfigError
from hjepa_engine.types import Outputs


def move_to(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in its dicts, lists and tuples on ``device``."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: move_to(item, device) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move_to(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(move_to(item, device) for item in value)
    return value


def detach(outputs: Outputs) -> Outputs:
    """``outputs`` with every tensor, in lists too, cut from its graph."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach() if value.requires_grad else value
        return [cut(item) for item in value] if isinstance(value, list) else value

    return {name: cut(value) for name, value in outputs.items()}


def loss_of(outputs: Any) -> Tensor:
    """The loss that a step has returned.

    Raises:
        ConfigError: it is no scalar tensor with a graph, or there is none.
    """
    loss = outputs.get("loss") if isinstance(outputs, dict) else None
    if isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad:
        return loss
    if isinstance(loss, Tensor):
        got = f"a loss of shape {tuple(loss.shape)}" if loss.ndim else "a loss that depends on no trained parameter"
    elif isinstance(outputs, dict):
        got = (
            f"a dict with {', '.join(map(str, outputs)) or 'nothing'}"
            if loss is None
            else f"a loss of type {type(loss).__name__}"
        )
    else:
        got = type(outputs).__name__
    raise ConfigError(f"the step must return a dict whose loss is a scalar tensor with a gradient, got {got}")
