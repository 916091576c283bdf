"""Save checkpoints during a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events

from hjepa_engine.checkpoint.retention import Record, RetentionPolicy
from hjepa_engine.checkpoint.state import flat_state
from hjepa_engine.checkpoint.writer import CheckpointWriter, StateCopy, describe_record
from hjepa_engine.engine import Trainer
from hjepa_engine.errors import CheckpointError
from hjepa_engine.events import TrainEvents
from hjepa_engine.run.environment import reproducibility_info
from hjepa_engine.utils.distributed import rank_zero, world_size
from hjepa_engine.utils.eta import total_iterations


class Checkpointer:
    """Save everything that the run needs to go on with the same bits, and keep what the policy says.

    Training waits while the state, handlers' included, is copied; a thread writes the copy. A failed save is a warning, and
    the next save tries again. :func:`~hjepa_engine.checkpoint.state.resume` loads a checkpoint.

    Listens to: ``STARTED``, ``ITERATION_STARTED``, ``TrainEvents.CHECKPOINT_READY`` and ``PREEMPTED``, ``COMPLETED``.
    Reads: ``engine.state.metrics``, ``engine.state.optimizer_step``, ``engine.state.epoch_open``.
    Writes: ``engine.state.checkpoint``, path of the newest checkpoint, when the run ends or is preempted.
    Keys: ``checkpoint.*``.

    Args:
        folder: of the checkpoints; created if it does not exist.
        policy: which checkpoints to keep.
        metric: a checkpoint's score, if it was new when that was saved.
        every_epochs: save at the end of every N-th epoch, and of the run; None: only of the run.
        every_steps: also save after every N-th optimizer step.
        every_minutes: also save once this many minutes have passed since the last save.
        keep_before: asked at every save for an iteration; the newest checkpoint from before it is kept, whatever the policy
            says. None: no such iteration.
        config: the resolved configuration, for the manifest.
        data: description of the data, for the manifest.
        on_saved: called with path and manifest fields of every checkpoint, in the writing thread.
    """

    def __init__(
        self,
        folder: str | Path,
        policy: RetentionPolicy | None = None,
        *,
        metric: str = "val/loss",
        every_epochs: int | None = 1,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep_before: Callable[[], int | None] = lambda: None,
        config: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        on_saved: Callable[[Path, Mapping[str, Any]], None] | None = None,
    ) -> None:
        for name, value in (("epochs", every_epochs), ("steps", every_steps), ("minutes", every_minutes)):
            if value is not None and value <= 0:
                raise ValueError(f"every_{name} must be positive or None, got {value}")
        self.writer = CheckpointWriter(Path(folder), policy or RetentionPolicy(), on_saved)
        self.metric = metric
        self.config, self.data = (json.loads(json.dumps(dict(each or {}))) for each in (config, data))
        self.every_epochs, self.every_steps, self.every_minutes = every_epochs, every_steps, every_minutes
        self.keep_before = keep_before
        self._open_end: StateCopy | None = None
        self._moment, self._last_step, self._last_save = 0, 0, 0.0
        self._first: int | None = None  # iteration in which ranks compared their clocks first since the last save
        self._next_look = 0

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.prepare)
        engine.add_event_handler(Events.ITERATION_STARTED, self.begin)
        engine.add_event_handler(TrainEvents.CHECKPOINT_READY, self.save_if_due)
        engine.add_event_handler(TrainEvents.PREEMPTED, self.save_now)
        engine.add_event_handler(Events.COMPLETED, self.wait)

    def prepare(self, engine: Trainer) -> None:
        """Prepare the folder, and check now rather than hours later that the state can be saved."""
        flat_state(engine)
        rank_zero(self.writer.prepare)
        self._last_save, self._first, self._next_look = time.monotonic(), None, 0
        self._open_end = self._copy(engine) if engine.state.epoch_open else None

    def begin(self, engine: Trainer) -> None:
        """Metrics written from now on are new."""
        self._moment = engine.state.metrics.moment

    def save_if_due(self, engine: Trainer) -> None:
        """Save if a checkpoint is due."""
        if engine.state.epoch_open and not engine.should_terminate:
            # Handlers of the epoch's end, who may take long, are about to change the state.
            self._open_end = self._copy(engine)
            return
        self._open_end = None
        reasons, self._last_step = self.reasons_to_save(engine), engine.state.optimizer_step
        if reasons:
            self._save(self._copy(engine), reasons)

    def reasons_to_save(self, engine: Trainer) -> list[str]:
        """``epoch``, ``steps``, ``minutes`` or ``end``, whichever are due at this save point; the same on all ranks."""
        state, step = engine.state, engine.state.optimizer_step
        reasons = []
        if self.every_epochs and ends_epoch(state) and state.epoch % self.every_epochs == 0:
            reasons.append("epoch")
        if self.every_steps and step != self._last_step and step % self.every_steps == 0:
            reasons.append("steps")
        if self.every_minutes and self._are_over(60 * self.every_minutes, state.iteration):
            reasons.append("minutes")
        if engine.should_terminate or state.iteration >= total_iterations(state):
            reasons.append("end")
        return reasons

    def _are_over(self, limit: float, iteration: int) -> bool:
        """Whether ``limit`` seconds have passed on any rank since the last save.

        Ranks compare their clocks every 50 iterations, and more often the closer the time has come.
        """
        passed = time.monotonic() - self._last_save
        if world_size() == 1:
            return passed >= limit
        if iteration < self._next_look:
            return False
        self._first = min(self._first or iteration, iteration)
        passed = float(idist.all_reduce(passed, op="MAX"))
        left = (limit - passed) / max(passed, 1e-3) * (iteration - self._first)
        self._next_look = iteration + max(1, min(50, int(left / 2)))
        return passed >= limit

    def save_now(self, engine: Trainer) -> None:
        """Save the preempted run and wait until it is on disk; ``CheckpointError`` if that fails."""
        self._save(self._open_end or self._copy(engine), ["interrupted"])
        self.close()
        self.wait(engine)

    def save(self, engine: Trainer, reason: str) -> None:
        """Save the trainer as it is now, between two runs of it, and wait until that is on disk or has failed.

        Args:
            engine: the trainer.
            reason: one word for the manifest.
        """
        self._open_end = None
        self._save(self._copy(engine), [reason])
        self.wait(engine)

    def wait(self, engine: Trainer) -> None:
        """Wait until the last write has ended or failed."""
        self.writer.wait()
        engine.state.checkpoint = self.writer.newest

    def close(self) -> None:
        """Wait for the last write; ``CheckpointError`` on all ranks if it has failed. Collective."""
        rank_zero(self._check)

    def _check(self) -> None:
        self.writer.wait()
        if self.writer.failure is not None:
            kept = f"the newest one is {self.writer.newest}" if self.writer.newest else "this run has written none"
            raise CheckpointError(f"the last {self.writer.failure}; {kept}")

    def state_dict(self) -> dict[str, int]:
        """Since when metrics are new, and the step of the last save point."""
        return {"moment": self._moment, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore what ``state_dict`` returned."""
        self._moment, self._last_step = state_dict["moment"], state_dict["last_step"]

    def _copy(self, engine: Trainer) -> StateCopy:
        state = engine.state
        epoch = state.iteration // state.epoch_length - state.epoch_open if state.epoch_length else 0
        score = state.metrics.since(self._moment)[0].get(self.metric)
        name = f"epoch_{epoch:04d}_step_{state.optimizer_step:08d}"
        record = Record(name, state.iteration, state.optimizer_step, epoch, ends_epoch(state), score)
        description = describe_record(record, self.metric, state.metrics.since(0)[0])
        description |= {"config": self.config, "data": self.data, "environment": reproducibility_info(engine)}
        structure, tensors = flat_state(engine)
        copy = self.writer.copy(name, structure, tensors, description)
        self.writer.keep_before = self.keep_before()
        return copy

    def _save(self, copy: StateCopy, reasons: list[str]) -> None:
        self._last_save, self._first, self._next_look = time.monotonic(), None, 0
        if idist.get_rank() == 0:
            self.writer.start(copy._replace(description={**copy.description, "reasons": reasons}))


def ends_epoch(state: Any) -> bool:
    """Whether everything that belongs to an epoch's end has happened, and nothing of the next one."""
    return state.ends_epoch and not state.epoch_open
