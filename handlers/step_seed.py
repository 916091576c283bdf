"""Seed the random numbers of a step: dropout, drop path, random directions."""

from __future__ import annotations

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents
from hjepa_engine.utils.distributed import rank
from hjepa_engine.utils.rng import seed_everything


class StepSeed:
    """Seed all global generators before every step with the key (seed, iteration, rank).

    So a step draws the same numbers after a resume, and whatever other handlers draw.

    Listens to: ``TrainEvents.FORWARD_STARTED``.
    Keys: ``seed``.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def attach(self, engine: StepEngine) -> None:
        """Attach to a trainer or an evaluator."""
        engine.add_event_handler(TrainEvents.FORWARD_STARTED, self.reseed)

    def reseed(self, engine: StepEngine) -> None:
        """Seed the next step."""
        seed_everything(self.seed, "step", engine.state.iteration, rank())
