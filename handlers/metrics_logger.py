"""One handle to every logger."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ignite.engine import Events

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents
from hjepa_engine.writers import Writer

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Write new values of ``engine.state.metrics`` to every writer.

    A value is written once, with the optimiser step at which it was new. A writer that fails is named in one warning
    and dropped: its failure is not the run's.

    Listens to: ``TrainEvents.METRICS_READY``, ``VALIDATION_COMPLETED`` and ``EPOCH_COMMITTED``, ``COMPLETED``.
    Reads: ``engine.state.metrics``.

    Args:
        writers: opened when there is something to write; none on ranks other than 0.
    """

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = list(writers)
        self._opened: list[Writer] = []
        self._off: list[Writer] = []
        self._seen = 0
        self._states: dict[str, Any] | None = None
        self._engine: StepEngine | None = None

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        self._engine = engine
        for event in (
            TrainEvents.METRICS_READY,
            TrainEvents.VALIDATION_COMPLETED,
            TrainEvents.EPOCH_COMMITTED,
            Events.COMPLETED,
        ):
            engine.add_event_handler(event, self.write)

    def write(self, engine: StepEngine) -> None:
        """Write what is new."""
        fresh, self._seen = engine.state.metrics.since(self._seen)
        if fresh:
            self._send(fresh, engine.state.optimizer_step, engine.state.epoch)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None, prefix: str = "") -> None:
        """Write values of your own.

        Args:
            metrics: floats by name.
            step: optimiser step they belong to; the engine's present one by default.
            prefix: put before the names.
        """
        state = self._engine.state if self._engine is not None else None
        now = getattr(state, "optimizer_step", 0) if step is None else step
        self._send(
            {f"{prefix}{name}": float(value) for name, value in metrics.items()}, now, getattr(state, "epoch", 0)
        )

    def close(self) -> None:
        """Flush and close every writer."""
        while self._opened:
            writer = self._opened.pop(0)
            self._guarded(writer, writer.close)
        self._off = list(self.writers)

    def state_dict(self) -> dict[str, Any]:
        """What was logged already, and how each writer goes on."""
        states = dict(self._states or {})
        states |= {type(writer).__name__: writer.state_dict() for writer in (*self._opened, *self._off)}
        return {"seen": self._seen, "writers": states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; nothing is touched before there is something to write."""
        self._seen, self._states = state_dict["seen"], dict(state_dict["writers"])

    def _send(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        for writer in self.writers:
            if writer not in self._off and writer not in self._opened:
                state = (self._states or {}).get(type(writer).__name__)
                self._opened.append(writer)
                self._guarded(writer, partial(writer.open, state))
        for writer in list(self._opened):
            self._guarded(writer, partial(writer.write, metrics, step, epoch))

    def _guarded(self, writer: Writer, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service's client raises
            name, reason = type(writer).__name__, " ".join(str(error).split())
            logger.warning("%s failed and is off from now on: %s", name, reason)
            self._opened = [other for other in self._opened if other is not writer]
            self._off.append(writer)
