"""Exponential moving average (EMA) of the target encoder."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Events
from torch import Tensor, nn

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents
from hjepa_engine.types import unwrap
from hjepa_engine.utils.sharding import local


class TargetEncoderEMA:
    """Update the target encoder as a moving average of the context encoder after every optimizer step.

    target = momentum * target + (1 - momentum) * context, for parameters and floating-point buffers; other buffers are
    copied. A ``ParamScheduler`` may set ``param_groups[0]["momentum"]``. All ranks have equal weights, or shards of both
    encoders that are cut alike, so the update needs no communication. A run's tensors are looked up once, when it starts.

    Listens to: ``STARTED``, ``TrainEvents.OPTIMIZER_STEPPED`` and ``LOG_INTERVAL_COMPLETED``.
    Writes: ``engine.state.metrics["train/ema_momentum"]`` at the end of a log interval.
    Keys: ``model.ema.*``.

    Args:
        context_encoder: the encoder that is trained.
        target_encoder: its copy, without gradients.
        momentum: fraction of the target kept by an update, in [0, 1]; with 1.0 the target never changes.
    """

    def __init__(self, context_encoder: nn.Module, target_encoder: nn.Module, momentum: float = 0.996) -> None:
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, got {momentum}")
        self.context_encoder, self.target_encoder = unwrap(context_encoder), unwrap(target_encoder)
        self.param_groups: list[dict[str, Any]] = [{"momentum": momentum}]
        self._averaged: tuple[list[Tensor], list[Tensor]] | None = None  # of the target and the context encoder
        self._copied: list[tuple[Tensor, Tensor]] = []

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.find_tensors)
        engine.add_event_handler(TrainEvents.OPTIMIZER_STEPPED, self.update)
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.report)

    def find_tensors(self) -> None:
        """Look up what is averaged and what is copied."""
        target, context = self._tensors(self.target_encoder), self._tensors(self.context_encoder)
        averaged = [name for name, tensor in target.items() if tensor.is_floating_point()]
        self._averaged = [target[name] for name in averaged], [context[name] for name in averaged]
        self._copied = [(target[name], context[name]) for name in target if name not in set(averaged)]

    def update(self) -> None:
        """One update with the present momentum."""
        if self._averaged is None:
            self.find_tensors()
        assert self._averaged is not None
        with torch.no_grad():
            torch._foreach_lerp_(*self._averaged, 1 - self.param_groups[0]["momentum"])
            for target, context in self._copied:
                target.copy_(context)

    def report(self, engine: StepEngine) -> None:
        """Write the momentum to the metrics."""
        engine.state.metrics["train/ema_momentum"] = self.param_groups[0]["momentum"]

    @staticmethod
    def _tensors(module: nn.Module) -> dict[str, Tensor]:
        return {name: local(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
