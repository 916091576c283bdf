"""What a person sees while a run goes on."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

import ignite.distributed as idist
from ignite.engine import Events
from tqdm import tqdm

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents
from hjepa_engine.utils.eta import TimeRemaining, duration, total_iterations


class ProgressBar:
    """A progress bar over the run, with an estimate of the time left, and one summary line per epoch.

    The estimate is :class:`TimeRemaining`'s: it knows this process only, so that it is right after a resume, and
    counts what lies between epochs once it has seen it, and not what follows the last one. Where the output is no terminal
    there is no bar, only the lines. Silent on ranks other than 0.

    Listens to: ``STARTED``, ``EPOCH_STARTED``, ``ITERATION_STARTED`` and ``ITERATION_COMPLETED``, ``COMPLETED``;
    ``TrainEvents.METRICS_READY`` and ``EPOCH_FINALIZED``.
    Reads: ``engine.state.metrics``.

    Args:
        metrics: names shown behind the bar and in the summary, where they exist.
        name: of the run, shown while there is no epoch yet.
        summaries: whether to print a line per epoch.
        stream: where to write to; standard error by default.
    """

    def __init__(
        self,
        metrics: tuple[str, ...] = ("train/loss", "val/loss", "train/lr"),
        name: str = "pretrain",
        summaries: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.metrics, self.name, self.summaries, self.stream = metrics, name, summaries, stream or sys.stderr
        self._bar: _Bar | None = None
        self._pace = TimeRemaining()
        self._run_began = self._epoch_began = 0.0
        self._first_epoch_iteration = 0

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        if idist.get_rank() != 0:
            return
        engine.add_event_handler(Events.STARTED, self.open)
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self.start_iteration)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.advance)
        engine.add_event_handler(TrainEvents.METRICS_READY, self.show)
        engine.add_event_handler(TrainEvents.EPOCH_FINALIZED, self.end_epoch)
        engine.add_event_handler(Events.COMPLETED, self.close)

    def open(self, engine: StepEngine) -> None:
        """Show the empty bar."""
        if self._bar is not None:
            self._bar.close()  # of a run that is put back to an earlier checkpoint
        self._run_began, self._pace = time.monotonic(), TimeRemaining(time.monotonic)
        self._bar = _Bar(
            total=total_iterations(engine.state),
            initial=engine.state.iteration,
            file=self.stream,
            disable=not self.stream.isatty(),
            desc=self.name,
            dynamic_ncols=True,
            leave=False,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {left} left, {rate_fmt}{postfix}]",
        )
        self._bar.left = partial(self._left, engine)

    def start_epoch(self, engine: StepEngine) -> None:
        """Name the epoch."""
        self._epoch_began, self._first_epoch_iteration = time.monotonic(), engine.state.iteration
        if self._bar is not None:
            self._bar.set_description(f"{self.name}, epoch {engine.state.epoch}/{total_epochs(engine)}", refresh=False)

    def start_iteration(self) -> None:
        """The batch is there: an epoch's turn is over."""
        self._pace.batch()

    def advance(self) -> None:
        """One iteration more."""
        self._pace.iteration()
        if self._bar is not None:
            self._bar.update()

    def show(self, engine: StepEngine) -> None:
        """Show the newest values behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._values(engine), refresh=False)

    def end_epoch(self, engine: StepEngine) -> None:
        """One line: values, time of the epoch and of a step, time left."""
        self._pace.epoch()
        if not self.summaries:
            return
        seconds = time.monotonic() - self._epoch_began
        iterations = max(1, engine.state.iteration - self._first_epoch_iteration)
        times = f"{duration(seconds)}, {1000 * seconds / iterations:.0f} ms/it, {self._left(engine)} left"
        line = f"epoch {engine.state.epoch}/{total_epochs(engine)}  {self._values(engine)}  {times}"
        tqdm.write(line, file=self.stream)
        self.stream.flush()

    def close(self, engine: StepEngine) -> None:
        """Remove the bar, say how long the run took."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        times = f"{engine.state.iteration} iterations, {duration(time.monotonic() - self._run_began)} in this process"
        tqdm.write(f"{self.name}: {times}", file=self.stream)
        self.stream.flush()

    def _left(self, engine: StepEngine) -> str:
        total, done, length = total_iterations(engine.state), engine.state.iteration, engine.state.epoch_length
        left = self._pace.left(total - done, total // length - done // length)
        return "?" if left is None else duration(left)

    def _values(self, engine: StepEngine) -> str:
        values = engine.state.metrics
        return "  ".join(f"{name} {values[name]:.4g}" for name in self.metrics if name in values)


class _Bar(tqdm):  # type: ignore[misc]
    """A bar that asks for the time left when it is drawn."""

    left: Callable[[], str] = staticmethod(lambda: "?")

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "left": self.left()}


def total_epochs(engine: StepEngine) -> int:
    """Epochs of the whole run, the last of which ``max_iters`` may cut short."""
    return math.ceil(total_iterations(engine.state) / engine.state.epoch_length)
