"""One handle to every logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from ignite.engine import Events
from numpy.typing import NDArray
from torch import Tensor

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents
from hjepa_engine.loggers.base import Writer, check_names, to_float
from hjepa_engine.loggers.group import WriterGroup
from hjepa_engine.loggers.media import Histogram, Image, JsonValue, Media, Text


class MetricsLogger:
    """Write new values of ``engine.state.metrics``, and what lies in ``engine.state.media``, to every writer.

    A value is written once, with the optimizer step at which it was new. A writer that fails is named in one warning
    and dropped: its failure is not the run's. The ``log_...`` methods are for values of your own; what they cannot take
    (a bad name, shape or type) they refuse with a ``ValueError`` or ``TypeError``, and no writer sees it.

    Listens to: ``TrainEvents.LOG_METRICS``, ``COMPLETED``.
    Reads: ``engine.state.metrics``, ``engine.state.media``, ``engine.state.optimizer_step``.
    Writes: ``engine.state.media``, which is empty afterwards.
    Keys: ``logging.*``.

    Args:
        writers: opened when there is something to write; none on ranks other than 0.
    """

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = WriterGroup(writers)
        self._seen = 0
        self._closed = False
        self._engine: StepEngine | None = None

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        self._engine = engine
        for event in (TrainEvents.LOG_METRICS, Events.COMPLETED):
            engine.add_event_handler(event, self.write)

    def write(self, engine: StepEngine) -> None:
        """Write what is new."""
        state = engine.state
        fresh, self._seen = state.metrics.since(self._seen)
        media, state.media = state.media, {}
        for name, item in media.items():
            if not isinstance(item, Media):
                kinds = "an Image, Histogram, Text or JsonValue of hjepa_engine.loggers.media"
                raise TypeError(f"state.media[{name!r}] must be {kinds}, got {type(item).__name__}")
        self._send(fresh, media, state.optimizer_step, state.epoch)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None, prefix: str = "") -> None:
        """Write numbers of your own.

        Args:
            metrics: numbers, or tensors of one, by name; names may be grouped with ``/``.
            step: optimizer step they belong to; the engine's present one by default.
            prefix: put before the names.
        """
        self._log({f"{prefix}{name}": to_float(name, value) for name, value in metrics.items()}, {}, step)

    def log_system_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write numbers of your own under ``system/``."""
        self.log_metrics(metrics, step, "system/")

    def log_image(self, name: str, image: Tensor | NDArray[Any], step: int | None = None) -> None:
        """Write a picture: (H, W), (H, W, C) or a tensor (C, H, W), C 1 or 3; uint8, or floats from 0 to 1."""
        self._log({}, {name: Image.of(image)}, step)

    def log_histogram(self, name: str, values: Tensor | NDArray[Any], step: int | None = None, bins: int = 64) -> None:
        """Write the distribution of any numbers."""
        self._log({}, {name: Histogram.of(values, bins)}, step)

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        """Write a string."""
        self._log({}, {name: Text(text)}, step)

    def log_object(self, name: str, value: Any, step: int | None = None) -> None:
        """Write anything that JSON can hold; tensors and arrays in it become lists."""
        self._log({}, {name: JsonValue(value)}, step)

    def close(self) -> None:
        """Flush and close every writer; nothing can be logged any more."""
        self._closed = True
        self.writers.close()

    def start_new_run(self) -> None:
        """The state is that of another run: writers begin files and service runs of their own."""
        self.writers.load_state_dict({})

    def state_dict(self) -> dict[str, Any]:
        """What was logged already, and how each writer goes on."""
        return {"seen": self._seen, "writers": self.writers.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; no writer is opened before there is something to write."""
        self._seen = state_dict["seen"]
        self.writers.load_state_dict(state_dict["writers"])

    def _log(self, metrics: dict[str, float], media: dict[str, Media], step: int | None) -> None:
        if self._closed:
            raise RuntimeError("the run has ended and its loggers are closed: log before that")
        if step is not None and (not isinstance(step, Integral) or step < 0):
            raise ValueError(f"step must be an integer of at least 0, or None, got {step!r}")
        state = self._engine.state if self._engine is not None else None
        now = getattr(state, "optimizer_step", 0) if step is None else int(step)
        self._send(metrics, media, now, getattr(state, "epoch", 0))

    def _send(self, metrics: dict[str, float], media: dict[str, Media], step: int, epoch: int) -> None:
        check_names([*metrics, *media])
        if not self._closed:
            self.writers.write(metrics, media, step, epoch)
