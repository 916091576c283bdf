"""The engine: Ignite's ``Engine`` around a pure step, with the phases of an iteration as events."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sized
from functools import partial
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import nn

from hjepa_engine.events import EVENT_TO_ATTR, TrainEvents
from hjepa_engine.state import TrainState
from hjepa_engine.types import Batch, Handler, Outputs, Stateful, Step
from hjepa_engine.utils.tensors import detach, move_to

AnyEngine = TypeVar("AnyEngine", bound="StepEngine")


class StepEngine(Engine):
    """Ignite's ``Engine`` that runs a :class:`~hjepa_engine.types.Step` on a device, under autocast if asked to.

    ``engine.modules`` and ``engine.device`` are there for handlers.
    """

    state: TrainState

    def __init__(
        self, step: Step, modules: nn.ModuleDict, device: torch.device | str, amp_dtype: torch.dtype | None
    ) -> None:
        super().__init__(self._process)
        self.step, self.modules = step, modules
        self.device, self.amp_dtype = torch.device(device), amp_dtype
        self.state = TrainState()  # Ignite's engine makes its State once, and fills it in at every run
        self.register_events(*TrainEvents, event_to_attr=EVENT_TO_ATTR)

    def attach(self: AnyEngine, *handlers: Handler) -> AnyEngine:
        """Attach each handler by its own ``attach``, in any order; returns the engine.

        Raises:
            TypeError: one of them has no ``attach``, or is a class; none is attached then.
        """
        for handler in handlers:
            if isinstance(handler, type) or not callable(getattr(handler, "attach", None)):
                raise TypeError(f"a handler must be an object with attach(engine), got {handler!r}")
        for handler in handlers:
            handler.attach(self)
        return self

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """As Ignite's, which after an error goes on with a generator that has ended: with no iteration at all."""
        try:
            return super().run(*args, **kwargs)
        except BaseException:
            self._internal_run_generator = None
            raise

    def detach(self, handler: Any) -> None:
        """Take a handler off all events: from the next one on the engine runs as if it had never been attached.

        Args:
            handler: an object whose ``attach`` was called with this engine, or a function that was added to events.

        Raises:
            ValueError: it is not attached. Ranks other than 0, where some handlers attach nothing, leave that to rank 0.
        """
        before = sum(map(len, self._event_handlers.values()))
        for event, entries in self._event_handlers.items():  # lists are replaced: one of them may be running
            self._event_handlers[event] = [entry for entry in entries if _owner(entry[0]) is not handler]
        if sum(map(len, self._event_handlers.values())) == before and idist.get_rank() == 0:
            raise ValueError(f"{type(handler).__name__} is not attached to this engine")

    @abstractmethod
    def _process(self, engine: Engine, batch: Batch) -> Outputs:
        """One iteration; Ignite keeps what it returns as ``state.output``."""

    def _run_step(self, batch: Batch) -> Outputs:
        batch = self.state.batch = move_to(batch, self.device)
        self._fire_event(TrainEvents.FORWARD_STARTED)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.step(self.modules, batch)


def _owner(handler: Any) -> Any:
    """The object whose method an event's handler is, or the function itself."""
    if hasattr(handler, "_parent"):  # Ignite's wrapper around the handler of a filtered event
        handler = handler._parent()
    while isinstance(handler, partial):
        handler = handler.func
    return getattr(handler, "__self__", handler)


