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
    """Name each damaged image once, and end the run when there are too many.

    Listens to: ``GET_BATCH_COMPLETED``, ``TrainEvents.LOG_INTERVAL_COMPLETED``.
    Reads: ``engine.state.batch["damaged"]``, names of images that were replaced by others.
    Writes: ``engine.state.metrics["data/damaged"]``, how many there were so far, once there are any.

    Args:
        max_share: largest share of damaged images among those read, in [0, 1]; judged at the end of a log interval, from
            100 images on.
    """

    per_rank = True  # every process has a state of its own

    def __init__(self, max_share: float = 0.001) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share must be from 0 to 1, got {max_share}")
        self.max_share, self.read, self.damaged = max_share, 0, 0
        self._named: dict[str, None] = {}  # in the order of their discovery

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.count)
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.check)

    def count(self, engine: StepEngine) -> None:
        """Look at the newest batch."""
        batch = engine.state.batch
        self.read += len(batch["images"])
        for name in batch.get("damaged", ()):
            self.damaged += 1
            if name not in self._named:
                self._named[name] = None
                logger.warning("damaged image replaced by another: %s", name)

    def check(self, engine: StepEngine) -> None:
        """Compare the share with what is allowed, over all ranks."""
        read, damaged = (int(idist.all_reduce(number)) for number in (self.read, self.damaged))
        if damaged:
            engine.state.metrics["data/damaged"] = float(damaged)
        if read >= 100 and damaged > self.max_share * read:
            example = f"; one is {next(iter(self._named))}" if self._named else ""
            raise DataError(
                f"{damaged} of {read} images are damaged, data.max_damaged allows a share of {self.max_share}{example}"
            )

    def state_dict(self) -> dict[str, int]:
        """Both counts."""
        return {"read": self.read, "damaged": self.damaged}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore what ``state_dict`` returned."""
        self.read, self.damaged = state_dict["read"], state_dict["damaged"]
