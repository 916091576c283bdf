"""How long a run is, and will still take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

#: Durations looked back on at most.
MAX_RECENT = 1000


class Recent:
    """The mean of the more recent half of what was added, and of at most the last 1000.

    >>> recent = Recent()
    >>> for seconds in (10.0, 4.0, 2.0, 2.0):
    ...     recent.add(seconds)
    >>> recent.mean
    2.0
    """

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=MAX_RECENT)
        self._added = 0

    def add(self, value: float) -> None:
        """One value more."""
        self._values.append(value)
        self._added += 1

    def add_to_last(self, value: float) -> None:
        """Enlarge the newest value."""
        self._values[-1] += value

    @property
    def mean(self) -> float | None:
        """The mean; None where nothing was added."""
        if not self._added:
            return None
        number = min(len(self._values), (self._added + 1) // 2)
        return sum(list(self._values)[-number:]) / number


class TimeRemaining:
    """Estimate the time left from what iterations, and the turns of epochs, have recently taken in this process.

    A turn is all that lies between an epoch's last iteration and the next one's first batch: validation, probes, saving. The
    older half of what was seen does not count, because first epochs are slow where caches are cold. Until there has been
    a turn, turns count as nothing.

    Args:
        clock: seconds; runs from here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._iterations, self._turns = Recent(), Recent()
        self._in_epoch = self._turned = False
        self._last = clock()

    def batch(self) -> None:
        """The batch of an iteration is there; the first one of a run has waited for what happens only once."""
        if self._in_epoch:
            return
        passed = self._passed()
        if self._turned:
            self._turns.add_to_last(passed)
        self._in_epoch = True

    def iteration(self) -> None:
        """An iteration is over."""
        self._iterations.add(self._passed())

    def epoch(self) -> None:
        """An epoch, and what is done behind its last iteration, are over."""
        self._turns.add(self._passed())
        self._in_epoch, self._turned = False, True

    def left(self, iterations: int, turns: int) -> float | None:
        """Seconds that so many iterations and turns will take; None where there was no iteration yet."""
        pace = self._iterations.mean
        if pace is None and iterations:
            return None
        return iterations * (pace or 0.0) + turns * (self._turns.mean or 0.0)

    def _passed(self) -> float:
        last, self._last = self._last, self._clock()
        return self._last - last


def total_iterations(state: Any) -> int:
    """Iterations of the whole run that a trainer's ``state`` is in."""
    return state.max_epochs * state.epoch_length if state.max_iters is None else state.max_iters


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
