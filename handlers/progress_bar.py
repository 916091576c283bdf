"""What a person sees while a run goes on."""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from typing import TextIO

import ignite.distributed as idist
from ignite.engine import Events

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents
from hjepa_engine.utils.bars import Bar
from hjepa_engine.utils.eta import TimeRemaining, duration, total_iterations


class ProgressBar:
    """A progress bar over the run, with the time left (:class:`TimeRemaining`), and one line per epoch.

    Where the output is no terminal there is no bar, only the lines. Silent on ranks other than 0.

    Listens to: ``STARTED``, ``EPOCH_STARTED``, ``ITERATION_COMPLETED``, ``COMPLETED``; ``TrainEvents.METRICS_READY`` and
    ``EPOCH_FINALIZED``.
    Reads: ``engine.state.metrics``.
    Keys: ``logging.progress_bar``.

    Args:
        metrics: names shown behind the bar and in the lines, where they exist.
        name: of the run, shown while there is no epoch yet.
        summaries: whether to print a line per epoch.
        stream: where to write to; standard error by default.
    """

    def __init__(
        self,
        metrics: tuple[str, ...] = ("train/loss", "val/loss", "train/lr"),
        *,
        name: str = "pretrain",
        summaries: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.metrics, self.name, self.summaries, self.stream = metrics, name, summaries, stream or sys.stderr
        self._bar = Bar(str, disable=True)  # until a run starts
        self._time = TimeRemaining()
        self._began, self._epoch_began, self._first_iteration = 0.0, 0.0, 0

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        if idist.get_rank() != 0:
            return
        engine.add_event_handler(Events.STARTED, self.open)
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.advance)
        engine.add_event_handler(TrainEvents.METRICS_READY, self.show)
        engine.add_event_handler(TrainEvents.EPOCH_FINALIZED, self.end_epoch)
        engine.add_event_handler(Events.COMPLETED, self.close)

    def open(self, engine: StepEngine) -> None:
        """Show the empty bar."""
        self._bar.close()  # an error has ended the run before
        self._began, self._time = time.monotonic(), TimeRemaining(time.monotonic)
        self._bar = Bar(
            partial(self._left, engine),
            total=None if math.isinf(total := total_iterations(engine.state)) else total,
            initial=engine.state.iteration,
            file=self.stream,
            disable=not self.stream.isatty(),
            desc=self.name,
            dynamic_ncols=True,
            leave=False,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {left} left, {rate_fmt}{postfix}]",
        )

    def start_epoch(self, engine: StepEngine) -> None:
        """Name the epoch."""
        self._epoch_began, self._first_iteration = time.monotonic(), engine.state.iteration
        self._bar.set_description(f"{self.name}, {_epoch(engine)}", refresh=False)

    def advance(self) -> None:
        """One iteration more."""
        self._time.iteration()
        self._bar.update()

    def show(self, engine: StepEngine) -> None:
        """Show the newest values behind the bar."""
        self._bar.set_postfix_str(self._values(engine), refresh=False)

    def end_epoch(self, engine: StepEngine) -> None:
        """One line: values, time of the epoch and of an iteration, time left."""
        self._time.epoch_end()
        if self.summaries:
            seconds = time.monotonic() - self._epoch_began
            per_iteration = 1000 * seconds / max(1, engine.state.iteration - self._first_iteration)
            times = f"{duration(seconds)}, {per_iteration:.0f} ms/it, {self._left(engine)} left"
            self._print(f"{_epoch(engine)}  {self._values(engine)}  {times}")

    def close(self, engine: StepEngine) -> None:
        """Remove the bar, say how long the run took."""
        self._bar.close()
        took = duration(time.monotonic() - self._began)
        count = engine.state.iteration
        self._print(f"{self.name}: {count} iteration{'' if count == 1 else 's'}, {took} in this process")

    def _print(self, line: str) -> None:
        Bar.write(line, file=self.stream)
        self.stream.flush()

    def _left(self, engine: StepEngine) -> str:
        total, done, length = total_iterations(engine.state), engine.state.iteration, engine.state.epoch_length
        if length is None:  # data without a length, in its first epoch
            return "?"
        seconds = self._time.estimate(int(total - done), int(total // length - done // length))
        return "?" if seconds is None else duration(seconds)

    def _values(self, engine: StepEngine) -> str:
        values = engine.state.metrics
        return "  ".join(f"{name} {values[name]:.4g}" for name in self.metrics if name in values)


def _epoch(engine: StepEngine) -> str:
    """The epoch and how many there are, the last of which ``max_iters`` may cut short; ``?`` where that is not known yet."""
    state, number = engine.state, "?"
    if state.max_iters is None:
        number = str(state.max_epochs)
    elif state.epoch_length is not None:
        number = str(math.ceil(state.max_iters / state.epoch_length))
    return f"epoch {state.epoch}/{number}"
