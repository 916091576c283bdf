"""Validation at the end of epochs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ignite.engine import Events

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents


class Validation:
    """Run an evaluator over validation data after every ``every``-th epoch.

    Listens to: ``EPOCH_COMPLETED``.
    Writes: ``engine.state.metrics[prefix + name]`` for each of the evaluator's metrics.
    Fires: ``TrainEvents.VALIDATION_COMPLETED``.

    Args:
        evaluator: its handlers write ``evaluator.state.metrics``.
        data: validation batches.
        prefix: prefix of the metrics' names.
        every: epochs between validations.
    """

    def __init__(self, evaluator: StepEngine, data: Iterable[Any], prefix: str = "val/", every: int = 1) -> None:
        self.evaluator, self.data, self.prefix, self.every = evaluator, data, prefix, every

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.every), self.run)

    def run(self, engine: StepEngine) -> None:
        """Run one validation."""
        metrics = self.evaluator.run(self.data).metrics
        engine.state.metrics.update({f"{self.prefix}{name}": value for name, value in metrics.items()})
        engine.fire_event(TrainEvents.VALIDATION_COMPLETED)
