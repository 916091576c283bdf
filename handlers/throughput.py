"""Speed of training and waiting for data."""

from __future__ import annotations

import time

import ignite.distributed as idist
from ignite.engine import Events

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents


class Throughput:
    """Measure images per second, the time of an iteration, and how much of it is spent waiting for data.

    All cover one log interval of training, on the wall clock, up to the last iteration's ``UPDATE_COMPLETED``. What follows
    behind it (measuring, a monitor's reading, logging, saving) counts in the next interval of the epoch; what lies between
    epochs, like validation, does not count.

    Listens to: ``STARTED``, ``EPOCH_STARTED``, ``GET_BATCH_STARTED``, ``GET_BATCH_COMPLETED``;
    ``TrainEvents.UPDATE_COMPLETED`` and ``LOG_INTERVAL_COMPLETED``.
    Reads: ``engine.state.batch["images"]`` (B, C, H, W).
    Writes: to ``engine.state.metrics``: ``train/images_per_s``, over all ranks; ``train/iteration_ms`` and
    ``train/data_ms``, mean milliseconds of an iteration and of its wait for the batch; ``train/data_wait``, the second as a
    share of the first.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.images, self.iterations, self.waited, self.seconds = 0, 0, 0.0, 0.0
        self._last: float | None = None

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self._reset)
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.advance)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.receive)
        engine.add_event_handler(TrainEvents.UPDATE_COMPLETED, self.advance)
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.report)

    def advance(self) -> float:
        """Count the time up to now; seconds since the last call."""
        now = time.perf_counter()
        passed = 0.0 if self._last is None else now - self._last
        self.seconds, self._last = self.seconds + passed, now
        return passed

    def receive(self, engine: StepEngine) -> None:
        """The batch is there."""
        self.waited += self.advance()
        self.images += len(engine.state.batch["images"])
        self.iterations += 1

    def report(self, engine: StepEngine) -> None:
        """Write all and start anew."""
        if self.seconds > 0:
            engine.state.metrics["train/images_per_s"] = self.images * idist.get_world_size() / self.seconds
            engine.state.metrics["train/iteration_ms"] = 1000 * self.seconds / self.iterations
            engine.state.metrics["train/data_ms"] = 1000 * self.waited / self.iterations
            engine.state.metrics["train/data_wait"] = self.waited / self.seconds
        last = self._last
        self._reset()
        self._last = last
