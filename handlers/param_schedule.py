"""Schedules of learning rate, weight decay and momentum, on the optimizer-step clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers import ParamScheduler

from hjepa_engine.engine import StepEngine
from hjepa_engine.events import TrainEvents

Group = dict[str, Any]


class ParamSchedule(ParamScheduler):
    """Ignite's ``ParamScheduler`` that writes ``schedule(optimizer_step)`` into parameter groups.

    The value is a function of the clock, which the engine saves: the schedule has nothing of its own to restore, and a
    resumed run obeys its present configuration.

    Listens to: ``ITERATION_STARTED``.
    Reads: ``engine.state.optimizer_step``.
    Writes: ``param_name`` of the selected groups; where ``metric`` is given, ``engine.state.metrics[metric]`` at the end
    of a log interval, the value of the first selected group (of each level, with ``_level_{l}`` appended).
    Keys: ``training.lr``, ``training.lr_schedule``, ``training.weight_decay``, ``model.ema.schedule``.

    Args:
        optimizer: an optimizer, or anything with ``param_groups`` (``TargetEncoderEMA``).
        param_name: key in the parameter groups.
        schedule: from the optimizer step to a float, or to one float per level (``HierarchicalScheduler``), written to
            the groups whose ``level`` it is.
        select: which groups to write; all of them by default.
        metric: name under which the value is logged; None: not logged.
        scale: gives a factor of every value, asked for at each iteration.
    """

    def __init__(
        self,
        optimizer: Any,
        param_name: str,
        schedule: Callable[[int], float | Sequence[float]],
        *,
        select: Callable[[Group], bool] | None = None,
        metric: str | None = None,
        scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        super().__init__(optimizer, param_name)
        self.schedule, self.select, self.metric = schedule, select or (lambda group: True), metric
        self.scale = scale
        self._state_attrs: list[str] = []

    @property
    def optimizer_param_groups(self) -> list[Group]:
        """The selected groups, looked up anew: loading an optimizer's state replaces its groups."""
        return [group for group in self.optimizer.param_groups if self.select(group)]

    def attach(self, engine: Engine, event: Any = Events.ITERATION_STARTED) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(event, self)
        if self.metric is not None:
            engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.report)

    def __call__(self, engine: Any, name: str | None = None) -> None:
        """Write the value of the coming optimizer step."""
        if engine is not None:
            self.event_index = engine.state.optimizer_step
        value, name = self.get_param(), self.param_name
        for group in self.optimizer.param_groups:
            if self.select(group):
                group[name] = value[group["level"]] if isinstance(value, list) else value

    def get_param(self) -> list[float] | float:
        """The schedule's value at the present optimizer step."""
        value, scale = self.schedule(self.event_index), self.scale()
        if not isinstance(value, float) and isinstance(value, Sequence):
            return [scale * float(item) for item in value]
        return scale * float(value)

    def report(self, engine: StepEngine) -> None:
        """Write the value that the last optimizer step used to the metrics."""
        assert self.metric is not None
        value = self.get_param()
        if isinstance(value, list):
            engine.state.metrics.update({f"{self.metric}_level_{level}": item for level, item in enumerate(value)})
        else:
            engine.state.metrics[self.metric] = value

    @classmethod
    def simulate_values(cls, num_events: int, **scheduler_kwargs: Any) -> list[list[Any]]:
        """``[step, value]`` of ``num_events`` steps, as Ignite's schedulers offer it."""
        schedule = scheduler_kwargs["schedule"]
        return [[step, schedule(step)] for step in range(num_events)]
