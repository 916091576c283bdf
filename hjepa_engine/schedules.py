"""Schedules: closed-form functions of the optimizer step, so a checkpoint needs no state of theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

Schedule = Callable[[int], float]


class CosineScheduler:
    """Linear warmup from ``start`` to ``base``, then a cosine decay to ``minimum`` (SGDR, arXiv:1608.03983).

    Steps count from 0, updates from 1, and the value of a step is that of the update it makes, as in I-JEPA's code: the
    first of W warmup updates has ``start`` + (``base`` - ``start``) / W, the W-th one ``base``, the last one ``minimum``.

    >>> schedule = CosineScheduler(base=1.0, minimum=0.1, epochs=3, steps_per_epoch=5, warmup_epochs=1)
    >>> [round(schedule(step), 3) for step in (0, 4, 14, 1000)]
    [0.2, 1.0, 0.1, 0.1]

    Args:
        base: value at the end of the warmup.
        minimum: value from the last step on; if the warmup leaves no steps to decay in, the value stays at ``base``.
        epochs: length of the run.
        steps_per_epoch: optimizer steps in an epoch.
        warmup_epochs: length of the warmup, from 0 to ``epochs``.
        start: value from which the warmup rises.
    """

    def __init__(
        self,
        base: float,
        minimum: float,
        epochs: float,
        steps_per_epoch: int,
        warmup_epochs: float = 0,
        start: float = 0.0,
    ) -> None:
        if epochs <= 0 or steps_per_epoch < 1:
            raise ValueError(f"epochs and steps_per_epoch must be positive, got {epochs} and {steps_per_epoch}")
        if not 0 <= warmup_epochs <= epochs:
            raise ValueError(f"warmup_epochs must be from 0 to epochs={epochs}, got {warmup_epochs}")
        self.base, self.minimum, self.start = base, minimum, start
        self.total_steps = round(epochs * steps_per_epoch)
        self.warmup_steps = round(warmup_epochs * steps_per_epoch)

    def __call__(self, step: int) -> float:
        """The value at optimizer step ``step``, from 0."""
        return self._value_after(step + 1)

    def _value_after(self, steps: int) -> float:
        """The value that a share ``steps`` / ``total_steps`` of the run has reached."""
        if steps < self.warmup_steps:
            return self.start + (self.base - self.start) * steps / self.warmup_steps
        decay_steps = self.total_steps - self.warmup_steps
        weight = self._decay(min(1.0, (steps - self.warmup_steps) / decay_steps)) if decay_steps else 1.0
        if weight == 1 or self.base == self.minimum:  # no rounding
            return self.base
        return self.base * weight + self.minimum * (1 - weight)

    def _decay(self, progress: float) -> float:
        """Weight of ``base`` against ``minimum``, from 1 at progress 0 to 0 at progress 1."""
        return (1 + math.cos(math.pi * progress)) / 2


class LinearScheduler(CosineScheduler):
    """Like :class:`CosineScheduler`, but decays linearly from ``base`` to ``minimum``."""

    def _decay(self, progress: float) -> float:
        return 1 - progress


class ConstantScheduler(CosineScheduler):
    """Linear warmup from ``start`` to ``base``, then constant; ``minimum`` is ignored."""

    def _decay(self, progress: float) -> float:
        return 1.0


class EMAScheduler(CosineScheduler):
    """Momentum of the target encoder: from ``base`` at step 0 to ``final`` at the end of the run, which it approaches.

    Args:
        base: momentum at the first update (at the end of the warmup), in [0, 1].
        final: momentum at the end of the run, in [0, 1].
        epochs: length of the run.
        steps_per_epoch: optimizer steps in an epoch.
        warmup_epochs: updates before the schedule begins, in epochs, from 0 to ``epochs``.
        start: momentum of the first update, from which it rises linearly during the warmup, in [0, 1]; None: ``base``, which
            the warmup holds.
        shape: ``cosine``: half a cosine (BYOL, arXiv:2006.07733); ``linear`` (I-JEPA, arXiv:2301.08243).
    """

    def __init__(
        self,
        base: float,
        final: float,
        epochs: float,
        steps_per_epoch: int,
        warmup_epochs: float = 0,
        start: float | None = None,
        shape: Literal["cosine", "linear"] = "cosine",
    ) -> None:
        start = base if start is None else start
        if not all(0 <= momentum <= 1 for momentum in (base, final, start)):
            raise ValueError(f"momentum must be from 0 to 1, got {base}, {final} and {start}")
        super().__init__(base, final, epochs, steps_per_epoch, warmup_epochs, start)
        self.shape = shape

    def __call__(self, step: int) -> float:
        """The momentum of the update after optimizer step ``step``, from 0."""
        return self._value_after(step)

    def _decay(self, progress: float) -> float:
        return 1 - progress if self.shape == "linear" else super()._decay(progress)


class HierarchicalScheduler:
    """One schedule per level, evaluated together.

    >>> HierarchicalScheduler([lambda step: 1.0, lambda step: 0.5])(0)
    [1.0, 0.5]
    """

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        if not schedules:
            raise ValueError("schedules must not be empty")
        self.schedules = tuple(schedules)

    def __call__(self, step: int) -> list[float]:
        """The value of every level, finest first, at optimizer step ``step``, from 0."""
        return [schedule(step) for schedule in self.schedules]


#: Learning-rate schedules by name.
SCHEDULES = {"cosine": CosineScheduler, "linear": LinearScheduler, "constant": ConstantScheduler}
