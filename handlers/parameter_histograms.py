"""Histograms of parameters and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, get_args

from torch import Tensor
from torch.nn import Parameter

from hjepa_engine.engine import Trainer
from hjepa_engine.events import TrainEvents
from hjepa_engine.loggers.media import Histogram
from hjepa_engine.types import unwrap
from hjepa_engine.utils.distributed import rank
from hjepa_engine.utils.sharding import is_sharded, whole

Watch = Literal["gradients", "parameters", "all"]


class ParameterHistograms:
    """Histograms of every trainable parameter, of its gradient, or of both, on rank 0.

    Gradients are those of the whole accumulation window, averaged over ranks, unscaled and before clipping; parameters are
    those after the step. Reading a set of histograms synchronizes with the device once. Parameters in shards are gathered
    one by one, which is collective.

    Listens to: ``TrainEvents.GRADIENTS_READY``, ``LOG_INTERVAL_COMPLETED``.
    Reads: ``engine.state.optimizer_step``; ``engine.modules``, of which a parameter shared by two counts once.
    Writes: ``engine.state.media["gradients/<module>.<parameter>"]`` and ``["parameters/<module>.<parameter>"]``.
    Keys: ``logging.watch``, ``logging.watch_frequency``.

    Args:
        watch: ``gradients``, ``parameters`` or ``all``.
        every: optimizer steps between sets; a multiple of the engine's ``log_frequency``.
    """

    def __init__(self, watch: Watch = "all", every: int = 500) -> None:
        if watch not in get_args(Watch):
            raise ValueError(f"watch must be {', '.join(get_args(Watch))}, got {watch!r}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.watch, self.every = watch, every
        self._due = 0
        self._gradients: dict[str, Tensor] = {}

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer.

        Raises:
            ValueError: ``every`` is not a multiple of the trainer's ``log_frequency``.
        """
        if self.every % engine.log_frequency:
            raise ValueError(f"every must be a multiple of log_frequency ({engine.log_frequency}), got {self.every}")
        if rank() == 0 or is_sharded(engine.modules):
            engine.add_event_handler(TrainEvents.GRADIENTS_READY, self.measure_gradients)
            engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.write)

    def measure_gradients(self, engine: Trainer) -> None:
        """Compute gradient histograms now, if the next step is due: gradients are gone when the window is complete."""
        step = engine.state.optimizer_step + 1
        self._due = step if step % self.every == 0 else 0
        if self._due and self.watch != "parameters":
            gradients = ((name, parameter.grad) for name, parameter in trainable(engine))
            self._gradients = _measure("gradients", ((name, grad) for name, grad in gradients if grad is not None))

    def write(self, engine: Trainer) -> None:
        """Write the histograms, unless their optimizer step was skipped."""
        if engine.state.optimizer_step != self._due or not self._due:
            return
        measured = self._gradients
        if self.watch != "gradients":
            measured |= _measure("parameters", trainable(engine))
        engine.state.media.update(zip(measured, Histogram.read(measured.values()), strict=True))
        self._due, self._gradients = 0, {}


def _measure(group: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """What histograms are made of, on rank 0; nothing on the others. Collective where tensors are in shards."""
    measured = {}
    for name, tensor in tensors:
        gathered = whole(tensor)
        if rank() == 0:
            measured[f"{group}/{name}"] = Histogram.measure(gathered)
    return measured


def trainable(engine: Trainer) -> Iterator[tuple[str, Parameter]]:
    """Trainable parameters of all modules by name, without DDP's prefix."""
    seen = set()
    for module_name, module in engine.modules.items():
        for name, parameter in unwrap(module).named_parameters():
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield f"{module_name}.{name}", parameter
