"""Which samples an epoch reads, from where on."""

from __future__ import annotations

from typing import Protocol

from ignite.engine import Events

from hjepa_engine.engine import StepEngine


class Positioned(Protocol):
    """A sampler that can be put to a place in the data."""

    def set_position(self, epoch: int, batch: int) -> None:
        """Start the next pass at ``batch`` (from 0) of ``epoch`` (from 0)."""


class DataPosition:
    """Put the sampler to the engine's epoch and iteration before every pass over the data.

    Order is a function of the epoch, and the start is an offset: nothing is replayed after a resume.

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
        """Place the sampler."""
        state = engine.state
        epoch = state.epoch - 1
        self.sampler.set_position(epoch, state.iteration - epoch * state.epoch_length)
