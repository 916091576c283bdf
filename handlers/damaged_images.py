"""Count images that could not be read."""

from __future__ import annotations

import logging

import ignite.distributed as idist
from ignite.engine import Events

from hjepa_engine.engine import StepEngine
from hjepa_engine.errors import DataError
from hjepa_engine.events import TrainEvents

logger = logging.getLogger(__name__)


class DamagedImages:
    """Log each unreadable image once, and stop the run if there are too many.

    Listens to: ``GET_BATCH_COMPLETED``, ``TrainEvents.LOG_INTERVAL_COMPLETED``.
    Reads: ``engine.state.batch["damaged"]``, names of images that were replaced.
    Writes: ``engine.state.metrics["data/damaged"]``, their number so far, once it is not 0.

    Args:
        max_share: largest allowed fraction of unreadable images, in [0, 1]; checked at the end of a log interval, once
            100 images were read.
    """

    per_rank = True  # the counts differ between ranks

    def __init__(self, max_share: float = 0.001) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share must be from 0 to 1, got {max_share}")
        self.max_share, self.read, self.damaged = max_share, 0, 0
        self._named: dict[str, None] = {}  # in the order found

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.count)
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.check)

    def count(self, engine: StepEngine) -> None:
        """Count the images of the batch."""
        batch = engine.state.batch
        self.read += len(batch["images"])
        for name in batch.get("damaged", ()):
            self.damaged += 1
            if name not in self._named:
                self._named[name] = None
                logger.warning("unreadable image replaced by another one: %s", name)

    def check(self, engine: StepEngine) -> None:
        """Compare their fraction over all ranks with ``max_share``."""
        read, damaged = (int(idist.all_reduce(number)) for number in (self.read, self.damaged))
        if damaged:
            engine.state.metrics["data/damaged"] = float(damaged)
        if read >= 100 and damaged > self.max_share * read:
            example = f"; one of them: {next(iter(self._named))}" if self._named else ""
            raise DataError(
                f"{damaged} of {read} images could not be read, more than data.max_damaged {self.max_share} allows{example}"
            )

    def state_dict(self) -> dict[str, int]:
        """Both counts."""
        return {"read": self.read, "damaged": self.damaged}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore what ``state_dict`` returned."""
        self.read, self.damaged = state_dict["read"], state_dict["damaged"]
