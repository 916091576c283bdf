"""Where metrics are written to: a file of JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import ignite.distributed as idist

from hjepa_engine.config import Config
from hjepa_engine.config_loading import dump_config, parse_yaml

logger = logging.getLogger(__name__)

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
        self._writer = SummaryWriter(str(self.folder), purge_step=None if state is None else self._step + 1)

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


class WandbWriter:
    """Write to a run of Weights & Biases, offline where there is no account.

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

    def open(self, state: WriterState | None) -> None:
        """Start a run of W&B, or go on with the one of the checkpoint."""
        import wandb

        self._id = secrets.token_hex(4) if state is None else state["id"]
        self.folder.mkdir(parents=True, exist_ok=True)
        mode = self.mode
        if mode == "auto":
            mode = "online" if _has_wandb_key() else "offline"
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name,
            tags=self.tags,
            config=self.config,
            dir=str(self.folder),
            id=self._id,
            resume="allow",
            mode=os.environ.get("WANDB_MODE", mode),  # type: ignore[arg-type]
            settings=wandb.Settings(init_timeout=10, silent=True, console="off"),
        )
        # Records carry their step, so that none is dropped for arriving after a later one.
        self._run.define_metric("*", step_metric="step")

    def write(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Log one record."""
        self._run.log({"step": step, "epoch": epoch, **metrics})

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()

    def state_dict(self) -> dict[str, Any]:
        """The run's id."""
        return {"id": self._id}


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
