"""Schedules: closed-form functions of the optimizer step, so a checkpoint needs no state of theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[int], float]


class CosineScheduler:
    """Linear warmup from 0 to ``base``, then a cosine decay to ``minimum`` at the last step (SGDR, arXiv:1608.03983).

    >>> schedule = CosineScheduler(base=1.0, minimum=0.1, epochs=3, steps_per_epoch=7, warmup_epochs=1)
    >>> [round(schedule(step), 3) for step in (0, 7, 20, 1000)]
    [0.0, 1.0, 0.1, 0.1]

    Args:
        base: value at the end of the warmup (without warmup: at step 0).
        minimum: value from the last step on; if the warmup leaves no steps to decay in, the value stays at ``base``.
        epochs: length of the run.
        steps_per_epoch: optimizer steps in an epoch.
        warmup_epochs: length of the warmup, from 0 to ``epochs``.
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
        weight = self._decay(progress)
        if weight == 1 or self.base == self.minimum:  # no rounding
            return self.base
        return self.base * weight + self.minimum * (1 - weight)

    @staticmethod
    def _decay(progress: float) -> float:
        """Weight of ``base`` against ``minimum``, from 1 at progress 0 to 0 at progress 1."""
        return (1 + math.cos(math.pi * progress)) / 2


class LinearScheduler(CosineScheduler):
    """Like :class:`CosineScheduler`, but decays linearly from ``base`` to ``minimum``."""

    @staticmethod
    def _decay(progress: float) -> float:
        return 1 - progress


class ConstantScheduler(CosineScheduler):
    """Linear warmup from 0 to ``base``, then constant; ``minimum`` is ignored."""

    @staticmethod
    def _decay(progress: float) -> float:
        return 1.0


class EMAScheduler(CosineScheduler):
    """Momentum of the target encoder: a half cosine from ``base`` to ``final`` (BYOL, arXiv:2006.07733).

    With warmup, momentum first rises linearly from 0 to ``base``: the target encoder follows the context encoder closely
    while the learning rate warms up, so it forgets the random initial weights sooner.

    Args:
        base: momentum at the end of the warmup, in [0, 1].
        final: momentum from the last step on, in [0, 1].
        epochs: length of the run.
        steps_per_epoch: optimizer steps in an epoch.
        warmup_epochs: length of the warmup, from 0 to ``epochs``.
    """

    def __init__(
        self, base: float, final: float, epochs: float, steps_per_epoch: int, warmup_epochs: float = 0
    ) -> None:
        if not (0 <= base <= 1 and 0 <= final <= 1):
            raise ValueError(f"momentum must be from 0 to 1, got {base} and {final}")
        super().__init__(base, final, epochs, steps_per_epoch, warmup_epochs)


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
