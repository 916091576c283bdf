"""What a person sees while a run goes on."""

from __future__ import annotations

import math
import sys
import time
from typing import TextIO

import ignite.distributed as idist
from ignite.engine import Events
from tqdm import tqdm

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents


class ProgressBar:
    """A progress bar over the run, with an estimate of the time left, and one summary line per epoch.

    The estimate knows only this process's own iterations, so that it is right after a resume. Where the output is no
    terminal there is no bar, only the lines. Silent on ranks other than 0.

    Listens to: ``STARTED``, ``EPOCH_STARTED``, ``ITERATION_COMPLETED``, ``TrainEvents.METRICS_READY`` and
    ``EPOCH_COMMITTED``, ``COMPLETED``.
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
        self._bar: tqdm[None] | None = None
        self._run_began = self._epoch_began = 0.0
        self._first_iteration = self._first_epoch_iteration = 0

    def attach(self, engine: StepEngine) -> None:
        """Attach to the trainer."""
        if idist.get_rank() != 0:
            return
        engine.add_event_handler(Events.STARTED, self.open)
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.advance)
        engine.add_event_handler(TrainEvents.METRICS_READY, self.show)
        if self.summaries:
            engine.add_event_handler(TrainEvents.EPOCH_COMMITTED, self.summarise)
        engine.add_event_handler(Events.COMPLETED, self.close)

    def open(self, engine: StepEngine) -> None:
        """Show the empty bar."""
        self._run_began, self._first_iteration = time.monotonic(), engine.state.iteration
        self._bar = tqdm(
            total=total_iterations(engine),
            initial=engine.state.iteration,
            file=self.stream,
            disable=not self.stream.isatty(),
            desc=self.name,
            unit="it",
            dynamic_ncols=True,
            leave=False,
        )

    def start_epoch(self, engine: StepEngine) -> None:
        """Name the epoch."""
        self._epoch_began, self._first_epoch_iteration = time.monotonic(), engine.state.iteration
        if self._bar is not None:
            self._bar.set_description(f"{self.name}, epoch {engine.state.epoch}/{total_epochs(engine)}", refresh=False)

    def advance(self) -> None:
        """One iteration more."""
        if self._bar is not None:
            self._bar.update()

    def show(self, engine: StepEngine) -> None:
        """Show the newest values behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._values(engine), refresh=False)

    def summarise(self, engine: StepEngine) -> None:
        """One line: values, time of the epoch and of a step, time left."""
        state, now = engine.state, time.monotonic()
        done = state.iteration - self._first_iteration
        left = (total_iterations(engine) - state.iteration) * (now - self._run_began) / max(1, done)
        in_epoch = max(1, state.iteration - self._first_epoch_iteration)
        line = (
            f"epoch {state.epoch}/{total_epochs(engine)}  {self._values(engine)}  "
            f"{duration(now - self._epoch_began)}, {1000 * (now - self._epoch_began) / in_epoch:.0f} ms/it, "
            f"{duration(left)} left"
        )
        tqdm.write(line, file=self.stream)
        self.stream.flush()

    def close(self, engine: StepEngine) -> None:
        """Remove the bar, say how long the run took."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elapsed = duration(time.monotonic() - self._run_began)
        tqdm.write(f"{self.name}: {engine.state.iteration} iterations, {elapsed} in this process", file=self.stream)
        self.stream.flush()

    def _values(self, engine: StepEngine) -> str:
        values = engine.state.metrics
        return "  ".join(f"{name} {values[name]:.4g}" for name in self.metrics if name in values)


def total_iterations(engine: StepEngine) -> int:
    """Iterations of the whole run."""
    state = engine.state
    if state.max_iters is not None:
        return state.max_iters
    return state.max_epochs * state.epoch_length


def total_epochs(engine: StepEngine) -> int:
    """Epochs of the whole run, the last of which ``max_iters`` may cut short."""
    return math.ceil(total_iterations(engine) / engine.state.epoch_length)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as people write them.

    >>> duration(5.2), duration(65), duration(3725)
    ('5.2 s', '1:05', '1:02:05')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
