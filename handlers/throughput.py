"""Speed of training and where the time goes."""

from __future__ import annotations

import time

import ignite.distributed as idist
from ignite.engine import Events

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents


class Throughput:
    """Measure images per second and the share of the time that was spent waiting for data.

    Both cover one log window of training; validation in between does not count.

    Listens to: ``GET_BATCH_STARTED``, ``GET_BATCH_COMPLETED``, ``TrainEvents.WINDOW_COMPLETED``.
    Reads: ``engine.state.batch["images"]`` (B, C, H, W).
    Writes: ``engine.state.metrics["train/images_per_s"]``, over all ranks, and ``["train/data_wait"]``, from 0 to 1.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.images, self.waited, self.seconds = 0, 0.0, 0.0
        self._began: float | None = None

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.begin)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.receive)
        engine.add_event_handler(TrainEvents.WINDOW_COMPLETED, self.report)

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

    def report(self, engine: StepEngine) -> None:
        """Write both and start anew."""
        self.begin()
        if self.seconds > 0:
            engine.state.metrics["train/images_per_s"] = self.images * idist.get_world_size() / self.seconds
            engine.state.metrics["train/data_wait"] = self.waited / self.seconds
        began = self._began
        self._reset()
        self._began = began
