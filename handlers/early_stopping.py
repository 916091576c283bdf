"""Stop a run that no longer improves."""

from __future__ import annotations

import math
from typing import Literal

from ignite.engine import Events

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents


class EarlyStopping:
    """End the run when a metric has not improved for ``patience`` validations in a row.

    A value that is not finite is not an improvement. Every rank has the same averaged value, so all ranks stop together.

    Listens to: ``TrainEvents.VALIDATION_COMPLETED``; ``STARTED``, for a resumed run that was already stopped.
    Reads: ``engine.state.metrics[metric]``.
    Writes: terminates the engine.
    Keys: ``training.early_stopping``.

    Args:
        patience: validations without improvement, at least 1.
        metric: name of the metric. The validation loss falls when the target encoder collapses: prefer a probe.
        mode: whether smaller (``min``) or larger (``max``) is better.
        min_delta: smallest change that counts as an improvement.
    """

    def __init__(
        self, patience: int, *, metric: str = "val/loss", mode: Literal["min", "max"] = "min", min_delta: float = 0.0
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max, got {mode!r}")
        self.patience, self.metric, self.mode, self.min_delta = patience, metric, mode, min_delta
        self.best, self.bad = -math.inf, 0

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(TrainEvents.VALIDATION_COMPLETED, self.check)
        engine.add_event_handler(Events.STARTED, self.end)

    def check(self, engine: StepEngine) -> None:
        """Compare the newest value with the best."""
        value = engine.state.metrics.get(self.metric)
        if value is None:
            known = ", ".join(sorted(engine.state.metrics)) or "none"
            raise ValueError(f"early stopping needs the metric {self.metric!r}, logged metrics: {known}")
        score = -value if self.mode == "min" else value
        if math.isfinite(score) and score > self.best + self.min_delta:
            self.best, self.bad = score, 0
            return
        self.bad += 1
        self.end(engine)

    def end(self, engine: StepEngine) -> None:
        """End the run if patience has run out."""
        if self.bad >= self.patience:
            engine.terminate()

    def state_dict(self) -> dict[str, float]:
        """Best score, and number of validations since."""
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore what ``state_dict`` returned."""
        self.best, self.bad = state_dict["best"], int(state_dict["bad"])
