"""Averages of the step's scalar outputs."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Events
from torch import Tensor

from hjepa_engine.engine import StepEngine, Trainer
from hjepa_engine.events import TrainEvents
from hjepa_engine.metrics.means import WeightedMeans


class MetricAverager:
    """Average every 0-dimensional tensor of the step's output, over samples and ranks.

    On a trainer an average covers one log interval; on an evaluator, the whole run. Values stay on their device until then,
    so there is one device synchronization per log interval.

    Listens to: ``ITERATION_COMPLETED``, and ``TrainEvents.LOG_INTERVAL_COMPLETED`` (trainer) or ``EPOCH_COMPLETED``
    (evaluator).
    Reads: ``engine.state.output``, ``engine.state.batch`` for the number of samples.
    Writes: ``engine.state.metrics[prefix + name]``.
    Keys: ``logging.log_frequency``.

    Args:
        prefix: prefix of the metrics' names.
    """

    per_rank = True  # the sums differ between ranks

    def __init__(self, prefix: str = "train/") -> None:
        self.prefix, self.means = prefix, WeightedMeans()

    def attach(self, engine: StepEngine) -> None:
        """Attach to a trainer or an evaluator."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        window = TrainEvents.LOG_INTERVAL_COMPLETED if isinstance(engine, Trainer) else Events.EPOCH_COMPLETED
        engine.add_event_handler(window, self.report)

    def start(self, engine: StepEngine) -> None:
        """Reset the sums when a new run starts; a resumed run keeps the restored ones."""
        if engine.state.iteration == 0:
            self.means.reset()

    def add(self, engine: StepEngine) -> None:
        """Add the output of one step."""
        output, batch = engine.state.output, engine.state.batch
        # A filler stands for images that cannot be read.
        is_filler = isinstance(batch, dict) and batch.get("is_filler", False)
        samples = 0 if is_filler else next(len(value) for value in batch.values() if isinstance(value, Tensor))
        values = {name: value for name, value in output.items() if isinstance(value, Tensor) and value.ndim == 0}
        if is_filler:  # even what is not finite
            values = {name: torch.zeros_like(value) for name, value in values.items()}
        self.means.add(values, samples)

    def report(self, engine: StepEngine) -> None:
        """Write the averages and reset the sums."""
        engine.state.metrics.update({self.prefix + name: mean for name, mean in self.means.compute().items()})
        self.means.reset()

    def state_dict(self) -> dict[str, Any]:
        """The sums of the current log interval."""
        return self.means.state_dict()

    def merge_states(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        """A log interval that began with another number of ranks goes on with what all of them have summed."""
        return self.means.merge_states(states, rank)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.means.load_state_dict(state_dict)
