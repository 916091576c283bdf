"""What travels between the engine, steps and handlers."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

#: ``images`` (B, C, H, W), normalized, ``labels`` (B,) where there are any, and what handlers add (masks).
Batch = dict[str, Any]
#: ``loss`` () is what is minimized; tensors that a handler may measure lie beside it.
Outputs = dict[str, Any]

#: Features (samples, F) and labels (samples,).
Labeled = tuple[Tensor, Tensor]


class Step(Protocol):
    """Modules and a batch in, a dict of tensors out: no backward, no I/O, no rank checks, nothing changed."""

    def __call__(self, modules: nn.ModuleDict, batch: Batch) -> Outputs:
        """Compute losses."""


class LossFunction(Protocol):
    """Any callable from ``prediction`` and ``target``, both (..., D) float32, to their mean loss ()."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compare."""


def unwrap(module: nn.Module) -> Any:
    """The module inside a ``DistributedDataParallel`` or ``DataParallel`` wrapper, or the module itself."""
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return module.module
    return module
