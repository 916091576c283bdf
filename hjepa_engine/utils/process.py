"""The process: calls before it exits, and standard streams that may break without ending a run."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

#: Call a function when the process begins to exit. The public ``atexit`` comes later, when threads have been waited for.
before_exit: Callable[[Callable[[], None]], Any] = getattr(threading, "_register_atexit", atexit.register)


class BrokenPipeSafeStream:
    """A text stream that warns once when it cannot be written to, and from then on discards what is written.

    Args:
        stream: the real one.
        name: for the warning.
    """

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name, self._failed = stream, name, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any text stream."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: somebody has closed it
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """As of any text stream."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._failed:
            return
        self._failed = True
        _discard(self._stream)
        reason = getattr(error, "strerror", None) or error
        logger.warning("%s cannot be written to: %s; the run goes on without it", self._name, reason)


def make_streams_safe() -> None:
    """Let no failure of standard output or error, also of closed ones, raise where something is printed."""
    for number, name, text in ((1, "stdout", "standard output"), (2, "stderr", "standard error")):
        stream = getattr(sys, name)
        if (
            stream is None
        ):  # closed when the process began: a file opened later would get its number, and what is printed
            stream = open(os.devnull, "w", encoding="utf-8")
            try:
                os.fstat(number)
            except OSError:
                os.dup2(stream.fileno(), number)
        if not isinstance(stream, BrokenPipeSafeStream):
            setattr(sys, name, BrokenPipeSafeStream(stream, text))


def leave_at_once(code: int) -> NoReturn:
    """End the process with ``code``, its output written and its child processes ended, without what Python does besides.

    While Python ends, threads of other libraries may still free what it no longer has: gloo's then abort the process.
    """
    for child in multiprocessing.active_children():
        child.terminate()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _discard(stream: Any) -> None:
    """Discard what is still in the stream's buffers, and what other code writes to its descriptor."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # not backed by a file
        return
