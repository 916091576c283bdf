"""A run that meets other data than it was trained on: refused, or gone on with where there only is more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hjepa_engine.checkpoint.storage import Checkpoint
from hjepa_engine.data.contents import DataChange, Description, data_changes
from hjepa_engine.engine import Trainer
from hjepa_engine.errors import DataError


def accepted_changes(
    saved: Mapping[str, Any], now: Description | None, where: str, allow_growth: bool
) -> list[DataChange]:
    """How the data differs from that of a run, if the run may go on with it; empty: not at all, or it is not known.

    Args:
        saved: description of the run's data; may be empty.
        now: description of the data that there is.
        where: what holds the run.
        allow_growth: see ``data.allow_growth``.

    Raises:
        DataError: it may not.
    """
    changes = data_changes(saved, now) if saved and now is not None else []
    if not changes or (allow_growth and all(change.is_growth for change in changes)):
        return changes
    shown = [change for change in changes if not (allow_growth and change.is_growth)]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    hint = "; choose another --run_dir"
    if all(change.is_growth for change in changes):
        hint += ", or --data.allow_growth true to go on with more images"
    raise DataError(f"{where} holds a run with other data: {'; '.join(map(str, shown[:3]))}{more}{hint}")


def refuse_inside_epoch(checkpoint: Checkpoint) -> None:
    """Refuse to go on from a checkpoint with grown data unless it is of an epoch's end.

    Raises:
        DataError: it is not.
    """
    if not checkpoint.record.ends_epoch:
        raise DataError(
            f"data.allow_growth: {checkpoint.path} is inside epoch {checkpoint.record.epoch + 1}, and grown data is gone on "
            "with from an epoch's end alone; train the epoch to its end with the former data, or give another --run_dir and "
            "--checkpoint.resume with a checkpoint of an epoch's end"
        )


def rebase(trainer: Trainer, epoch_length: int, accumulation_steps: int) -> str:
    """Put a restored trainer, at an epoch's end, on the clock of epochs of another length.

    Updates that were skipped still are missing in the optimizer step.

    Args:
        trainer: restored.
        epoch_length: batches of an epoch now.
        accumulation_steps: batches of an optimizer step.

    Returns:
        What changes, in a sentence.
    """
    state = trainer.state
    epoch, step = state.iteration // state.epoch_length, state.optimizer_step
    steps, before = (-(-length // accumulation_steps) for length in (epoch_length, state.epoch_length))
    state.iteration, state.epoch_length = epoch * epoch_length, epoch_length
    state.optimizer_step += epoch * (steps - before)
    return (
        f"epoch {epoch + 1} starts at step {state.optimizer_step} instead of {step}, an epoch has {steps} steps "
        f"instead of {before}; schedules follow"
    )
