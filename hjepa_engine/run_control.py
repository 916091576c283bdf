"""How a run starts (from its newest checkpoint, from another run's, from the beginning) and how it ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ignite.distributed as idist

from hjepa_engine.checkpoint_writer import CheckpointWriter
from hjepa_engine.checkpoints import Checkpoint, load_one
from hjepa_engine.cli import exit_code_of, one_line
from hjepa_engine.data.loading import worker_failure
from hjepa_engine.engine import Trainer
from hjepa_engine.errors import CheckpointError, ConfigError, DataError, LeaveNow, Preempted
from hjepa_engine.randomness import seed_everything
from hjepa_engine.run_folder import MAY_CHANGE_ELSEWHERE, RunFolder, State, config_changes
from hjepa_engine.training_state import (
    bits_environment,
    changes_of_environment,
    rank_zero,
    restore_state,
    resume,
    take_weights,
)

logger = logging.getLogger(__name__)


def start_run(trainer: Trainer, folder: RunFolder, epoch_length: int, iterations: int) -> None:
    """Put the trainer where ``checkpoint.resume`` and ``checkpoint.init_from`` say, and describe the run in its folder.

    All handlers must be attached. If this raises, the folder is as it was.

    Args:
        trainer: of the run.
        folder: of the run, locked.
        epoch_length: batches of an epoch.
        iterations: length of the whole run.

    Raises:
        CheckpointError: there is no usable checkpoint where one must be, or it does not fit.
        ConfigError: the configuration is another one, or asks for less than was trained already.
        DataError: epochs have another length now.
    """
    found = _find_start(trainer, folder, epoch_length, iterations)
    rank_zero(folder.enter)
    folder.write_status("running", trainer.state.optimizer_step, checkpoint=None if found is None else found.path)


def _find_start(trainer: Trainer, folder: RunFolder, epoch_length: int, iterations: int) -> Checkpoint | None:
    config = folder.config
    how = config.checkpoint.resume
    found: tuple[Checkpoint, list[str]] | None = None
    changes = folder.changes()
    if how != "never":
        folder.refuse(changes)
        found = resume(trainer, folder.checkpoint_path)
        if (
            found is not None and not (folder.path / "config.yaml").exists()
        ):  # say, several runs with one checkpoint_dir
            changes = config_changes(found[0].config, config) if found[0].config else []
            folder.refuse(changes)
        status = folder.status() or {}
        if found is None and status.get("checkpoint") and not _lies_in(status["checkpoint"], how):
            raise CheckpointError(
                f"{folder.checkpoint_path} holds no checkpoint, but {status['checkpoint']} was saved; "
                "--checkpoint.resume never sets the run aside and starts anew"
            )
        if found is None and how == "must":
            raise CheckpointError(f"checkpoint.resume is must, but {folder.checkpoint_path} holds no checkpoint")
        if found is None and how != "auto":
            found = _resume_elsewhere(trainer, folder, Path(how))
            changes = config_changes(found[0].config, config) if found[0].config else []
    if found is None:
        if how != "never" and folder.status() is not None:
            _say(f"no checkpoint yet in {folder.checkpoint_path}: starting from the beginning")
        if config.checkpoint.init_from is not None:
            parts = config.checkpoint.init_parts
            _say(take_weights(trainer.modules, Path(config.checkpoint.init_from), parts))
        if how == "never" and (aside := rank_zero(folder.set_aside)):
            _say(f"starting anew: the earlier run in {folder.path} is in {aside} now")
        seed_everything(config.seed, "start", idist.get_rank())  # for handlers that draw before the first batch
        return None
    checkpoint, remarks = found
    state = trainer.state
    if state.epoch_length != epoch_length:
        raise DataError(
            f"an epoch of the data has {epoch_length} batches, it had {state.epoch_length} when {checkpoint.path} was saved"
        )
    if state.iteration > iterations:
        raise ConfigError(
            f"training.epochs (or max_iters) must leave at least the {state.iteration} iterations that are trained already, "
            f"got {iterations}"
        )
    _say(f"resumed step {state.optimizer_step} (iteration {state.iteration} of {iterations}) from {checkpoint.path}")
    for change in changes:
        follows = "; schedules follow the new length" if change.key == "training.epochs" else ""
        _say(f"  {change}{follows}")
    if idist.get_rank() == 0:
        for difference in changes_of_environment(checkpoint, bits_environment(trainer.device)):
            logger.warning("bits may differ from a run without interruption: %s", difference)
        for remark in remarks:
            logger.warning("%s", remark)
    return checkpoint


@contextmanager
def ending(
    folder: RunFolder, trainer: Trainer, writer: CheckpointWriter, iterations: int
) -> Iterator[dict[str, float]]:
    """Leave in ``status.json`` how the run has ended; if it fails, wait for the checkpoint that is being written.

    Args:
        folder: of the run.
        trainer: of the run.
        writer: of its checkpoints.
        iterations: length of the whole run.

    Yields:
        A dict to put the results into.
    """
    results: dict[str, float] = {}
    try:
        yield results
        reached, step = trainer.state.iteration, trainer.state.optimizer_step
        reason = "trained to the end" if reached == iterations else f"ended after {reached} of {iterations} iterations"
        folder.write_status("done", step, 0, reason, results, trainer.state.checkpoint)
    except BaseException as raised:
        error = worker_failure(raised) or raised
        if not isinstance(error, LeaveNow):
            writer.wait()
        state: State = "preempted" if isinstance(error, Preempted) else "stopped"
        step, code = trainer.state.optimizer_step, exit_code_of(error)
        folder.write_status(state, step, code, one_line(error), checkpoint=writer.newest)
        raise error from (None if error is raised else raised)


def _resume_elsewhere(trainer: Trainer, folder: RunFolder, path: Path) -> tuple[Checkpoint, list[str]]:
    checkpoint, state = load_one(path)
    changes = config_changes(checkpoint.config, folder.config) if checkpoint.config else []
    if refused := [change for change in changes if not change.key.startswith(MAY_CHANGE_ELSEWHERE)]:
        raise ConfigError(
            f"checkpoint.resume {path}: {'; '.join(map(str, refused[:3]))}; checkpoint.init_from takes the weights alone"
        )
    if logger_state := state["handlers"].get("MetricsLogger"):
        logger_state["writers"] = {}  # they tell how the other run's logs go on
    return checkpoint, restore_state(trainer, state)


def _lies_in(checkpoint: str, how: str) -> bool:
    """Whether a run that has not saved yet began at ``checkpoint``, of the other run that ``checkpoint.resume`` names."""
    return how not in ("auto", "must") and Path(how) in (Path(checkpoint), *Path(checkpoint).parents)


def _say(text: str) -> None:
    if idist.get_rank() == 0:
        print(text, flush=True)
