"""Roll a run back to a checkpoint from before a metric went wrong."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from hjepa_engine.checkpoint.folder import list_checkpoints, prune, write_index
from hjepa_engine.checkpoint.retention import Record
from hjepa_engine.checkpoint.state import load_on_all_ranks, restore_state
from hjepa_engine.checkpoint.storage import Checkpoint, CorruptCheckpoint, read_state
from hjepa_engine.checkpoint.writer import CheckpointWriter
from hjepa_engine.engine import Trainer
from hjepa_engine.errors import CheckpointError, GuardStop, Rollback
from hjepa_engine.handlers import Checkpointer, CollapseGuard
from hjepa_engine.run.other_data import rebase
from hjepa_engine.utils.distributed import rank_zero
from hjepa_engine.utils.sharding import is_sharded

logger = logging.getLogger(__name__)


def train_with_rollbacks(
    train: Callable[[], Any], trainer: Trainer, run_folder: Path, *, guard: CollapseGuard, checkpointer: Checkpointer
) -> None:
    """Call ``train`` until it ends; when the guard asks for it, go back and call it again with lower learning rates.

    Args:
        train: runs the trainer to the end, from wherever it is.
        trainer: of the run, with the guard and the checkpointer attached.
        run_folder: the log as it was before a rollback is kept there, as ``metrics_before_rollback_<n>.jsonl``.
        guard: counts the rollbacks.
        checkpointer: saves once more after each, so that a crash does not forget it.

    Raises:
        GuardStop: there were rollbacks enough, or there is no checkpoint to go back to.
    """
    if guard.rollbacks and idist.get_rank() == 0:
        text = f"  rolled back {guard.rollbacks} times before: learning rates are multiplied by {guard.lr_multiplier:g}"
        print(text, flush=True)
    while True:
        try:
            train()
            return
        except Rollback as request:
            number, left = guard.rollbacks + 1, trainer.state.optimizer_step
            checkpoint = _go_back(trainer, checkpointer, run_folder / "metrics.jsonl", request, number)
            guard.rollbacks = number
            if idist.get_rank() == 0:
                logger.warning(
                    "%s: rolled back from step %d to %s (%d of at most %d), "
                    "learning rates are multiplied by %g from here on",
                    *(request, left, checkpoint.path, number, guard.max_rollbacks, guard.lr_multiplier),
                )
            checkpointer.save(trainer, "rollback")
            rank_zero(partial(_forget_later, checkpointer.writer, checkpoint.record, trainer.state.iteration))


def _go_back(trainer: Trainer, checkpointer: Checkpointer, log: Path, request: Rollback, number: int) -> Checkpoint:
    """Restore the newest checkpoint from before ``request.before``. Collective."""
    writer, epoch_length = checkpointer.writer, trainer.state.epoch_length
    rank_zero(writer.wait)
    mapped = is_sharded(trainer.modules)
    found = load_on_all_ranks(lambda: _newest_before(writer.folder, request.before, checkpointer.data, mapped), mapped)
    if found is None:
        raise GuardStop(f"{request}; {writer.folder} holds no checkpoint from before iteration {request.before}")
    checkpoint, state = found
    rank_zero(lambda: _keep_log(log, number))
    restore_state(trainer, state)
    if trainer.state.epoch_length != epoch_length:  # it is from before the data has grown
        text = rebase(trainer, epoch_length, checkpointer.config["training"]["accumulation_steps"])
        if idist.get_rank() == 0:
            print(f"  {text}", flush=True)
    return checkpoint


def _newest_before(
    folder: Path, iteration: int, data: Mapping[str, Any], mapped: bool
) -> tuple[Checkpoint, Any] | None:
    for checkpoint in list_checkpoints(folder):
        # Inside an epoch of data that has grown since, nothing can go on.
        if checkpoint.record.iteration < iteration and (checkpoint.record.ends_epoch or checkpoint.data == data):
            try:
                return checkpoint, read_state(checkpoint, mapped)
            except (CorruptCheckpoint, OSError) as error:
                logger.warning("checkpoint %s is not usable: %s", checkpoint.path, error)
    return None


def _keep_log(log: Path, number: int) -> None:
    if log.exists():
        try:
            shutil.copyfile(log, log.with_name(f"metrics_before_rollback_{number}.jsonl"))
        except OSError as error:
            logger.warning("%s was not kept as it was before the rollback: %s", log, error.strerror)


def _forget_later(writer: CheckpointWriter, restored: Record, iteration: int) -> None:
    """Remove what was saved after ``restored``, now at ``iteration``: the run must not resume from there after a crash."""
    records = [checkpoint.record for checkpoint in list_checkpoints(writer.folder)]
    # If the data has grown since, iterations of checkpoints from before count shorter epochs than those of the run now.
    here = restored._replace(iteration=iteration)
    later = [
        record
        for record in records
        if record.order > restored.order and (record.epoch, record.order) != (here.epoch, here.order)
    ]
    try:
        prune(writer.folder, [record.name for record in later])
        write_index(writer.folder, [record for record in records if record not in later], writer.policy)
    except OSError as error:
        names = ", ".join(record.name for record in later)
        raise CheckpointError(f"{writer.folder} cannot be rid of {names}, from before a rollback: {error}") from error
