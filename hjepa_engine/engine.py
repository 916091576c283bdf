"""The engine: Ignite's ``Engine`` around a pure step, with the phases of an iteration as events."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from ignite.engine import Engine, Events
from torch import nn

from hjepa_engine.errors import DataError
from hjepa_engine.events import EVENT_TO_ATTR, TrainEvents
from hjepa_engine.state import TrainState
from hjepa_engine.types import Batch, Handler, Outputs, Stateful, Step
from hjepa_engine.utils.ignite_private import HookedEngine, owner_of
from hjepa_engine.utils.tensors import detach, move_to

AnyEngine = TypeVar("AnyEngine", bound="StepEngine")


class StepEngine(HookedEngine):
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

    @abstractmethod
    def _process(self, engine: Engine, batch: Batch) -> Outputs:
        """One iteration; Ignite keeps what it returns as ``state.output``."""

    def _run_step(self, batch: Batch) -> Outputs:
        batch = self.state.batch = move_to(batch, self.device)
        self.fire(TrainEvents.FORWARD_STARTED)
        self.state.output = None  # the last iteration's tensors: memory that this step needs
        if self.amp_dtype is None and not torch.is_autocast_enabled(self.device.type):
            return self.step(self.modules, batch)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.step(self.modules, batch)


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
        self._stepped = self._resumed = self._interval_open = False
        self._iterations_before = 0
        self._stateful: list[Stateful] = []
        # What comes first or last at an event: order must not depend on who attached first.
        self.hook(Events.STARTED, before=self._forget_finished_run, after=self._complete_start)
        self.hook(Events.ITERATION_COMPLETED, after=self._finalize_iteration)
        self.hook(Events.TERMINATE_SINGLE_EPOCH, after=self._skip_rest_of_epoch)
        self.hook(Events.EPOCH_COMPLETED, before=self._complete_epoch, after=self._finalize_epoch)
        self.hook(Events.COMPLETED, after=lambda: self.fire(TrainEvents.RUN_FINALIZED))
        self.hook(TrainEvents.OPTIMIZER_STEPPED, after=self._note_step)
        self.add_event_handler(Events.EPOCH_STARTED, lambda: self.modules.train())

    def add_event_handler(self, event_name: Any, handler: Any, *args: Any, **kwargs: Any) -> Any:
        """As Ignite's; remembers whose handler it is, so that whatever has a state is saved and resumed."""
        owner = owner_of(handler)
        if isinstance(owner, Stateful) and owner is not self and not any(owner is known for known in self._stateful):
            self._stateful.append(owner)
        return super().add_event_handler(event_name, handler, *args, **kwargs)

    def remove_event_handler(self, handler: Any, event_name: Any) -> None:
        """As Ignite's, which also ``remove()`` of an event's handle calls; a handler without events is saved no more."""
        super().remove_event_handler(handler, event_name)
        attached = self.handlers()
        self._stateful = [known for known in self._stateful if any(known is other for other in attached)]

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
        """How far the run is, its metrics and ``state_dict_user_keys``; how long it shall be is up to :meth:`run`."""
        saved = {name: getattr(self.state, name) for name in (*self._SAVED, *self.state_dict_user_keys)}
        return OrderedDict(saved, metrics=self.state.metrics.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned: the next :meth:`run` goes on from there.

        Raises:
            ValueError: it lacks one of ``state_dict_user_keys``; nothing has changed then.
        """
        state = self.state
        if missing := [name for name in self.state_dict_user_keys if name not in state_dict]:
            raise ValueError(f"the state lacks {', '.join(missing)}, of the trainer's state_dict_user_keys")
        for name in (*self._SAVED, *self.state_dict_user_keys):
            setattr(state, name, state_dict[name])
        state.epoch = state.iteration // state.epoch_length if state.epoch_length else 0
        state.metrics.load_state_dict(state_dict["metrics"])
        state.media, state.window_open = {}, False
        self._resumed = True
        self.drop_interrupted_run()

    def run(
        self,
        data: Iterable[Any] | None = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
    ) -> Any:
        """As Ignite's, and every run goes on where the last one has left off: also inside an epoch.

        ``data`` then has to begin there, see :class:`~hjepa_engine.handlers.DataPosition`. A trainer that was loaded with a
        state goes on to the length asked for here; if that is reached, it trains no further. A finished one goes on if more
        is asked for. Otherwise it starts anew, as Ignite's does, with ``optimizer_step`` and metrics too; modules, optimizer
        and handlers stay as they are.

        Raises:
            ValueError: a trainer that goes on gets data of another length than before, or stopped in a first epoch whose
                length was not known yet.
            DataError: there is no data, or it ends inside an epoch and cannot be read again.
        """
        state = self.state
        if self.is_interrupted:
            return super().run(data, max_epochs, max_iters, epoch_length)
        self._iterations_before, resumed, self._resumed = state.iteration, self._resumed, False
        if state.iteration == 0:
            if resumed:
                state.max_epochs = state.max_iters = None
            return super().run(data, max_epochs, max_iters, epoch_length)
        if state.epoch_length is None and epoch_length is None:
            raise ValueError(
                f"to go on at iteration {state.iteration} of the first epoch, run() needs its epoch_length"
            )
        if state.epoch_length is None:
            state.epoch_length = epoch_length
        state.epoch = state.iteration // state.epoch_length
        self.should_terminate = False  # else Ignite would take up the epoch at its beginning
        if not resumed:
            if state.max_iters is not None:
                state.max_epochs = None  # Ignite has set it when it had counted an epoch
            return super().run(data, max_epochs, max_iters, epoch_length)
        length = epoch_length or _length_of(data) or state.epoch_length
        if length != state.epoch_length:
            raise ValueError(f"an epoch has {length} batches now and had {state.epoch_length} before the resume")
        state.max_epochs, state.max_iters = max_epochs if max_iters or max_epochs else 1, max_iters
        # What follows the last iteration may not have happened yet.
        return self.run_no_further() if self.is_done else super().run(data, max_epochs, max_iters)

    def _process(self, engine: Engine, batch: Batch) -> Outputs:
        self._stepped = False
        self.state.output = self._run_step(batch)
        self.fire(TrainEvents.FORWARD_COMPLETED)
        self.fire(TrainEvents.LOSS_READY)
        self.fire(TrainEvents.UPDATE_COMPLETED)
        # A live loss would keep the graph, and with it all activations, until the next iteration has replaced it.
        return detach(self.state.output)

    def _forget_finished_run(self) -> None:
        """What Ignite does not put back when it starts a finished run anew."""
        state = self.state
        if not state.iteration == 0 < self._iterations_before:
            return
        state.optimizer_step = state.skipped_updates = 0
        state.window_open = state.epoch_open = False
        state.metrics.clear()
        state.media.clear()

    def _complete_start(self) -> None:
        if self.state.iteration == 0:
            self.fire(TrainEvents.LOG_METRICS)
        elif self.state.epoch_open:  # saved behind an epoch's last iteration: its end is still to come
            self.fire(Events.EPOCH_COMPLETED)

    def _note_step(self) -> None:
        self._stepped = True

    def _finalize_epoch(self) -> None:
        self.fire(TrainEvents.LOG_METRICS)
        self.fire(TrainEvents.EPOCH_FINALIZED)
        self.state.epoch_open = False
        self.fire(TrainEvents.CHECKPOINT_READY)

    def _finalize_iteration(self) -> None:
        state, self._interval_open = self.state, True
        self._skip_rest_of_epoch()
        ends_interval = self._stepped and state.optimizer_step % self.log_frequency == 0
        if ends_interval or state.iteration == state.max_iters or state.ends_epoch:
            self._end_log_interval()
        self.fire(TrainEvents.ITERATION_FINALIZED)
        self._skip_rest_of_epoch()
        state.epoch_open = state.ends_epoch and self.should_terminate_single_epoch != "skip_epoch_completed"
        if not state.window_open:
            self.fire(TrainEvents.CHECKPOINT_READY)

    def _end_log_interval(self) -> None:
        self._interval_open = False
        self.fire(TrainEvents.LOG_INTERVAL_COMPLETED)
        self.fire(TrainEvents.METRICS_READY)
        self.fire(TrainEvents.LOG_METRICS)

    def _skip_rest_of_epoch(self) -> None:
        """After ``terminate_epoch()``, count its batches as if they had been read: epochs stay at multiples of a length."""
        state = self.state
        if not self.should_terminate_single_epoch:
            return
        if state.epoch_length is None:
            raise ValueError("terminate_epoch() needs the length of an epoch: give run() its epoch_length")
        end = state.epoch * state.epoch_length
        state.iteration = end if state.max_iters is None else min(end, state.max_iters)
        state.window_open = False  # its gradients are dropped when the next one begins

    def _complete_epoch(self) -> None:
        """Refuse an epoch that is none; end the log interval where only now is known that the epoch is over."""
        state = self.state
        if not state.iteration:
            raise DataError("the data has no batches")
        if state.iteration != state.epoch * state.epoch_length and not self.should_terminate_single_epoch:
            raise DataError(
                f"the data ended after iteration {state.iteration}, inside epoch {state.epoch} of "
                f"{state.epoch_length} batches, and cannot be read again"
            )
        if self._interval_open:
            self._end_log_interval()


def _length_of(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # a generator, or a loader of a data set without a length
        return None


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
