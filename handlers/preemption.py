"""Stop requests: signals and a time limit end the run at its next checkpoint, with everything saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from ignite.engine import Events

from hjepa_engine.engine import StepEngine, Trainer
from hjepa_engine.errors import ForceQuit, Preempted
from hjepa_engine.events import TrainEvents
from hjepa_engine.utils.distributed import any_rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """End the run on SIGTERM, SIGUSR1, SIGINT or after a time limit: finish the step, save, raise ``Preempted``.

    An accumulation window is completed first. A second SIGINT raises ``ForceQuit`` at once. All ranks stop at the
    same iteration, whichever of them was asked. The former signal handlers are restored when the run ends or is preempted;
    after another error, call :meth:`close`.

    Listens to: ``STARTED``, ``TrainEvents.CHECKPOINT_READY``, ``RUN_FINALIZED``.
    Reads: ``engine.state.epoch_open``; ``engine.state.checkpoint`` and ``engine.state.optimizer_step``, for the message.
    Fires: ``TrainEvents.PREEMPTED``; raises :class:`~hjepa_engine.errors.Preempted`.
    Keys: ``training.time_limit``.

    Args:
        time_limit: minutes from the construction of this handler until the run is ended; None: no limit.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        if time_limit is not None and time_limit <= 0:
            raise ValueError(f"time_limit must be positive or None, got {time_limit}")
        self.time_limit = time_limit
        self.reason: str | None = None
        self._is_interrupted = False
        self._began = time.monotonic()
        self._trainer: Trainer | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer."""
        self._trainer = engine
        engine.add_event_handler(Events.STARTED, self.listen)
        engine.add_event_handler(TrainEvents.CHECKPOINT_READY, self.check)
        engine.add_event_handler(TrainEvents.RUN_FINALIZED, self.finish)

    def watch(self, evaluator: StepEngine) -> None:
        """End long evaluations at an epoch's end too; they run again after the resume."""
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.check_evaluation)

    def listen(self) -> None:
        """Install the signal handlers; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.close()
        for name in SIGNALS:
            self._previous[name] = signal.signal(name, self._on_signal)

    def close(self) -> None:
        """Restore the previous signal handlers."""
        while self._previous:
            name, former = self._previous.popitem()
            signal.signal(name, former)

    def finish(self, engine: Trainer) -> None:
        """Restore the signal handlers; end the run if it was asked to stop after its last checkpoint: a probe may follow."""
        self.close()
        if any_rank(self.reason is not None):
            self._stop()

    def request(self, reason: str) -> None:
        """Ask the run to end at its next checkpoint.

        Args:
            reason: what the message begins with.
        """
        self.reason = self.reason or reason

    def check_evaluation(self) -> None:
        """End the run if it was asked to and nothing is half done: not where an evaluation runs within an iteration."""
        assert self._trainer is not None
        if self._trainer.state.epoch_open:
            self.check()

    def check(self) -> None:
        """End the run if it was asked to."""
        if self.time_limit is not None and time.monotonic() - self._began >= 60 * self.time_limit:
            self.request(f"time limit of {self.time_limit:g} minutes")
        if any_rank(self.reason is not None):
            self._stop()

    def _stop(self) -> NoReturn:
        assert self._trainer is not None
        self._trainer.fire_event(TrainEvents.PREEMPTED)
        reason, self.reason = self.reason or "another process was asked to stop", None
        self.close()
        state = self._trainer.state
        saved = f"saved {state.checkpoint}; " if state.checkpoint else ""
        raise Preempted(f"{reason} at step {state.optimizer_step}: {saved}run the same command again to go on")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        was_interrupted, self._is_interrupted = self._is_interrupted, self._is_interrupted or number == signal.SIGINT
        if was_interrupted and number == signal.SIGINT:
            raise ForceQuit
        if self.reason is not None:
            return
        self.request(name)
        again = " (again: leave at once)" if number == signal.SIGINT else ""
        # Not print(): a signal may come while something else is being printed. Ctrl-C may have ended who reads it.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: finishing the step, then saving{again}\n".encode())
