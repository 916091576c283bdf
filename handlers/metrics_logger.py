"""One handle to every logger."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

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
        writers: what opens each writer, called when there is something to write; none on ranks other than 0.
    """

    def __init__(self, writers: Sequence[Callable[[], Writer]]) -> None:
        self._unopened, self.writers = list(writers), list[Writer]()
        self._seen = 0
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
        for writer in self.writers:
            self._guarded(type(writer).__name__, writer.close)
        self.writers.clear()
        self._unopened.clear()

    def _send(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        while self._unopened:
            opener = self._unopened.pop(0)
            self._guarded(getattr(opener, "func", opener).__name__, partial(self._open, opener))
        for writer in list(self.writers):
            if not self._guarded(type(writer).__name__, partial(writer.write, metrics, step, epoch)):
                self.writers.remove(writer)

    def _open(self, opener: Callable[[], Writer]) -> None:
        self.writers.append(opener())

    @staticmethod
    def _guarded(name: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # whatever a service's client raises
            logger.warning("%s failed and is off from now on: %s", name, " ".join(str(error).split()))
            return False
        return True
