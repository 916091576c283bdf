"""TensorBoard's event files, written with tensorboardX."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_engine.loggers.media import Histogram, Image, Media, Text

#: Seconds between flushes, each of which waits for the disk.
FLUSH_SECONDS = 30.0


class TensorBoardWriter:
    """Write event files.

    tensorboardX's ``SummaryWriter`` writes in a thread that dies in silence when the disk is full; here the event file is
    written at once, so that whoever logs hears of it.

    Args:
        folder: of the event files; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._events: Any = None
        self._step, self._flushed = 0, 0.0

    def open(self, state: Mapping[str, Any] | None) -> None:
        """Start an event file; TensorBoard then hides what earlier ones hold from behind the checkpoint."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._step = 0 if state is None else state["step"]
        self.folder.mkdir(parents=True, exist_ok=True)
        # Files are named by the second: without a suffix, one of a quick restart could replace the previous one.
        self._events = EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
        if state is not None:
            self._write(self._step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Write one scalar per metric at ``step``."""
        from tensorboardX import summary

        for name, value in metrics.items():
            self._write(step, summary=summary.scalar(name, value))
        self._step = max(self._step, step)

    def write_media(self, media: Mapping[str, Media], step: int, epoch: int) -> None:
        """Write images, histograms and texts at ``step``; any other object as a text of JSON."""
        for name, item in media.items():
            self._write(step, summary=_summary(name, item))
        self._step = max(self._step, step)

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(step=step, wall_time=time.time(), **content))
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the event file."""
        self._events.close()

    def state_dict(self) -> dict[str, Any]:
        """The last step."""
        return {"step": self._step}


def _summary(name: str, item: Media) -> Any:
    from tensorboardX import summary

    if isinstance(item, Image):
        return summary.image(name, item.pixels, dataformats="HWC")
    if isinstance(item, Histogram):
        return summary.histogram_raw(name, **_raw(item))
    if isinstance(item, Text):
        return summary.text(name, item.text)
    return summary.text(name, f"    {json.dumps(item.value)}")  # texts are Markdown: indented, it is code


def _raw(histogram: Histogram) -> dict[str, Any]:
    """What TensorBoard keeps of a histogram; its sums are those of the bins' middles."""
    counts, edges = np.array(histogram.counts, dtype=np.float64), np.array(histogram.edges)
    middles = edges[:-1] / 2 + edges[1:] / 2
    with np.errstate(over="ignore"):
        total, squares = float((counts * middles).sum()), float((counts * middles**2).sum())
    return {
        "min": float(edges[0]),
        "max": float(edges[-1]),
        "num": float(counts.sum()),
        "sum": total,
        "sum_squares": squares,
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": counts.tolist(),
    }
