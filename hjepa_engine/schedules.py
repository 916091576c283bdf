"""Schedules: functions of the optimizer step, in closed form, so that a step's number is all there is to save."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[int], float]


class CosineScheduler:
    """Linear warm-up from 0 to ``base``, then half a cosine to ``minimum`` at the last step (SGDR, arXiv:1608.03983).

    >>> schedule = CosineScheduler(base=1.0, minimum=0.1, epochs=3, steps_per_epoch=7, warmup_epochs=1)
    >>> [round(schedule(step), 3) for step in (0, 7, 20, 1000)]
    [0.0, 1.0, 0.1, 0.1]

    Args:
        base: value at the end of the warm-up (at step 0 without one).
        minimum: value at the last step and after it; where the warm-up leaves no step to decay in, ``base`` stays.
        epochs: length of the run.
        steps_per_epoch: optimizer steps in an epoch.
        warmup_epochs: length of the warm-up, from 0 to ``epochs``.
    """

    def __init__(
        self, base: float, minimum: float, epochs: float, steps_per_epoch: int, warmup_epochs: float = 0
    ) -> None:
        if epochs <= 0 or steps_per_epoch < 1:
            raise ValueError(f"epochs and steps_per_epoch must be positive, got {epochs} and {steps_per_epoch}")
        if not 0 <= warmup_epochs <= epochs:
            raise ValueError(f"warmup_epochs must be from 0 to epochs={epochs}, got {warmup_epochs}")
        self.base, self.minimum = base, minimum
        self.total_steps = round(epochs * steps_per_epoch)
        self.warmup_steps = round(warmup_epochs * steps_per_epoch)

    def __call__(self, step: int) -> float:
        """The value at optimizer step ``step``, from 0."""
        if step < self.warmup_steps:
            return self.base * step / self.warmup_steps
        decay_steps = self.total_steps - 1 - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / decay_steps) if decay_steps > 0 else 0.0
        share = self._share(progress)
        # Exact at both ends, and for a schedule that does not move.
        return self.base if share == 1 or self.base == self.minimum else self.base * share + self.minimum * (1 - share)

    @staticmethod
    def _share(progress: float) -> float:
        """How much of ``base`` is left, from 1 at progress 0 to 0 at progress 1."""
        return (1 + math.cos(math.pi * progress)) / 2


class LinearScheduler(CosineScheduler):
    """Like :class:`CosineScheduler`, with a straight line from ``base`` to ``minimum``."""

    @staticmethod
    def _share(progress: float) -> float:
        return 1 - progress


class ConstantScheduler(CosineScheduler):
    """Linear warm-up from 0 to ``base``, then ``base``; ``minimum`` is not reached."""

    @staticmethod
    def _share(progress: float) -> float:
        return 1.0


class EMAScheduler(CosineScheduler):
    """Momentum of the target encoder: half a cosine from ``base`` to ``final`` (BYOL, arXiv:2006.07733).

    With a warm-up, momentum first rises linearly from 0 to ``base``: the target follows closely while the learning rate
    warms up, and forgets the random initial weights sooner.

    Args:
        base: momentum at the end of the warm-up, in [0, 1].
        final: momentum at the last step and after it, in [0, 1].
        epochs: length of the run.
        steps_per_epoch: optimizer steps in an epoch.
        warmup_epochs: length of the warm-up, from 0 to ``epochs``.
    """

    def __init__(
        self, base: float, final: float, epochs: float, steps_per_epoch: int, warmup_epochs: float = 0
    ) -> None:
        if not (0 <= base <= 1 and 0 <= final <= 1):
            raise ValueError(f"momentum must be from 0 to 1, got {base} and {final}")
        super().__init__(base, final, epochs, steps_per_epoch, warmup_epochs)


class HierarchicalScheduler:
    """One schedule per level behind one interface.

    >>> HierarchicalScheduler([lambda step: 1.0, lambda step: 0.5])(0)
    [1.0, 0.5]
    """

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        if not schedules:
            raise ValueError("schedules must hold at least one schedule, got none")
        self.schedules = tuple(schedules)

    def __call__(self, step: int) -> list[float]:
        """The value of every level, finest first, at optimizer step ``step``."""
        return [schedule(step) for schedule in self.schedules]


#: Learning-rate schedules by name.
SCHEDULES = {"cosine": CosineScheduler, "linear": LinearScheduler, "constant": ConstantScheduler}
