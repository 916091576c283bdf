"""Where metrics are written to: a file of JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import netrc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import ignite.distributed as idist

from hjepa_engine.config import Config
from hjepa_engine.config_loading import dump_config, parse_yaml


class Writer(Protocol):
    """Takes records of floats; may raise whatever it likes."""

    def write(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Write one record."""

    def close(self) -> None:
        """Flush and release."""


class JsonlWriter:
    """Append one JSON object a line: ``step``, ``epoch``, ``time`` (seconds since 1970), then the metrics by name.

    JSON has no NaN or infinity: such a value is ``null``.

    Args:
        path: the file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8")

    def write(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Write one line and flush it."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        record = {"step": step, "epoch": epoch, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """Write event files with tensorboardX.

    Args:
        folder: of the event files; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Write one scalar per metric at ``step``.

        Raises:
            OSError: tensorboardX's writing thread has died (a full disk); another call would wait for it for ever.
        """
        if not self._writer.file_writer.event_writer._worker.is_alive():
            raise OSError("the event file cannot be written to")
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


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
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        if mode == "auto":
            mode = "online" if _has_wandb_key() else "offline"
        self._run = wandb.init(
            project=project,
            entity=entity,
            name=name,
            tags=list(tags),
            config=dict(config),
            dir=str(folder),
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
        self._run.finish()


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def build_writers(config: Config, folder: Path, log_folder: Path) -> list[Callable[[], Writer]]:
    """What opens each configured writer; nothing on ranks other than 0.

    Args:
        config: of the run.
        folder: the run folder, for ``metrics.jsonl``.
        log_folder: where ``tensorboard/`` and ``wandb/`` go.
    """
    if idist.get_rank() != 0:
        return []
    logging = config.logging
    writers: list[Callable[[], Writer]] = [partial(JsonlWriter, folder / "metrics.jsonl")]
    if logging.tensorboard.enabled:
        writers.append(partial(TensorBoardWriter, log_folder / "tensorboard"))
    if logging.wandb.enabled:
        wandb = logging.wandb
        writers.append(
            partial(
                WandbWriter,
                log_folder,
                parse_yaml(dump_config(config)),
                wandb.project,
                logging.experiment_name,
                wandb.entity,
                wandb.tags,
                wandb.mode,
            )
        )
    return writers
