"""What travels between the engine, steps and handlers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

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


class Handler(Protocol):
    """One concern of a run, see docs/handlers.md: it adds its methods to an engine's events."""

    def attach(self, engine: Any) -> None:
        """Attach to a :class:`~hjepa_engine.engine.Trainer` or any other ``StepEngine``, on every rank."""


@runtime_checkable
class Stateful(Protocol):
    """Whatever handles an event and has both methods is saved in every checkpoint and restored on resume.

    Two class attributes, False where they are not there, say how: with ``per_rank = True`` every process saves a state of
    its own, else rank 0 saves for all; with ``must_resume = True`` a checkpoint without this state is refused, else the
    handler starts afresh. States of ``per_rank`` handlers are lost to another number of processes, unless there is a method
    ``merge_states(states, rank)``, from the states of all former processes to that of process ``rank`` now. Where there is a
    method ``start_new_run()``, it is called when the state that was just loaded is
    another run's, from whose checkpoint this one starts.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors, numbers, strings, None, and dicts, lists and tuples of them."""

    def load_state_dict(self, state_dict: Any) -> None:
        """Restore what :meth:`state_dict` returned."""


def unwrap(module: nn.Module) -> Any:
    """The module inside a ``DistributedDataParallel`` or ``DataParallel`` wrapper, or the module itself."""
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return module.module
    return module
