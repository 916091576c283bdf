"""All that this project uses of Ignite's engine and that is private there, under names of its own.

``tests/unit/test_ignite_handlers.py`` notices if a release of Ignite changes one of them, and that no other file uses one.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events


class HookedEngine(Engine):
    """Ignite's ``Engine`` with hooks around its events, and with handlers that can be listed and detached."""

    def __init__(self, process_function: Callable[[Engine, Any], Any]) -> None:
        super().__init__(process_function)
        self._before: dict[str, Callable[[], None]] = {}
        self._after: dict[str, Callable[[], None]] = {}

    def hook(
        self, event: Any, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
    ) -> None:
        """Call ``before`` before the handlers of ``event``, ``after`` after all of them, whenever they were attached.

        An event has one function of each kind.
        """
        if before is not None:
            self._before[event.name] = before
        if after is not None:
            self._after[event.name] = after

    # Everything that fires an event, also Ignite's own loop, comes through here; nothing public runs behind all handlers.
    # An iteration fires more than ten events. Ignite's own method formats a line for its log each time, whether it is
    # written or not, and comparing or hashing an event is Python code of Ignite's: hooks are looked up by its name.
    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        name = getattr(event_name, "_name_", event_name)
        if name in self._before:
            self._before[name]()
        if event_args or event_kwargs or self.logger.isEnabledFor(logging.DEBUG):
            super()._fire_event(event_name, *event_args, **event_kwargs)
        else:
            self.last_event_name = event_name
            for function, args, kwargs in self._event_handlers[event_name]:
                if args and type(args[0]) is weakref.ref:
                    function(self, *args[1:], **kwargs)
                else:
                    function(*args, **kwargs)
        if name in self._after:
            self._after[name]()

    def fire(self, event: Any) -> None:
        """``fire_event`` without its check that the event is registered, which takes longer than the firing."""
        self._fire_event(event)

    # A dict from events to lists of (function, arguments, keywords). Ignite removes a function from an event, but has no way
    # to list handlers, or to take an object off all of its events.
    def handlers(self) -> list[Any]:
        """The objects whose methods are added to events, and the functions that are; each once."""
        owners = [owner_of(entry[0]) for entries in self._event_handlers.values() for entry in entries]
        return list({id(owner): owner for owner in owners if owner is not self}.values())

    def detach(self, handler: Any) -> None:
        """Take a handler off all events: from the next one on the engine runs as if it had never been attached.

        Args:
            handler: an object whose ``attach`` was called with this engine, or a function that was added to events.

        Raises:
            ValueError: it is not attached. Ranks other than 0, where some handlers attach nothing, leave that to rank 0.
        """
        before = sum(map(len, self._event_handlers.values()))
        for event, entries in self._event_handlers.items():  # lists are replaced: one of them may be running
            self._event_handlers[event] = [entry for entry in entries if owner_of(entry[0]) is not handler]
        if sum(map(len, self._event_handlers.values())) == before and idist.get_rank() == 0:
            raise ValueError(f"{type(handler).__name__} is not attached to this engine")

    # The generator of a run that has not ended: one that interrupt() has left, or that an error has broken.
    @property
    def is_interrupted(self) -> bool:
        """Whether :meth:`interrupt` has ended the last :meth:`run`; the next one goes on as if it had not."""
        return self._internal_run_generator is not None

    def drop_interrupted_run(self) -> None:
        """The next :meth:`run` begins with ``STARTED`` and a new pass over the data."""
        self._internal_run_generator = self._dataloader_iter = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """As Ignite's, which after an error goes on with a generator that has ended: with no iteration at all."""
        try:
            return super().run(*args, **kwargs)
        except BaseException:
            self._internal_run_generator = None
            raise
        finally:
            self._has_told_of_error = False

    # Where anything listens to EXCEPTION_RAISED, or a profiler has only looked whether it does, Ignite swallows the error
    # and takes the epoch for complete. Here they are told of it, once, and it is raised.
    _has_told_of_error = False

    def _handle_exception(self, e: BaseException) -> None:
        if not self._has_told_of_error:
            self._has_told_of_error = True
            self._fire_event(Events.EXCEPTION_RAISED, e)
        raise e

    # After terminate_epoch() Ignite begins the next pass at once, before handlers of EPOCH_STARTED have placed the sampler.
    def _setup_dataloader_iter(self) -> None:
        if self.should_terminate_single_epoch:
            self._dataloader_iter = None  # Ignite then makes it behind EPOCH_STARTED
        else:
            super()._setup_dataloader_iter()

    @property
    def is_done(self) -> bool:
        """Whether the run has the length that was asked for; Ignite's ``run`` would start it anew."""
        return self._is_done(self.state)

    def run_no_further(self) -> Any:
        """A run without an iteration: ``STARTED``, then ``COMPLETED``."""
        self._init_timers(self.state)
        self.fire(Events.STARTED)
        self.fire(Events.COMPLETED)
        return self.state


def owner_of(handler: Any) -> Any:
    """The object whose method an event's handler is, or the function itself."""
    while True:
        if isinstance(handler, FunctionType) and hasattr(handler, "_parent"):  # Ignite's wrapper, of a filtered event
            handler = handler._parent()
        elif isinstance(handler, FunctionType) and hasattr(handler, "__wrapped__"):  # HandlersTimeProfiler's
            handler = handler.__wrapped__
        elif isinstance(handler, partial):
            handler = handler.func
        else:
            return getattr(handler, "__self__", handler)
