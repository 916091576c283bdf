"""How a run starts (from its newest checkpoint, from another run's, from the beginning) and how it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import ignite.distributed as idist

from hjepa_engine.checkpoint.folder import list_checkpoints, load_one
from hjepa_engine.checkpoint.state import (
    load_on_all_ranks,
    restore_state,
    resume,
)
from hjepa_engine.checkpoint.storage import Checkpoint
from hjepa_engine.checkpoint.writer import CheckpointWriter
from hjepa_engine.config.changes import MAY_CHANGE_ELSEWHERE, Change, config_changes
from hjepa_engine.data.workers import translate_worker_error
from hjepa_engine.engine import Trainer
from hjepa_engine.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ForceQuit,
    Preempted,
    exit_code_of,
    one_line,
)
from hjepa_engine.run.environment import reproducibility_changes, reproducibility_info
from hjepa_engine.run.folder import RunFolder
from hjepa_engine.run.other_data import accepted_changes, rebase, refuse_inside_epoch
from hjepa_engine.utils.causes import explain
from hjepa_engine.utils.distributed import rank_zero
from hjepa_engine.utils.rng import seed_everything
from hjepa_engine.utils.sharding import is_sharded

logger = logging.getLogger(__name__)


def start_run(
    trainer: Trainer,
    folder: RunFolder,
    *,
    epoch_length: int,
    iterations: int,
    initialize: Callable[[], str] | None = None,
) -> None:
    """Resume the trainer as ``checkpoint.resume`` says, or initialize it, and describe the run in its folder.

    All handlers must be attached. If this raises, the folder is as it was.

    Args:
        trainer: of the run.
        folder: of the run, locked.
        epoch_length: batches of an epoch.
        iterations: length of the whole run.
        initialize: fills the modules of a run that starts from the beginning, and returns what to say of it; None: they
            stay as they are.

    Raises:
        CheckpointError: there is no usable checkpoint where one must be, or it does not fit.
        ConfigError: the configuration is another one, or asks for less than was trained already.
        DataError: the data is other than before, or epochs have another length now.
    """
    found = _find_start(trainer, folder, epoch_length, iterations, initialize)
    rank_zero(folder.enter)
    own = found.path if found is not None and found.path.parent == folder.checkpoint_path else None
    folder.write_status("running", step=trainer.state.optimizer_step, checkpoint=own)


def _find_start(
    trainer: Trainer, folder: RunFolder, epoch_length: int, iterations: int, initialize: Callable[[], str] | None
) -> Checkpoint | None:
    config = folder.config
    how = config.checkpoint.resume
    found: tuple[Checkpoint, list[str]] | None = None
    changes: list[Change] = []
    if how != "never":
        folder.refuse(folder.changes(), f"run_dir {folder.path}")
        found = resume(trainer, folder.checkpoint_path)
        if found is None:
            found = _resume_elsewhere(trainer, folder, how)
        else:
            _refuse_older(found[0], how)
        if found is not None and found[0].config:
            changes = config_changes(found[0].config, config)
            if found[0].path.parent == folder.checkpoint_path:
                # One folder of checkpoints may have been given to several runs.
                folder.refuse(changes, f"checkpoint.checkpoint_dir {folder.checkpoint_path}")
    if found is None:
        if how != "never" and folder.status() is not None:
            _print_once(f"no checkpoint yet in {folder.checkpoint_path}: starting from the beginning")
        if initialize is not None:
            _print_once(initialize())
        if how == "never":
            idist.barrier()  # everybody has read what is about to move
            if aside := rank_zero(folder.set_aside):
                _print_once(f"starting anew: the earlier run in {folder.path} is in {aside} now")
        seed_everything(config.seed, "start", idist.get_rank())  # for handlers that draw before the first batch
        return None
    checkpoint, remarks = found
    state = trainer.state
    growth = accepted_changes(checkpoint.data, folder.data, str(checkpoint.path), config.data.allow_growth)
    if growth:
        refuse_inside_epoch(checkpoint)
        _print_once(f"the data has grown: {'; '.join(map(str, growth))}")
        _print_once(f"  {rebase(trainer, epoch_length, config.training.accumulation_steps)}")
    if state.epoch_length != epoch_length:
        raise DataError(
            f"an epoch of the data has {epoch_length} batches, it had {state.epoch_length} when {checkpoint.path} was saved"
        )
    if state.iteration > iterations:
        raise ConfigError(
            f"training.epochs (or max_iters) must leave at least the {state.iteration} iterations that are trained already, "
            f"got {iterations}"
        )
    _print_once(
        f"resumed step {state.optimizer_step} (iteration {state.iteration} of {iterations}) from {checkpoint.path}"
    )
    for change in changes:
        follows = "; schedules follow the new length" if change.key == "training.epochs" else ""
        _print_once(f"  {change}{follows}")
    if idist.get_rank() == 0:
        for difference in reproducibility_changes(checkpoint, reproducibility_info(trainer)):
            logger.warning("bits may differ from a run without interruption: %s", difference)
        for remark in remarks:
            logger.warning("%s", remark)
    return checkpoint


@contextmanager
def record_outcome(
    trainer: Trainer, folder: RunFolder, writer: CheckpointWriter, *, iterations: int
) -> Iterator[dict[str, float]]:
    """Write to ``status.json`` how the run ended; if it fails, wait first for the checkpoint being written.

    Args:
        trainer: of the run.
        folder: of the run.
        writer: of its checkpoints.
        iterations: length of the whole run.

    Yields:
        A dict to put the results into.
    """
    results: dict[str, float] = {}
    try:
        yield results
        idist.barrier()  # done is what all processes have done
        now = trainer.state
        ended = f"ended after {now.iteration} of {iterations} iterations"
        folder.write_status(
            "done",
            step=now.optimizer_step,
            exit_code=0,
            reason="trained to the end" if now.iteration == iterations else ended,
            results=results,
            checkpoint=now.checkpoint,
        )
    except BaseException as raised:
        error = (translate_worker_error(raised) if folder.config.data.num_workers else None) or raised
        error = explain(error, folder.cause)
        if not isinstance(error, ForceQuit):
            with suppress(Exception):  # the error at hand counts
                writer.wait()
        code = exit_code_of(error)
        state: Literal["preempted", "stopped"] = "preempted" if code == Preempted.exit_code else "stopped"
        folder.write_status(
            state,
            step=trainer.state.optimizer_step,
            exit_code=code,
            reason=one_line(error),
            checkpoint=writer.newest or _newest_on_disk(writer.folder),
            any_rank=not isinstance(error, Preempted),
        )
        if error is raised:
            raise
        raise error from raised


def _newest_on_disk(folder: Path) -> Path | None:
    """The newest checkpoint, which only rank 0 knows that writes them; None where there is none."""
    if idist.get_rank() == 0:
        return None
    with suppress(Exception):  # the error at hand counts
        return list_checkpoints(folder, lambda path, error: None)[0].path
    return None


def _resume_elsewhere(trainer: Trainer, folder: RunFolder, how: str) -> tuple[Checkpoint, list[str]] | None:
    """Resume where the run's own folder holds no checkpoint: from the one that ``checkpoint.resume`` names, if it does."""
    saved = (folder.status() or {}).get("checkpoint")
    path = None if how in ("auto", "must") else Path(how)
    is_own = saved is not None and path is not None and path.resolve() in (p := Path(saved).resolve(), *p.parents)
    if saved is not None and not is_own:
        raise CheckpointError(
            f"{folder.checkpoint_path} holds no checkpoint, but {saved} was saved; give the former checkpoint_dir or "
            "--checkpoint.resume never, which sets the run aside and starts anew"
        )
    if path is None:
        if how == "must":
            raise CheckpointError(f"checkpoint.resume is must, but {folder.checkpoint_path} holds no checkpoint")
        return None
    mapped = is_sharded(trainer.modules)
    found = load_on_all_ranks(lambda: load_one(path, mapped), mapped)
    assert found is not None
    checkpoint, state = found
    changes = config_changes(checkpoint.config, folder.config) if checkpoint.config else []
    if refused := [change for change in changes if not change.key.startswith(MAY_CHANGE_ELSEWHERE)]:
        raise ConfigError(
            f"checkpoint.resume {path}: {'; '.join(map(str, refused[:3]))}; model.init_from takes the weights alone"
        )
    remarks = restore_state(trainer, state)
    for handler in [] if is_own else trainer.stateful_handlers().values():
        if hasattr(handler, "start_new_run"):
            handler.start_new_run()
    return checkpoint, remarks


def _refuse_older(newest: Checkpoint, how: str) -> None:
    """Refuse an older checkpoint of the same run: the run would go on from its newest one."""
    if how not in ("auto", "must"):
        asked = Path(how).resolve()
        if asked.parent == newest.path.parent.resolve() and asked.name != newest.path.name:
            raise ConfigError(
                f"checkpoint.resume {how} is not the newest checkpoint of this run; to go on from it, give another --run_dir"
            )


def _print_once(text: str) -> None:
    if idist.get_rank() == 0:
        print(text, flush=True)
