"""One handle to every logger."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ignite.engine import Events
from numpy.typing import NDArray
from torch import Tensor

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents
from hjepa_engine.media import Anything, Histogram, Image, Media, Text
from hjepa_engine.writers import Writer

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Write new values of ``engine.state.metrics``, and what lies in ``engine.state.media``, to every writer.

    A value is written once, with the optimiser step at which it was new. A writer that fails is named in one warning
    and dropped: its failure is not the run's. The ``log_...`` methods are for values of your own.

    Listens to: ``TrainEvents.METRICS_READY``, ``COMPLETED``.
    Reads: ``engine.state.metrics``; empties ``engine.state.media``.

    Args:
        writers: opened when there is something to write; none on ranks other than 0.
    """

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = list(writers)
        self._opened: list[Writer] = []
        self._off: list[Writer] = []
        self._seen = 0
        self._states: dict[str, Any] | None = None
        self._engine: StepEngine | None = None

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        self._engine = engine
        for event in (TrainEvents.METRICS_READY, Events.COMPLETED):
            engine.add_event_handler(event, self.write)

    def write(self, engine: StepEngine) -> None:
        """Write what is new."""
        state = engine.state
        fresh, self._seen = state.metrics.since(self._seen)
        if fresh:
            self._send(lambda writer: writer.write(fresh, state.optimizer_step, state.epoch))
        if state.media:
            media, state.media = state.media, {}
            self._send(lambda writer: writer.write_media(media, state.optimizer_step, state.epoch))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None, prefix: str = "") -> None:
        """Write values of your own.

        Args:
            metrics: floats by name.
            step: optimiser step they belong to; the engine's present one by default.
            prefix: put before the names.
        """
        values = {f"{prefix}{name}": float(value) for name, value in metrics.items()}
        now, epoch = self._now(step)
        self._send(lambda writer: writer.write(values, now, epoch))

    def log_system_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write values of your own under ``system/``."""
        self.log_metrics(metrics, step, "system/")

    def log_image(self, name: str, image: Tensor | NDArray[Any], step: int | None = None) -> None:
        """Write a picture: (H, W), (H, W, C) or a tensor (C, H, W), C 1 or 3; uint8, or floats from 0 to 1."""
        self._send_one(name, Image.of(image), step)

    def log_histogram(self, name: str, values: Tensor | NDArray[Any], step: int | None = None, bins: int = 64) -> None:
        """Write the distribution of any numbers."""
        self._send_one(name, Histogram.of(values, bins), step)

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        """Write a text."""
        self._send_one(name, Text(text), step)

    def log_object(self, name: str, value: Any, step: int | None = None) -> None:
        """Write anything that JSON can hold.

        Raises:
            TypeError: JSON cannot hold it.
        """
        json.dumps(value)
        self._send_one(name, Anything(value), step)

    def close(self) -> None:
        """Flush and close every writer."""
        while self._opened:
            writer = self._opened.pop(0)
            self._guarded(writer, writer.close)
        self._off = list(self.writers)

    def state_dict(self) -> dict[str, Any]:
        """What was logged already, and how each writer goes on."""
        states = dict(self._states or {})
        states |= {type(writer).__name__: writer.state_dict() for writer in (*self._opened, *self._off)}
        return {"seen": self._seen, "writers": states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; nothing is touched before there is something to write.

        Writers that are open go on from there too: what they have written since is cut off where that is possible.
        """
        self.close()
        self._off = []
        self._seen, self._states = state_dict["seen"], dict(state_dict["writers"])

    def _now(self, step: int | None) -> tuple[int, int]:
        state = self._engine.state if self._engine is not None else None
        return getattr(state, "optimizer_step", 0) if step is None else step, getattr(state, "epoch", 0)

    def _send_one(self, name: str, item: Media, step: int | None) -> None:
        now, epoch = self._now(step)
        self._send(lambda writer: writer.write_media({name: item}, now, epoch))

    def _send(self, action: Callable[[Writer], None]) -> None:
        for writer in self.writers:
            if writer not in self._off and writer not in self._opened:
                state = (self._states or {}).get(type(writer).__name__)
                self._opened.append(writer)
                self._guarded(writer, partial(writer.open, state))
        for writer in list(self._opened):
            self._guarded(writer, partial(action, writer))

    def _guarded(self, writer: Writer, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service's client raises
            name, reason = type(writer).__name__, " ".join(str(error).split())
            logger.warning("%s failed and is off from now on: %s", name, reason)
            self._opened = [other for other in self._opened if other is not writer]
            self._off.append(writer)
