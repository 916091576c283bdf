"""What handlers share: ``engine.state``, its metrics, and the position in an accumulation window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import State
from torch import Tensor


class Metrics(dict[str, float]):
    """Floats by name, as ``engine.state.metrics``, that also know which of them were written since a given moment.

    >>> metrics = Metrics()
    >>> metrics["train/loss"] = 0.5
    >>> fresh, now = metrics.since(0)
    >>> metrics["val/loss"] = 0.4
    >>> metrics.since(now)[0]
    {'val/loss': 0.4}
    """

    def __init__(self) -> None:
        super().__init__()
        self._clock = 0
        self._written: dict[str, int] = {}

    def __setitem__(self, name: str, value: float) -> None:
        self._clock += 1
        self._written[name] = self._clock
        super().__setitem__(name, value)

    def update(self, *args: Any, **kwargs: float) -> None:
        """As ``dict.update``; every key counts as written."""
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def setdefault(self, name: str, default: float = math.nan) -> float:
        """As ``dict.setdefault``; counts as written."""
        self[name] = self.get(name, default)
        return self[name]

    def __ior__(self, other: Any) -> Metrics:  # type: ignore[override,misc]
        self.update(other)
        return self

    @property
    def moment(self) -> int:
        """The present moment, for :meth:`since`."""
        return self._clock

    def since(self, moment: int) -> tuple[dict[str, float], int]:
        """What was written after ``moment`` (0: ever) and is a number (or a tensor of one), and the present moment."""
        fresh = {name: self[name] for name in self if self._written[name] > moment}
        return {name: float(value) for name, value in fresh.items() if _is_number(value)}, self._clock

    def state_dict(self) -> dict[str, Any]:
        """Every number, and the moment at which it was written."""
        return {
            "clock": self._clock,
            "values": {name: float(value) for name, value in self.items() if _is_number(value)},
            "written": {name: self._written[name] for name, value in self.items() if _is_number(value)},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.clear()
        super().update(state_dict["values"])
        self._clock, self._written = state_dict["clock"], dict(state_dict["written"])


def _is_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float, np.number))


class TrainState(State):
    """Ignite's ``State`` and what the engine's handlers share; docs/handlers.md says who writes and who reads each.

    Ignite's own: ``iteration`` and ``epoch`` (from 1), ``max_epochs``, ``max_iters``, ``dataloader``, ``times``. What only
    one handler needs is an attribute of that handler.
    """

    batch: Any
    """The present batch, a dict, moved to the engine's device."""
    output: Any
    """What the step has returned, a dict with ``loss`` (); it has its graph up to ``TrainEvents.LOSS_READY``."""
    epoch_length: int
    """Iterations of an epoch; None before :meth:`Engine.run` is told, and until the first epoch of data without a length is
    over."""
    metrics: Metrics
    """Floats by name; whatever is new is logged."""
    media: dict[str, Any]
    """Images, histograms and objects by name, for the loggers, who take them away; never in a checkpoint."""
    optimizer_step: int
    """Updates of the parameters so far, skipped ones not counted: the clock of schedules and logs."""
    window_open: bool
    """Whether an accumulation window has begun and not ended: no moment to save."""
    epoch_open: bool
    """Whether an epoch's last iteration is over and the handlers of the epoch's end are still to come."""
    window_loss: Tensor
    """Mean loss () of the last complete accumulation window, on this rank."""
    skip_update: bool
    """Whether this window's update is to be dropped; False again at the next iteration."""
    hold_update: Tensor | None
    """1.0 where this window's update must change nothing, else 0.0: a tensor () on the device, for the optimizer, unread;
    None at the next iteration."""
    skipped_updates: int
    """Updates dropped so far in the run, by ``skip_update`` or the gradient scaler."""
    checkpoint: Path | None
    """The newest checkpoint on disk that this process has written, known once the run has ended or was preempted."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics, self.media = Metrics(), {}
        self.optimizer_step = self.skipped_updates = 0
        self.window_open = self.epoch_open = self.skip_update = False
        self.hold_update = None
        self.window_loss = torch.tensor(math.nan)
        self.checkpoint = None

    @property
    def ends_epoch(self) -> bool:
        """Whether the present iteration is its epoch's last; False while an epoch's length is not known."""
        return self.epoch_length is not None and self.iteration % self.epoch_length == 0


class Window(NamedTuple):
    """Position of an iteration in its accumulation window."""

    position: int
    """Number of the micro-batch within the window, from 0."""
    size: int
    """Micro-batches in the window; the last of an epoch or run may have fewer than the others."""

    @property
    def is_last(self) -> bool:
        """Whether the window ends with this micro-batch."""
        return self.position == self.size - 1


def accumulation_window(
    iteration: int, epoch_length: int | None, accumulation_steps: int, max_iters: int | None = None
) -> Window:
    """Which window ``iteration`` (from 1) belongs to; windows start anew with every epoch.

    Raises:
        ValueError: a window of several iterations may be cut short by the epoch's end, and ``epoch_length`` is not known.

    >>> [accumulation_window(i, epoch_length=5, accumulation_steps=2) for i in (1, 2, 5)]
    [Window(position=0, size=2), Window(position=1, size=2), Window(position=0, size=1)]
    """
    if accumulation_steps == 1:
        return Window(0, 1)
    if epoch_length is None:
        raise ValueError(
            f"accumulation_steps {accumulation_steps} needs the length of an epoch: give run() its epoch_length"
        )
    position = (iteration - 1) % epoch_length
    end = epoch_length if max_iters is None else min(epoch_length, position + 1 + max_iters - iteration)
    offset = position % accumulation_steps
    return Window(offset, min(accumulation_steps, end - (position - offset)))
