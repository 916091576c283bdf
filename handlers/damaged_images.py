"""Name and count images that could not be read."""

from __future__ import annotations

import logging

from ignite.engine import Events

from hjepa_engine.engine import StepEngine, Trainer
from hjepa_engine.errors import DataError
from hjepa_engine.events import TrainEvents
from hjepa_engine.utils.distributed import gather_objects

logger = logging.getLogger(__name__)


class DamagedImages:
    """Log each unreadable image once, and stop the run if too many of a split are.

    Listens to: ``GET_BATCH_COMPLETED``; of a trainer ``TrainEvents.LOG_INTERVAL_COMPLETED``, of an evaluator
    ``EPOCH_COMPLETED``.
    Reads: ``engine.state.batch["damaged"]``, a line ``name: reason`` for each image that could not be read.
    Writes: ``engine.state.metrics[metric]``, how many different ones there are so far on all ranks, once it is not 0.
    Keys: ``data.max_damaged``.

    Args:
        max_share: largest allowed share of unreadable images in the split, from 0 to 1, whichever are read first.
        total: number of images in the split; None: there is no limit.
        split: its name in messages.
        metric: name of the count.
    """

    per_rank = True  # ranks read different images

    def __init__(
        self,
        max_share: float = 0.001,
        total: int | None = None,
        split: str = "training",
        metric: str = "data/damaged",
    ) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share must be from 0 to 1, got {max_share}")
        self.max_share, self.total, self.split, self.metric = max_share, total, split, metric
        self.lines: dict[str, None] = {}  # in the order found

    def attach(self, engine: StepEngine) -> None:
        """Attach to a trainer or an evaluator."""
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.note)
        is_trainer = isinstance(engine, Trainer)
        engine.add_event_handler(
            TrainEvents.LOG_INTERVAL_COMPLETED if is_trainer else Events.EPOCH_COMPLETED, self.check
        )

    def note(self, engine: StepEngine) -> None:
        """Remember and name what is damaged in the batch."""
        batch = engine.state.batch
        for line in batch.get("damaged", ()) if isinstance(batch, dict) else ():
            if line not in self.lines:
                self.lines[line] = None
                logger.warning("unreadable %s image: %s", self.split, line)

    def check(self, engine: StepEngine) -> None:
        """Compare their share of the split with ``max_share``. Collective."""
        found = list(dict.fromkeys(line for lines in gather_objects(list(self.lines)) for line in lines))
        if not found:
            return
        engine.state.metrics[self.metric] = float(len(found))
        if self.total is not None and len(found) > self.max_share * self.total:
            raise DataError(
                f"{len(found)} of {self.total} {self.split} images could not be read, more than data.max_damaged "
                f"{self.max_share} allows; one of them: {found[0]}"
            )

    def state_dict(self) -> dict[str, list[str]]:
        """The lines so far."""
        return {"damaged": list(self.lines)}

    def merge_states(self, states: list[dict[str, list[str]]], rank: int) -> dict[str, list[str]]:
        """With another number of ranks, each knows all: an image counts once."""
        return {"damaged": list(dict.fromkeys(line for state in states for line in state["damaged"]))}

    def load_state_dict(self, state_dict: dict[str, list[str]]) -> None:
        """Restore what ``state_dict`` returned."""
        self.lines = dict.fromkeys(state_dict["damaged"])
