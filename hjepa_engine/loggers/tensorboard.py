"""TensorBoard's event files, written with tensorboardX."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_engine.loggers.media import Histogram, Image, Media, Text

# Events that the writing thread may be behind. With tensorboardX's own 10, a run would wait for a thread that has died.
MAX_WAITING = 10_000


class TensorBoardWriter:
    """Write event files.

    Args:
        folder: of the event files; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._step = 0

    def open(self, state: Mapping[str, Any] | None) -> None:
        """Start an event file; TensorBoard then hides what earlier ones hold from behind the checkpoint."""
        from tensorboardX import SummaryWriter

        self._step = 0 if state is None else state["step"]
        purge_step = None if state is None else self._step + 1
        # Files are named by the second: without a suffix, one of a quick restart could replace the former.
        suffix = f".{time.time_ns()}"
        self._writer = SummaryWriter(
            str(self.folder), purge_step=purge_step, max_queue=MAX_WAITING, filename_suffix=suffix
        )

    def write(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Write one scalar per metric at ``step``.

        Raises:
            OSError: tensorboardX's writing thread has died (a full disk).
        """
        for name, value in metrics.items():
            self._alive().add_scalar(name, value, step)
        self._step = max(self._step, step)

    def write_media(self, media: Mapping[str, Media], step: int, epoch: int) -> None:
        """Write images, histograms and texts at ``step``; any other object as a text of JSON.

        Raises:
            OSError: as for :meth:`write`.
        """
        for name, item in media.items():
            writer = self._alive()
            if isinstance(item, Image):
                writer.add_image(name, item.pixels, step, dataformats="HWC")
            elif isinstance(item, Histogram):
                writer.add_histogram_raw(name, **_raw(item), global_step=step)
            elif isinstance(item, Text):
                writer.add_text(name, item.text, step)
            else:
                writer.add_text(name, f"    {json.dumps(item.value)}", step)  # texts are Markdown: indented, it is code
        self._step = max(self._step, step)

    def _alive(self) -> Any:
        events = self._writer.file_writer.event_writer
        if not events._worker.is_alive():
            events._event_queue.cancel_join_thread()  # else the process waits at its exit for what nobody takes
            raise OSError("the event file cannot be written to")
        return self._writer

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def state_dict(self) -> dict[str, Any]:
        """The last step."""
        return {"step": self._step}


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
