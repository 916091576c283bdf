"""Weights & Biases, talked to in a thread, so that a run never waits for it for long."""

from __future__ import annotations

import contextlib
import html
import json
import netrc
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import PIL.Image

from hjepa_engine.loggers.media import Histogram, Image, Media, Text

#: Seconds that a run waits for a service when it begins, and again when it ends; leaving it takes one more.
PATIENCE = 9.0
# Records that a service may be behind; a run that goes on for days must not collect them in memory.
MAX_WAITING = 10_000


class _Queue:
    """Calls of a service, made one after another in a thread of their own, for which a run waits only so long.

    Args:
        name: of the service, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.error: Exception | None = None
        self._calls: SimpleQueue[tuple[Callable[[], None], threading.Event]] = SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def add(self, call: Callable[[], None], wait: bool = False) -> None:
        """Make a call after those before it.

        Args:
            call: to be made.
            wait: until it is done.

        Raises:
            Exception: what an earlier call has raised, or this one if it was waited for.
            TimeoutError: the service takes too long, or takes nothing any more.
        """
        done = threading.Event()
        if self.error is None and self._calls.qsize() < MAX_WAITING:
            self._calls.put((call, done))
            answered = done.wait(PATIENCE) if wait else True
        else:
            answered = False
        if self.error is not None:
            raise self.error
        if not answered:
            raise TimeoutError(f"{self.name} does not answer")

    def _work(self) -> None:
        while self.error is None:
            call, done = self._calls.get()
            try:
                call()
            except Exception as error:  # raised again where somebody hears it
                self.error = error
            done.set()


class WandbWriter:
    """Write to a run of Weights & Biases, offline where there is no account.

    Nothing waits for the service longer than 10 s: it is talked to in a thread.

    Args:
        folder: of the run's files.
        config: the run's configuration.
        project: W&B project.
        name: W&B run name.
        entity: W&B user or team; None: the account's own.
        tags: of the run.
        mode: ``auto``: ``online`` where an API key is found (``WANDB_API_KEY`` or ``~/.netrc``), else ``offline``. The
            environment variable ``WANDB_MODE`` goes before it.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        project: str,
        name: str,
        entity: str | None = None,
        tags: Sequence[str] = (),
        mode: Literal["auto", "online", "offline"] = "auto",
    ) -> None:
        self.folder, self.config, self.project, self.name = folder, dict(config), project, name
        self.entity, self.tags, self.mode = entity, list(tags), mode
        self._run: Any = None
        self._id: str | None = None
        self._queue: _Queue | None = None

    def open(self, state: Mapping[str, Any] | None) -> None:
        """Start a run of W&B, or go on with the one of the checkpoint."""
        import wandb  # here, not in the thread: it takes seconds, and loader processes must not be forked meanwhile

        self._id = (state or {}).get("id") or secrets.token_hex(4)
        self.folder.mkdir(parents=True, exist_ok=True)
        mode = self.mode
        if mode == "auto":
            mode = "online" if _has_wandb_key() else "offline"
        arguments: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "name": self.name,
            "tags": self.tags,
            "config": self.config,
            "dir": str(self.folder),
            "id": self._id,
            "resume": "allow",
            "mode": os.environ.get("WANDB_MODE", mode),
            "settings": wandb.Settings(init_timeout=0.8 * PATIENCE, silent=True, console="off"),
        }

        def start() -> None:
            wandb.setup(wandb.Settings(silent=True))
            self._run = wandb.init(**arguments)
            # Records carry their step, so that none is dropped for arriving after a later one.
            self._run.define_metric("*", step_metric="step")

        self._queue = _Queue("W&B")
        self._call(start, wait=True)

    def write(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Log one record."""
        record = {"step": step, "epoch": epoch, **metrics}
        self._call(lambda: self._run.log(record))

    def write_media(self, media: Mapping[str, Media], step: int, epoch: int) -> None:
        """Log one record of images, histograms, texts (as HTML, which W&B shows) and objects."""

        def log() -> None:
            self._run.log({"step": step, "epoch": epoch, **{name: _of_wandb(item) for name, item in media.items()}})

        self._call(log)

    def close(self) -> None:
        """Finish the run."""
        if self._queue is not None:
            self._call(lambda: self._run.finish(), wait=True)

    def _call(self, call: Callable[[], None], wait: bool = False) -> None:
        assert self._queue is not None
        try:
            self._queue.add(call, wait)
        except Exception:
            _leave_wandb()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The run's id."""
        return {"id": self._id}


def _of_wandb(item: Media) -> Any:
    """What W&B makes of it."""
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
    if isinstance(value, dict):
        return bool(value) and "_type" not in value and all(map(_is_kept, value.values()))
    return True


def _leave_wandb() -> None:
    """Part with a service that has failed: its own exit hook would wait for it for ever, or print a traceback."""
    import wandb

    process: Any = wandb
    for name in ("sdk", "wandb_setup", "_singleton", "_connection", "_proc", "_process"):
        process = getattr(process, name, None)  # no public name leads there; what it has not sent stays in its files

    def leave() -> None:
        with contextlib.suppress(BaseException):  # it may well call sys.exit()
            wandb.teardown(1)

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(1.0)  # it takes the exit hook away before anything that may hang
    if process is not None:
        process.kill()  # a hung one would outlive the run, and hold on to its output


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
