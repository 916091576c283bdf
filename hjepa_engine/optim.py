"""Optimizers by name, and parameter groups."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hjepa_engine.types import unwrap
from hjepa_engine.utils.imports import import_object

#: Optimizers by name; ``training.optimizer`` also takes the dotted path of any ``torch.optim.Optimizer``.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}

#: Arguments of torch's optimizers that choose among implementations of the same step.
_IMPLEMENTATIONS = {"fused", "foreach", "capturable", "differentiable"}


def param_groups(modules: nn.ModuleDict, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Group trainable parameters by level and by whether weight decay applies.

    Biases, 1-D parameters and those that a module lists in ``no_weight_decay()`` are never decayed.

    Returns:
        Groups with ``params``, ``name``, ``level`` (None: shared by all levels; else the level whose head and blocks these
        are), ``decay`` (bool) and ``weight_decay`` (0 unless ``decay``). Empty groups are left out.
    """
    found: dict[tuple[int | None, bool], list[nn.Parameter]] = {}
    for module in modules.values():
        module = unwrap(module)
        exempt = module.no_weight_decay() if hasattr(module, "no_weight_decay") else set()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                decay = parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt
                found.setdefault((_level_of(name), decay), []).append(parameter)
    order = sorted(found, key=lambda group: (-1 if group[0] is None else group[0], not group[1]))
    return [
        {
            "params": found[level, decay],
            "name": f"{'shared' if level is None else f'level_{level}'}/{'decay' if decay else 'no_decay'}",
            "level": level,
            "decay": decay,
            "weight_decay": weight_decay if decay else 0.0,
        }
        for level, decay in order
    ]


def _level_of(name: str) -> int | None:
    """Level of a predictor parameter (``heads.2.weight``: level 2); None if it is shared."""
    part, *rest = name.split(".")
    return int(rest[0]) if part in ("heads", "level_blocks", "level_embed") else None


def build_optimizer(
    name: str, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999), **arguments: Any
) -> torch.optim.Optimizer:
    """Build an optimizer from its name or dotted path.

    Torch's fused implementation is used where there is one, for a CPU or a CUDA GPU: on a CPU, AdamW then takes a third of
    its time. One of ``fused``, ``foreach``, ``capturable`` and ``differentiable`` among the arguments goes before.

    Args:
        name: one of :data:`OPTIMIZERS` or a path like ``torch.optim.RAdam``.
        groups: from :func:`param_groups`.
        lr: initial learning rate; a schedule overwrites it.
        betas: passed to optimizers that take them; SGD gets the first one as ``momentum``.
        **arguments: passed to the optimizer.

    Raises:
        ValueError: the name is unknown or not an optimizer, or it does not take one of the arguments.
    """
    if "." in name:
        cls = import_object(name)
    elif name in OPTIMIZERS:
        cls = OPTIMIZERS[name]
    else:
        near = difflib.get_close_matches(name, OPTIMIZERS, 1)
        hint = f", did you mean {near[0]}" if near else ""
        raise ValueError(f"unknown optimizer {name!r}{hint}; known: {', '.join(OPTIMIZERS)} or a dotted path")
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueError(f"optimizer {name!r} must be a torch.optim.Optimizer")
    known = [name for name in inspect.signature(cls).parameters if name not in ("params", "lr", "weight_decay")]
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(f"optimizer {name!r} does not take {', '.join(unknown)}; it takes {', '.join(known)}")
    if "betas" in known:
        arguments = {"betas": tuple(betas), **arguments}
    elif cls is torch.optim.SGD:
        arguments = {"momentum": betas[0], **arguments}
    if "fused" in known and not _IMPLEMENTATIONS & arguments.keys() and _can_fuse(cls, groups):
        arguments["fused"] = True
    return cls(groups, lr=lr, **arguments)


def _can_fuse(cls: type[torch.optim.Optimizer], groups: list[dict[str, Any]]) -> bool:
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(isinstance(each, DTensor) for each in parameters) and not issubclass(
        cls, (torch.optim.Adam, torch.optim.AdamW)
    ):
        return False  # torch's fused SGD and Adagrad take no shards
    return all(each.is_floating_point() and each.device.type in ("cpu", "cuda") for each in parameters)
