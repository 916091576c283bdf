"""Clocks of the host and of a GPU, which runs behind the program."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


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
