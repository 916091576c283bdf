"""Start the data loader at the right epoch and batch."""

from __future__ import annotations

from typing import Protocol

from ignite.engine import Events

from hjepa_engine.engine import StepEngine


class Positioned(Protocol):
    """A sampler whose next pass can start anywhere."""

    def set_position(self, epoch: int, batch: int) -> None:
        """Start the next pass at ``batch`` (from 0) of ``epoch`` (from 0)."""


class DataPosition:
    """Set the sampler to the engine's epoch and iteration before every pass over the data.

    The order depends only on the epoch, and a pass can start at any batch, so a resume replays no data.

    Listens to: ``EPOCH_STARTED``.

    Args:
        sampler: usually an :class:`~hjepa_engine.data.EpochBatchSampler`.
    """

    def __init__(self, sampler: Positioned) -> None:
        self.sampler = sampler

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.set_position)

    def set_position(self, engine: StepEngine) -> None:
        """Set the sampler's position."""
        state = engine.state
        epoch = state.epoch - 1
        self.sampler.set_position(epoch, state.iteration - (epoch * state.epoch_length if epoch else 0))
