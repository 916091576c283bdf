"""Where the time of a step goes."""

from __future__ import annotations

from collections import deque
from typing import Any

from ignite.engine import Events

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents
from hjepa_engine.utils.clocks import Clock, CudaClock, HostClock


class StepTiming:
    """Measure forward pass, backward pass and update, each as mean milliseconds per iteration of the log interval.

    ``forward``: from ``FORWARD_STARTED`` to ``FORWARD_COMPLETED``, the step: both encoders, predictor and losses.
    ``backward``: from there to ``BACKWARD_COMPLETED``. ``update``: from there to ``UPDATE_COMPLETED``: handlers of
    ``GRADIENTS_READY``, clipping, optimizer, momentum encoder. It happens once per accumulation window and is shared by its
    iterations, so that the three add up. What they leave of ``train/iteration_ms`` is data, masks, moving the batch, and
    other handlers.

    On a GPU these are times of the GPU, read once per log interval, which waits for it; they include its waiting for the
    program. Elsewhere they are times of the program.

    Listens to: ``STARTED``; ``TrainEvents.FORWARD_STARTED``, ``FORWARD_COMPLETED``, ``BACKWARD_COMPLETED``,
    ``UPDATE_COMPLETED`` and ``LOG_INTERVAL_COMPLETED``.
    Writes: ``train/forward_ms``, ``train/backward_ms`` and ``train/update_ms`` to ``engine.state.metrics``, of this rank.

    Args:
        clock: by default the one of the engine's device.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        self._seconds = {"forward": 0.0, "backward": 0.0, "update": 0.0}
        self._iterations = 0
        self._spans: deque[tuple[str, Any, Any]] = deque()
        self._began: Any = None

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(TrainEvents.FORWARD_STARTED, self.begin)
        engine.add_event_handler(TrainEvents.FORWARD_COMPLETED, self.end, "forward")
        engine.add_event_handler(TrainEvents.BACKWARD_COMPLETED, self.end, "backward")
        engine.add_event_handler(TrainEvents.UPDATE_COMPLETED, self.end, "update")
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.report)

    def start(self, engine: StepEngine) -> None:
        """Take up the clock."""
        self._reset()
        self.clock = self._clock or (CudaClock() if engine.device.type == "cuda" else HostClock())

    def begin(self) -> None:
        """The step begins."""
        self._sum_up()
        self._began = self.clock.now()
        self._iterations += 1

    def end(self, engine: StepEngine, part: str) -> None:
        """A part of the step is over, the following one begins."""
        now = self.clock.now()
        self._spans.append((part, self._began, now))
        self._began = now

    def report(self, engine: StepEngine) -> None:
        """Write the means and start anew."""
        if self._spans:
            self.clock.wait(self._spans[-1][2])
        self._sum_up()
        if self._iterations:
            for part, seconds in self._seconds.items():
                engine.state.metrics[f"train/{part}_ms"] = 1000 * seconds / self._iterations
        self._reset()

    def _sum_up(self) -> None:
        # As they become known, so that their number is bounded by how far the program is ahead of the device.
        while self._spans and self.clock.is_known(self._spans[0][2]):
            part, first, second = self._spans.popleft()
            self._seconds[part] += self.clock.seconds(first, second)
