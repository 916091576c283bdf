"""Speed of training and waiting for data."""

from __future__ import annotations

import time

import ignite.distributed as idist
from ignite.engine import Events

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents


class Throughput:
    """Measure images per second, the time of an iteration, and how much of it is spent waiting for data.

    All cover one log interval of training, on the wall clock. An iteration lasts from asking for its batch to asking for the
    next one, with all that handlers do in between: masks, the momentum encoder, a monitor's reading at the window's end.
    Logging and saving behind a window count in the next one; what lies between epochs, like validation, does not count.

    Listens to: ``STARTED``, ``EPOCH_STARTED``, ``GET_BATCH_STARTED``, ``GET_BATCH_COMPLETED``,
    ``TrainEvents.LOG_INTERVAL_COMPLETED``.
    Reads: ``engine.state.batch["images"]`` (B, C, H, W).
    Writes: to ``engine.state.metrics``: ``train/images_per_s``, over all ranks; ``train/iteration_ms`` and
    ``train/data_ms``, mean milliseconds of an iteration and of its wait for the batch; ``train/data_wait``, the second as a
    share of the first.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.images, self.iterations, self.waited, self.seconds = 0, 0, 0.0, 0.0
        self._began: float | None = None

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.begin)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.receive)

    def start(self, engine: StepEngine) -> None:
        """Report behind all that is attached by now: a monitor's reading is part of the window at whose end it is taken."""
        self._reset()
        if not engine.has_event_handler(self.report, TrainEvents.LOG_INTERVAL_COMPLETED):
            engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.report)

    def begin(self) -> None:
        """The loop asks for a batch: the former iteration is over."""
        now = time.perf_counter()
        if self._began is not None:
            self.seconds += now - self._began
        self._began = now

    def receive(self, engine: StepEngine) -> None:
        """The batch is there."""
        if self._began is None:  # an epoch's first batch after a pass of the loader: Ignite asks without saying so
            self._began = time.perf_counter()
        self.waited += time.perf_counter() - self._began
        self.images += len(engine.state.batch["images"])
        self.iterations += 1

    def report(self, engine: StepEngine) -> None:
        """Write all and start anew."""
        self.begin()
        if self.seconds > 0:
            engine.state.metrics["train/images_per_s"] = self.images * idist.get_world_size() / self.seconds
            engine.state.metrics["train/iteration_ms"] = 1000 * self.seconds / self.iterations
            engine.state.metrics["train/data_ms"] = 1000 * self.waited / self.iterations
            engine.state.metrics["train/data_wait"] = self.waited / self.seconds
        began = self._began
        self._reset()
        self._began = began
