"""Write checkpoints in a background thread, one at a time; an error is kept until it can be handled."""

from __future__ import annotations

import errno
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hjepa_engine.checkpoint.folder import list_checkpoints, prune, sweep, write_index
from hjepa_engine.checkpoint.retention import Record, RetentionPolicy
from hjepa_engine.checkpoint.serialization import Snapshot
from hjepa_engine.checkpoint.storage import write_checkpoint
from hjepa_engine.errors import ConfigError
from hjepa_engine.utils.distributed import rank

logger = logging.getLogger(__name__)


class StateCopy(NamedTuple):
    """A snapshot of the state, which training no longer changes, and the manifest's fields."""

    name: str
    structure: str
    tensors: dict[str, Tensor]
    description: dict[str, Any]


class CheckpointWriter:
    """Write checkpoints to a folder in a background thread, then remove those that the policy does not keep.

    Args:
        folder: of the checkpoints.
        policy: which checkpoints to keep.
        on_saved: called in the writing thread with the path of every new checkpoint and its description.
    """

    def __init__(
        self, folder: Path, policy: RetentionPolicy, on_saved: Callable[[Path, Mapping[str, Any]], None] | None = None
    ) -> None:
        self.folder, self.policy, self.on_saved = folder, policy, on_saved
        self.newest: Path | None = None
        """The newest checkpoint on disk that this process has written."""
        self.failure: str | None = None
        """Why the last save has failed; None if it has not."""
        self.seconds = 0.0
        """How long the last write took."""
        self.keep_before: int | None = None
        """The newest checkpoint from before this iteration is kept too; None: only what the policy keeps."""
        self._snapshot, self._looked = Snapshot(), False
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: Future[None] | None = None

    def prepare(self) -> None:
        """Create the folder and remove temporary files of a process that was killed.

        Raises:
            ConfigError: it cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            (self.folder / ".probe").write_bytes(b"")
            (self.folder / ".probe").unlink()
        except OSError as error:
            raise ConfigError(
                f"checkpoint.checkpoint_dir {self.folder} cannot be written to: {error.strerror}"
            ) from error

    def copy(
        self, name: str, structure: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
    ) -> StateCopy:
        """Copy a state on rank 0, after the previous write, whose memory is reused. Collective where it is in shards."""
        self.wait()
        return StateCopy(name, structure, self._snapshot.take(tensors, keep=rank() == 0), dict(description))

    def start(self, copy: StateCopy) -> None:
        """Start to write a copy, after the previous write."""
        self.wait()
        self._in_flight = self._pool.submit(self._write, copy)

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._in_flight is not None and not self._in_flight.done()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            Exception: what the thread has raised, unless the disk was the reason (see ``failure``).
        """
        if self._in_flight is not None:
            future, self._in_flight = self._in_flight, None
            future.result()

    def _write(self, copy: StateCopy) -> None:
        name, structure, tensors, description = copy
        began = time.perf_counter()
        try:
            if not self.folder.is_dir():  # it was removed during the run
                self.folder.mkdir(parents=True)
            self.newest = self.folder / write_checkpoint(self.folder, name, structure, tensors, description)
        except OSError as error:
            reason = self._explain(copy, error)
            if self.failure is None:
                logger.warning("%s; training goes on, the next save tries again", reason)
            self.failure = reason
            return
        if self.failure is not None:
            logger.warning("checkpoints can be written again: %s is saved", self.newest)
        self.failure = None
        self.seconds = time.perf_counter() - began
        try:
            records = [checkpoint.record for checkpoint in list_checkpoints(self.folder)]
            self._look_for_score(description, records)
            # The newest may lie, in the order of iterations, after some that could not be read when the run began.
            kept = {*self.policy(records), self.newest.name}
            good = [record for record in records if record.iteration < (self.keep_before or 0)]
            kept |= {record.name for record in good[:1]}  # newest first
            prune(self.folder, [record.name for record in records if record.name not in kept])
            write_index(self.folder, [record for record in records if record.name in kept], self.policy)
            if self.on_saved is not None:
                self.on_saved(self.newest, description)
        except OSError as error:  # the checkpoint itself is safe
            logger.warning("checkpoint %s is saved, but not tidied up after: %s", self.newest, error)

    def _look_for_score(self, description: Mapping[str, Any], records: Sequence[Record]) -> None:
        """Warn that the metric for the best checkpoint is missing after the first epoch, or was never new at a save."""
        metric, metrics = description["metric"], description["metrics"]
        if not self.policy.keep_best_n:
            return
        if description["ends_epoch"] and not self._looked:
            self._looked = True
            if metric not in metrics:
                known = ", ".join(sorted(metrics)) or "none"
                logger.warning(
                    "checkpoint.metric %s has no finite value: no checkpoint counts as best; known: %s", metric, known
                )
        if "end" in description["reasons"] and metric in metrics and all(record.score is None for record in records):
            logger.warning("checkpoint.metric %s was new at no save: no checkpoint counts as best", metric)

    def _explain(self, copy: StateCopy, error: OSError) -> str:
        text = f"checkpoint {self.folder / copy.name} cannot be written: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            need = sum(tensor.numel() * tensor.element_size() for tensor in copy.tensors.values()) / 1e6
            text += f" (it needs {need:.1f} MB, {shutil.disk_usage(self.folder).free / 1e6:.1f} MB are free)"
        return text


def describe_record(record: Record, metric: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Fields of a manifest, but for ``reasons``, ``config`` and ``environment``; what is not finite is left out."""
    score = record.score if record.score is not None and math.isfinite(record.score) else None
    return {
        **{name: value for name, value in record._asdict().items() if name != "name"},
        "score": score,
        "metric": metric,
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "saved_at": round(time.time(), 3),
    }
