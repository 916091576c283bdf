"""Means of what the step reports."""

from __future__ import annotations

from ignite.engine import Events
from torch import Tensor

from hjepa_engine.engine import StepEngine, Trainer
from hjepa_engine.events import TrainEvents
from hjepa_engine.metrics.means import WeightedMeans


class MetricAverager:
    """Average every 0-dimensional tensor of the step's output, over samples and ranks.

    On a trainer a mean covers one log interval and is then reset; on an evaluator it covers the run. Values stay on their
    device until then: one synchronization per window.

    Listens to: ``ITERATION_COMPLETED``, and ``TrainEvents.LOG_INTERVAL_COMPLETED`` (trainer) or ``EPOCH_COMPLETED``
    (evaluator).
    Reads: ``engine.state.output``, ``engine.state.batch`` for the number of samples.
    Writes: ``engine.state.metrics[prefix + name]``.

    Args:
        prefix: put before the names.
    """

    per_rank = True  # every process has a state of its own

    def __init__(self, prefix: str = "train/") -> None:
        self.prefix, self.means = prefix, WeightedMeans()

    def attach(self, engine: StepEngine) -> None:
        """Attach to a trainer or an evaluator."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        window = TrainEvents.LOG_INTERVAL_COMPLETED if isinstance(engine, Trainer) else Events.EPOCH_COMPLETED
        engine.add_event_handler(window, self.report)

    def start(self, engine: StepEngine) -> None:
        """Start a new run with no sums; a resumed one keeps those it has loaded."""
        if engine.state.iteration == 0:
            self.means.reset()

    def add(self, engine: StepEngine) -> None:
        """Take the output of one step in."""
        output, batch = engine.state.output, engine.state.batch
        samples = next(len(value) for value in batch.values() if isinstance(value, Tensor))
        self.means.add({n: v for n, v in output.items() if isinstance(v, Tensor) and v.ndim == 0}, samples)

    def report(self, engine: StepEngine) -> None:
        """Write the means and start anew."""
        engine.state.metrics.update({self.prefix + name: mean for name, mean in self.means.compute().items()})
        self.means.reset()

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The open window's sums."""
        return self.means.state_dict()

    def load_state_dict(self, state_dict: dict[str, dict[str, float]]) -> None:
        """Restore what ``state_dict`` returned."""
        self.means.load_state_dict(state_dict)
