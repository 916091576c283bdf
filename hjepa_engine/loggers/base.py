"""What a writer is: the protocol that JSON lines, TensorBoard and Weights & Biases follow."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from hjepa_engine.loggers.media import Media

logger = logging.getLogger(__name__)

WriterState = Mapping[str, Any]

#: What every record has besides the values that are logged.
RESERVED = ("step", "epoch", "time")


def check_names(names: Iterable[Any]) -> None:
    """Refuse names that some writer could not take, or would take for something else.

    Raises:
        ValueError: a name is wrong.
    """
    for name in names:
        if not isinstance(name, str) or name in RESERVED or not re.fullmatch(r"[^\W\d_][^\x00-\x1f]*", name):
            raise ValueError(
                f"a logged name must be a string that begins with a letter, and not {', '.join(RESERVED)}, got {name!r}"
            )


def to_float(name: str, value: Any) -> float:
    """A metric as a float.

    Raises:
        ValueError: it cannot be one.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        what = f"{type(value).__name__} {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)[:60]
        raise ValueError(f"metric {name!r} must be a number, or a tensor of one, got {what}") from error


class Writer(Protocol):
    """Takes records of floats, and media; may raise whatever it likes."""

    def open(self, state: WriterState | None) -> None:
        """Called before anything else, and again after :meth:`close` when a run goes back to a checkpoint.

        Args:
            state: what ``state_dict`` returned when the checkpoint was saved that the run goes on from; None: a new run.
        """

    def write(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Write one record."""

    def write_media(self, media: Mapping[str, Media], step: int, epoch: int) -> None:
        """Write images, histograms, texts and objects by name."""

    def close(self) -> None:
        """Flush and release."""

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs to go on."""
