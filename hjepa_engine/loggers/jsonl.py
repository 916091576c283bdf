"""``metrics.jsonl``: one JSON object a line."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image

from hjepa_engine.loggers.base import WriterState
from hjepa_engine.loggers.media import Histogram, Image, Media, Text

logger = logging.getLogger(__name__)


class JsonlWriter:
    """One JSON object a line: ``step``, ``epoch``, ``time`` (seconds since 1970), then the metrics by name.

    JSON has no NaN or infinity: such a value is ``null``. A resumed run cuts off what was written after its checkpoint, so
    that no record is there twice. Records that a full disk does not take are kept and written later; images are lost.

    Args:
        path: the file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._size, self._pending, self._warned, self._warned_of_images = 0, b"", False, False

    def open(self, state: WriterState | None) -> None:
        """Open the file, cut to the length that it had at the checkpoint; empty for a new run."""
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._size, self._pending = (0, b"") if state is None else (state["bytes"], state["pending"].encode())
        size = os.fstat(self._descriptor).st_size
        if size < self._size:
            logger.warning("%s has lost its end: %d bytes instead of %d", self.path, size, self._size)
            self._size = size
        os.ftruncate(self._descriptor, self._size)
        os.lseek(self._descriptor, 0, os.SEEK_END)

    def write(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Write one line."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._add(values, step, epoch)

    def write_media(self, media: Mapping[str, Media], step: int, epoch: int) -> None:
        """Write one line; images become PNG files in ``media/`` beside the file, the line has their paths.

        A histogram is ``{"counts": [...], "edges": [...], "non_finite": n}``.
        """
        self._add({name: self._plain(name, item, step) for name, item in media.items()}, step, epoch)

    def _plain(self, name: str, item: Media, step: int) -> Any:
        if isinstance(item, Image) and item.path is not None:
            return os.path.relpath(item.path, self.path.parent)
        if isinstance(item, Image):
            return self._save(f"media/{re.sub(r'[^-.0-9A-Za-z]', '_', name)[:200]}_{step:08d}.png", item)
        if isinstance(item, Histogram):
            return {"counts": item.counts, "edges": item.edges, "non_finite": item.non_finite}
        return item.text if isinstance(item, Text) else item.value

    def _save(self, name: str, image: Image) -> str | None:
        path, png = self.path.parent / name, io.BytesIO()
        PIL.Image.fromarray(image.pixels).save(png, "png")
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(png.getbuffer())
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # half a file
            if not self._warned_of_images:
                logger.warning("%s cannot be written: %s; images are lost as long as that is so", path, error.strerror)
            self._warned_of_images = True
            return None
        self._warned_of_images = False
        return name

    def _add(self, values: Mapping[str, Any], step: int, epoch: int) -> None:
        record = {"step": step, "epoch": epoch, "time": round(time.time(), 3), **values}
        self._pending += (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            self._flush()
        except OSError as error:
            if not self._warned:
                logger.warning("%s cannot be written: %s; every record tries again", self.path, error.strerror)
            self._warned = True

    def _flush(self) -> None:
        assert self._descriptor is not None
        while self._pending:
            written = os.write(self._descriptor, self._pending)
            self._size, self._pending = self._size + written, self._pending[written:]
        self._warned = False

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is None:
            return
        try:
            self._flush()
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    def state_dict(self) -> dict[str, Any]:
        """Length of the file, and what is still to be written."""
        return {"bytes": self._size, "pending": self._pending.decode()}