class Trainer(StepEngine):
    """See :func:`create_trainer`."""

    _SAVED = ("iteration", "epoch_length", "optimizer_step", "epoch_open")

    def __init__(
        self,
        step: Step,
        modules: nn.ModuleDict,
        device: torch.device | str = "cpu",
        amp_dtype: torch.dtype | None = None,
        log_frequency: int = 50,
    ) -> None:
        if log_frequency < 1:
            raise ValueError(f"log_frequency must be at least 1, got {log_frequency}")
        super().__init__(step, modules, device, amp_dtype)
        self.log_frequency = log_frequency
        self._stepped = self._resumed = False
        self._stateful: list[Stateful] = []
        self.add_event_handler(Events.EPOCH_STARTED, lambda: self.modules.train())

    def add_event_handler(self, event_name: Any, handler: Any, *args: Any, **kwargs: Any) -> Any:
        """As Ignite's; remembers whose handler it is, so that whatever has a state is saved and resumed."""
        owner = _owner(handler)
        if isinstance(owner, Stateful) and owner is not self and not any(owner is known for known in self._stateful):
            self._stateful.append(owner)
        return super().add_event_handler(event_name, handler, *args, **kwargs)

    def detach(self, handler: Any) -> None:
        """As :meth:`StepEngine.detach`; its state is saved no more."""
        super().detach(handler)
        self._stateful = [other for other in self._stateful if other is not handler]

    def stateful_handlers(self) -> dict[str, Stateful]:
        """Attached handlers with ``state_dict`` and ``load_state_dict``, by class name; a second one is ``Name_2``."""
        named: dict[str, Stateful] = {}
        for handler in self._stateful:
            name = type(handler).__name__
            count = sum(type(other).__name__ == name for other in named.values())
            named[f"{name}_{count + 1}" if count else name] = handler
        return named

    def state_dict(self) -> OrderedDict[str, Any]:
        """How far the run is, and its metrics; how long it shall be is up to :meth:`run`."""
        saved = {name: getattr(self.state, name) for name in self._SAVED}
        return OrderedDict(saved, metrics=self.state.metrics.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned: the next :meth:`run` goes on from there."""
        state = self.state
        for name in self._SAVED:
            setattr(state, name, state_dict[name])
        state.epoch = state.iteration // state.epoch_length
        state.metrics.load_state_dict(state_dict["metrics"])
        state.media, state.window_open = {}, False
        self._resumed = True

    def run(
        self,
        data: Iterable[Any] | None = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
    ) -> Any:
        """As Ignite's. A resumed trainer goes on to the length asked for here; if that is reached, it trains no further.

        Raises:
            ValueError: a resumed trainer gets data of another length than it was trained on.
        """
        if not self._resumed:
            return super().run(data, max_epochs, max_iters, epoch_length)
        self._resumed = False
        state = self.state
        length = epoch_length or (len(data) if isinstance(data, Sized) else state.epoch_length)
        if length != state.epoch_length:
            raise ValueError(f"an epoch has {length} batches now and had {state.epoch_length} before the resume")
        state.max_epochs, state.max_iters = max_epochs if max_iters or max_epochs else 1, max_iters
        if not self._is_done(state):
            return super().run(data, max_epochs, max_iters)
        # Ignite would start anew. What follows the last iteration may not have happened yet.
        self._init_timers(state)
        self._fire_event(Events.STARTED)
        self._fire_event(Events.COMPLETED)
        return state

    def _process(self, engine: Engine, batch: Batch) -> Outputs:
        self._stepped = False
        self.state.output = self._run_step(batch)
        self._fire_event(TrainEvents.FORWARD_COMPLETED)
        self._fire_event(TrainEvents.LOSS_READY)
        self._fire_event(TrainEvents.UPDATE_COMPLETED)
        # A live loss would keep the graph, and with it all activations, until the next iteration has replaced it.
        return detach(self.state.output)

    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        """Fire ``event_name``, then what always comes last: order must not depend on who attached first."""
        super()._fire_event(event_name, *event_args, **event_kwargs)
        state = self.state
        if event_name == TrainEvents.OPTIMIZER_STEPPED:
            self._stepped = True
        elif event_name == Events.ITERATION_COMPLETED:
            if self._log_window_ends():
                super()._fire_event(TrainEvents.LOG_INTERVAL_COMPLETED)
                super()._fire_event(TrainEvents.METRICS_READY)
                super()._fire_event(TrainEvents.LOG_METRICS)
            super()._fire_event(TrainEvents.ITERATION_FINALIZED)
            state.epoch_open = state.epoch_length is not None and state.iteration % state.epoch_length == 0
            if not state.window_open:
                super()._fire_event(TrainEvents.CHECKPOINT_READY)
        elif event_name == Events.EPOCH_COMPLETED:
            super()._fire_event(TrainEvents.LOG_METRICS)
            super()._fire_event(TrainEvents.EPOCH_FINALIZED)
            state.epoch_open = False
            super()._fire_event(TrainEvents.CHECKPOINT_READY)
        elif event_name == Events.STARTED:
            if state.iteration == 0:
                super()._fire_event(TrainEvents.LOG_METRICS)
            elif state.epoch_open:
                # Saved behind an epoch's last iteration: its end is still to come.
                self._fire_event(Events.EPOCH_COMPLETED)

    def _log_window_ends(self) -> bool:
        state = self.state
        if self._stepped and state.optimizer_step % self.log_frequency == 0:
            return True
        return state.iteration == state.max_iters or state.iteration % (state.epoch_length or 1) == 0


def create_trainer(
    step: Step,
    modules: nn.ModuleDict,
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
    log_frequency: int = 50,
) -> Trainer:
    """A trainer: an Ignite ``Engine`` that runs ``step`` on every batch and fires :class:`TrainEvents` around it.

    It computes losses and nothing else: attach :class:`~hjepa_engine.handlers.OptimizerStep` and whatever you need.

    Args:
        step: from modules and a batch to a dict of tensors with ``loss``.
        modules: what the step works on, also ``trainer.modules``; put into training mode at every epoch's start.
        device: where batches are moved to; modules must be there already.
        amp_dtype: run the step under autocast with ``torch.bfloat16`` or ``torch.float16``; None: float32.
        log_frequency: optimizer steps of a log interval. The epoch's and the run's last iteration end one too.
    """
    return Trainer(step, modules, device, amp_dtype, log_frequency)
