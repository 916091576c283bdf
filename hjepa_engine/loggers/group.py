"""Several writers as one, none of which can end a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from hjepa_engine.loggers.base import Writer
from hjepa_engine.loggers.media import Media

logger = logging.getLogger(__name__)


class WriterGroup:
    """Write to every writer; one that fails is named in one warning and off from then on: its failure is not the run's.

    Args:
        writers: opened when there is something to write.
    """

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = list(writers)
        self._open: list[Writer] = []
        self._off: list[Writer] = []
        self._states: dict[str, Any] = {}

    def write(self, metrics: Mapping[str, float], media: Mapping[str, Media], step: int, epoch: int) -> None:
        """Write one record of each kind, if there is something in it."""
        if not (metrics or media):
            return
        for writer in self.writers:
            if writer in self._off:
                continue
            if writer not in self._open:
                if not self._try(writer, partial(writer.open, self._states.get(self._name(writer)))):
                    continue
                self._open.append(writer)
            if metrics and not self._try(writer, partial(writer.write, metrics, step, epoch)):
                continue
            if media:
                self._try(writer, partial(writer.write_media, media, step, epoch))

    def close(self) -> None:
        """Flush and close every writer; the next record opens them again."""
        for writer in list(self._open):
            self._try(writer, writer.close)
        self._states, self._open = self.state_dict(), []

    def state_dict(self) -> dict[str, Any]:
        """How each writer goes on, by name: one that was never opened, as it would have."""
        return self._states | {self._name(writer): writer.state_dict() for writer in self._open}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; no writer is opened before there is something to write."""
        # In a run that is put back to an earlier checkpoint, writers go on from there; W&B has nothing to put back.
        staying = [writer for writer in self._open if writer.state_dict() == state_dict.get(self._name(writer))]
        self._open = [writer for writer in self._open if writer not in staying]
        self.close()
        self._states, self._open = dict(state_dict), staying

    def _try(self, writer: Writer, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # whatever a service's client raises
            name, reason = type(writer).__name__, " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s failed and is off from now on: %s", name, reason)
            self._states = self.state_dict()
            self._open = [other for other in self._open if other is not writer]
            self._off.append(writer)
            return False
        return True

    def _name(self, writer: Writer) -> str:
        """The writer's class; a second one of the same class is ``Name 2``."""
        alike = [other for other in self.writers if type(other) is type(writer)]
        number = next(i for i, other in enumerate(alike, start=1) if other is writer)
        return type(writer).__name__ if number == 1 else f"{type(writer).__name__} {number}"
