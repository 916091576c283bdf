"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Protocol

import torch
from ignite.engine import Events

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents


class Clock(Protocol):
    """Takes moments; a device that works behind the program's back knows them only later."""

    def now(self) -> Any:
        """The moment at which the device has done what it was asked for so far."""

    def is_known(self, moment: Any) -> bool:
        """Whether the device is past it."""

    def wait(self, moment: Any) -> None:
        """Until the device is past it."""

    def seconds(self, first: Any, second: Any) -> float:
        """From the first to the second, both known."""


class HostClock:
    """The processor's own clock."""

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def is_known(self, moment: float) -> bool:
        """It always is."""
        return True

    def wait(self, moment: float) -> None:
        """It never has to."""

    def seconds(self, first: float, second: float) -> float:
        """The difference."""
        return second - first


class CudaClock:
    """Events in the current stream of a GPU: taking one costs microseconds and waits for nothing."""

    def now(self) -> torch.cuda.Event:
        """A recorded event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_known(self, moment: torch.cuda.Event) -> bool:
        """Whether the GPU has got there."""
        return moment.query()

    def wait(self, moment: torch.cuda.Event) -> None:
        """Until the GPU has got there."""
        moment.synchronize()

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Between two events that the GPU has passed."""
        return first.elapsed_time(second) / 1000


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
