"""Where metrics are written to: a file of JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import netrc
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Protocol

import ignite.distributed as idist
import PIL.Image

from hjepa_engine.config import Config
from hjepa_engine.config_loading import dump_config, parse_yaml
from hjepa_engine.media import Histogram, Image, Media, Text

logger = logging.getLogger(__name__)

#: Seconds that a run waits for a service when it begins, and again when it ends; leaving it takes one more.
PATIENCE = 9.0
# Records that a service may be behind; a run that goes on for days must not collect them in memory.
_MOST_WAITING = 10_000

WriterState = Mapping[str, Any]


class Writer(Protocol):
    """Takes records of floats; may raise whatever it likes."""

    def open(self, state: WriterState | None) -> None:
        """Called once, before anything else.

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


class JsonlWriter:
    """One JSON object a line: ``step``, ``epoch``, ``time`` (seconds since 1970), then the metrics by name.

    JSON has no NaN or infinity: such a value is ``null``. A resumed run cuts off what was written after its checkpoint, so
    that no record is there twice. What a full disk does not take is kept and written later.

    Args:
        path: the file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._size, self._pending, self._warned = 0, b"", False

    def open(self, state: WriterState | None) -> None:
        """Open the file, cut to the length that it had at the checkpoint; empty for a new run."""
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._size, self._pending = (0, b"") if state is None else (state["bytes"], state["pending"].encode())
        there = os.fstat(self._descriptor).st_size
        if there < self._size:
            logger.warning("%s has lost its end: %d bytes instead of %d", self.path, there, self._size)
            self._size = there
        os.ftruncate(self._descriptor, self._size)
        os.lseek(self._descriptor, 0, os.SEEK_END)

    def write(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Write one line."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._add(values, step, epoch)

    def write_media(self, media: Mapping[str, Media], step: int, epoch: int) -> None:
        """Write one line; images become PNG files in ``media/`` beside the file, the line has their paths."""
        self._add({name: self._plain(name, item, step) for name, item in media.items()}, step, epoch)

    def _plain(self, name: str, item: Media, step: int) -> Any:
        if isinstance(item, Image):
            path = self.path.parent / "media" / f"{name.replace('/', '_')}_{step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            PIL.Image.fromarray(item.pixels).save(path)
            return str(path.relative_to(self.path.parent))
        if isinstance(item, Histogram):
            return {"counts": item.counts, "edges": item.edges, "non_finite": item.non_finite}
        return item.text if isinstance(item, Text) else item.value

    def _add(self, values: Mapping[str, Any], step: int, epoch: int) -> None:
        record = {"step": step, "epoch": epoch, "time": round(time.time(), 3), **values}
        self._pending += (json.dumps(record) + "\n").encode()
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


class TensorBoardWriter:
    """Write event files with tensorboardX.

    Args:
        folder: of the event files; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._step = 0

    def open(self, state: WriterState | None) -> None:
        """Start an event file; TensorBoard then hides what earlier ones hold from behind the checkpoint."""
        from tensorboardX import SummaryWriter

        self._step = 0 if state is None else state["step"]
        purge_step = None if state is None else self._step + 1
        # Files are named by the second: without the step, one of a quick restart could replace the former.
        self._writer = SummaryWriter(str(self.folder), purge_step=purge_step, filename_suffix=f".{self._step}")

    def write(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Write one scalar per metric at ``step``.

        Raises:
            OSError: tensorboardX's writing thread has died (a full disk); another call would wait for it for ever.
        """
        if not self._writer.file_writer.event_writer._worker.is_alive():
            raise OSError("the event file cannot be written to")
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._step = step

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def state_dict(self) -> dict[str, Any]:
        """The last step."""
        return {"step": self._step}


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
        if self.error is None and self._calls.qsize() < _MOST_WAITING:
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

    def open(self, state: WriterState | None) -> None:
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


def build_writers(config: Config, folder: Path, log_folder: Path) -> list[Writer]:
    """The configured writers, to be opened by whoever uses them; none on ranks other than 0.

    Args:
        config: of the run.
        folder: the run folder, for ``metrics.jsonl``.
        log_folder: where ``tensorboard/`` and ``wandb/`` go.
    """
    if idist.get_rank() != 0:
        return []
    options = config.logging
    writers: list[Writer] = [JsonlWriter(folder / "metrics.jsonl")]
    if options.tensorboard.enabled:
        writers.append(TensorBoardWriter(log_folder / "tensorboard"))
    if options.wandb.enabled:
        wandb, plain = options.wandb, parse_yaml(dump_config(config))
        name, tags, mode = options.experiment_name, wandb.tags, wandb.mode
        writers.append(WandbWriter(log_folder, plain, wandb.project, name, wandb.entity, tags, mode))
    return writers
