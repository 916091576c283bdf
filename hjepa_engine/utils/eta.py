"""How long a run is, and will still take."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any


class TimeRemaining:
    """Estimate the time left from the iterations and the ends of epochs that this process has seen.

    The end of an epoch is what follows its last iteration: validation, probes, saving. Of both, the newer half counts, of
    at most the last 1000: first epochs are slow where caches are cold.

    Args:
        clock: seconds; runs from here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last = clock, clock()
        self._iterations: deque[float] = deque(maxlen=1000)
        self._epoch_ends: deque[float] = deque(maxlen=1000)

    def iteration(self) -> None:
        """An iteration is over."""
        self._add_to(self._iterations)

    def epoch_end(self) -> None:
        """An epoch, with all that is done at its end, is over."""
        self._add_to(self._epoch_ends)

    def estimate(self, iterations: int, epoch_ends: int) -> float | None:
        """Seconds that so many iterations and ends of epochs will take; None where there was no iteration yet.

        As long as no epoch has ended, ends count as nothing.
        """
        if iterations and not self._iterations:
            return None
        return iterations * _recent_mean(self._iterations) + epoch_ends * _recent_mean(self._epoch_ends)

    def _add_to(self, durations: deque[float]) -> None:
        now = self._clock()
        durations.append(now - self._last)
        self._last = now


def _recent_mean(durations: deque[float]) -> float:
    newer = list(durations)[len(durations) // 2 :]
    return sum(newer) / len(newer) if newer else 0.0


def total_iterations(state: Any) -> float:
    """Iterations of the whole run that a trainer's ``state`` is in; infinity while the length of an epoch is not known."""
    if state.max_iters is not None:
        return state.max_iters
    return math.inf if state.epoch_length is None else state.max_epochs * state.epoch_length


def epoch_due(state: Any, every: int | None) -> bool:
    """Whether the present iteration ends an epoch whose number is a multiple of ``every`` (None: none is), or the run."""
    due = every is not None and state.ends_epoch and state.epoch % every == 0
    return due or state.iteration >= total_iterations(state)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as people write them.

    >>> duration(5.2), duration(65), duration(3725)
    ('5.2 s', '1:05', '1:02:05')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
