"""Weights & Biases, called from a thread of its own, so that no run waits for it for long."""

from __future__ import annotations

import contextlib
import html
import json
import netrc
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Full, Queue
from typing import Any, Literal

import numpy as np
import PIL.Image

from hjepa_engine.loggers.media import Histogram, Image, Media, Text

#: Seconds that a run waits for W&B when it starts, and again when it ends; giving it up takes at most one more.
PATIENCE = 9.0
#: Records that W&B may be behind: a run of days must not collect them in memory.
MAX_WAITING = 10_000


class WandbWriter:
    """Write to a run of Weights & Biases, offline where there is no account; nothing waits for it longer than 10 s.

    Args:
        folder: of the run's files.
        mode: ``auto``: ``online`` where an API key is found (``WANDB_API_KEY`` or ``~/.netrc``), else ``offline``. The
            environment variable ``WANDB_MODE`` goes before it.
        **options: arguments of ``wandb.init``: ``project``, ``name``, ``entity``, ``tags``, ``config``, ...
    """

    def __init__(self, *, folder: Path, mode: Literal["auto", "online", "offline"] = "auto", **options: Any) -> None:
        self.folder, self.mode, self.options = folder, mode, options
        self._id: str | None = None
        self._run: Any = None
        self._error: Exception | None = None
        self._calls: Queue[tuple[Callable[[], None], threading.Event] | None] = Queue(MAX_WAITING)

    def open(self, state: Mapping[str, Any] | None) -> None:
        """Start a run of W&B, or go on with the one of the checkpoint."""
        import wandb  # here, not in the thread: it takes seconds, and loader processes must not be forked meanwhile

        self._id = (state or {}).get("id") or secrets.token_hex(4)
        self.folder.mkdir(parents=True, exist_ok=True)
        mode: Any = self.mode if self.mode != "auto" else "online" if _has_api_key() else "offline"
        mode = os.environ.get("WANDB_MODE", mode)
        settings = wandb.Settings(init_timeout=0.8 * PATIENCE, silent=True, console="off")

        def start() -> None:
            wandb.setup(wandb.Settings(silent=True))  # init() alone says that it is logged in
            self._run = wandb.init(
                **self.options, dir=str(self.folder), id=self._id, resume="allow", mode=mode, settings=settings
            )
            # Records carry their step, so that none is dropped for arriving after a later one.
            self._run.define_metric("*", step_metric="step")

        self._calls = Queue(MAX_WAITING)
        threading.Thread(target=self._work, args=(self._calls,), name="W&B", daemon=True).start()
        self._call(start, wait=True)

    def write(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Log one record."""
        record = {"step": step, "epoch": epoch, **metrics}
        self._call(lambda: self._run.log(record))

    def write_media(self, media: Mapping[str, Media], step: int, epoch: int) -> None:
        """Log one record of images, histograms, texts (as HTML, which W&B shows) and objects."""
        self._call(lambda: self._run.log({"step": step, "epoch": epoch, **{k: _convert(v) for k, v in media.items()}}))

    def close(self) -> None:
        """Finish the run."""
        self._call(lambda: self._run.finish(), wait=True)
        self._calls.put(None)

    def state_dict(self) -> dict[str, Any]:
        """The run's id."""
        return {"id": self._id}

    def _call(self, call: Callable[[], None], wait: bool = False) -> None:
        """Let the thread make a call; raise what it, or an earlier one, has raised, or a ``TimeoutError``."""
        done = threading.Event()
        try:
            self._calls.put_nowait((call, done))
            in_time = not wait or done.wait(PATIENCE)
        except Full:
            in_time = False
        error = self._error or (None if in_time else TimeoutError("W&B does not answer"))
        if error is not None:
            _tear_down()
            raise error

    def _work(self, calls: Queue[Any]) -> None:
        for call, done in iter(calls.get, None):
            try:
                if self._error is None:
                    call()
            except Exception as error:  # raised again where somebody hears it
                self._error = error
            done.set()


def _tear_down() -> None:
    """Take away W&B's exit hook: for a service that hangs it waits without end, of one that died it shows a traceback."""
    import wandb

    def tear_down() -> None:
        with contextlib.suppress(BaseException):  # it may call sys.exit()
            wandb.teardown(1)

    thread = threading.Thread(target=tear_down, daemon=True)
    thread.start()
    thread.join(1.0)


def _has_api_key() -> bool:
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return bool(os.environ.get("WANDB_API_KEY")) or any("wandb" in host for host in netrc.netrc().hosts)
    return False


def _convert(item: Media) -> Any:
    """What W&B makes of an item."""
    import wandb

    if isinstance(item, Image):
        return wandb.Image(PIL.Image.fromarray(item.pixels))
    if isinstance(item, Histogram):
        return wandb.Histogram(np_histogram=(np.array(item.counts), np.array(item.edges)))
    if isinstance(item, Text):
        return wandb.Html(f'<pre style="white-space: pre-wrap">{html.escape(item.text)}</pre>')
    return item.value if _is_kept(item.value) else json.dumps(item.value)


def _is_kept(value: Any) -> bool:
    """Whether W&B would log the value whole: it drops empty mappings, and takes those with a ``_type`` for its own."""
    return not isinstance(value, dict) or (bool(value) and "_type" not in value and all(map(_is_kept, value.values())))
