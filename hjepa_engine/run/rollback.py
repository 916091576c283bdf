"""Going back to a checkpoint from before something went wrong."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from hjepa_engine.checkpoint.folder import list_checkpoints, prune, write_index
from hjepa_engine.checkpoint.state import load_on_all_ranks, restore_state
from hjepa_engine.checkpoint.storage import Checkpoint, CorruptCheckpoint, read_state
from hjepa_engine.checkpoint.writer import CheckpointWriter
from hjepa_engine.config.monitoring import GuardConfig
from hjepa_engine.engine import Trainer
from hjepa_engine.errors import CheckpointError, GuardStop, Rollback
from hjepa_engine.run.folder import RunFolder
from hjepa_engine.utils.distributed import rank_zero

logger = logging.getLogger(__name__)


def train_with_rollbacks(
    train: Callable[[], Any],
    save: Callable[[], None],
    trainer: Trainer,
    writer: CheckpointWriter,
    options: GuardConfig,
    folder: RunFolder,
) -> None:
    """Call ``train`` until it ends; when a guard asks for it, go back and call it again with a lower learning rate.

    Args:
        train: runs the trainer to the end, from wherever it is.
        save: saves a checkpoint now, so that a crash does not forget the rollback.
        trainer: of the run.
        writer: of its checkpoints.
        options: factor of the learning rate, and how often.
        folder: of the run; the log as it was is kept there, as ``metrics_before_rollback_<n>.jsonl``.

    Raises:
        GuardStop: there were rollbacks enough, or there is no checkpoint to go back to.
    """
    while True:
        try:
            train()
            return
        except Rollback as request:
            roll_back(trainer, writer, options, folder.path, request)
            save()
            rank_zero(lambda: _forget_later(writer, trainer.state.iteration))


def roll_back(
    trainer: Trainer, writer: CheckpointWriter, options: GuardConfig, run_folder: Path, request: Rollback
) -> None:
    """Put the trainer back to the newest checkpoint from before ``request.before``. Collective."""
    past, lr_scale = trainer.state.rollbacks, trainer.state.lr_scale
    if past >= options.max_rollbacks:
        raise GuardStop(f"{request}; the run was rolled back {past} times already")
    rank_zero(writer.wait)
    found = load_on_all_ranks(lambda: _newest_before(writer.folder, request.before))
    if found is None:
        raise GuardStop(f"{request}; {writer.folder} holds no checkpoint from before iteration {request.before}")
    checkpoint, state = found
    left = trainer.state.optimizer_step
    rank_zero(lambda: _keep_log(run_folder, past + 1))
    restore_state(trainer, state)
    trainer.state.rollbacks, trainer.state.lr_scale = past + 1, lr_scale * options.lr_factor
    if idist.get_rank() == 0:
        logger.warning(
            "%s: rolled back from step %d to %s (%d of at most %d), learning rates are multiplied by %g from here on",
            *(request, left, checkpoint.path, past + 1, options.max_rollbacks, trainer.state.lr_scale),
        )


def _newest_before(folder: Path, iteration: int) -> tuple[Checkpoint, Any] | None:
    for checkpoint in list_checkpoints(folder):
        if checkpoint.record.iteration < iteration:
            try:
                return checkpoint, read_state(checkpoint)
            except (CorruptCheckpoint, OSError) as error:
                logger.warning("checkpoint %s is not usable: %s", checkpoint.path, error)
    return None


def _keep_log(run_folder: Path, number: int) -> None:
    log = run_folder / "metrics.jsonl"
    if log.exists():
        try:
            shutil.copyfile(log, run_folder / f"metrics_before_rollback_{number}.jsonl")
        except OSError as error:
            logger.warning("%s was not kept as it was before the rollback: %s", log, error.strerror)


def _forget_later(writer: CheckpointWriter, iteration: int) -> None:
    """Remove what was saved behind ``iteration``: the run must not go on from there after a crash."""
    records = [checkpoint.record for checkpoint in list_checkpoints(writer.folder)]
    later = [record for record in records if record.iteration > iteration]
    try:
        prune(writer.folder, [record.name for record in later])
        write_index(writer.folder, [record for record in records if record not in later], writer.policy)
    except OSError as error:
        names = ", ".join(record.name for record in later)
        raise CheckpointError(f"{writer.folder} cannot be rid of {names}, from before a rollback: {error}") from error
