"""Loader processes: how they start and end, and what it means when one is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from hjepa_engine.errors import DataError
from hjepa_engine.utils.process import before_exit


def shutdown_workers(*loaders: DataLoader[Any]) -> None:
    """Shut down idle loader workers now: left to the garbage collector, torch takes up to 5 s for each."""
    for loader in loaders:
        loader._iterator = None  # no public way ends the workers of a loader that lives on


def translate_worker_error(error: BaseException) -> DataError | None:
    """Turn the error that a killed loader worker causes in the main process into a DataError; None for other errors."""
    text = str(error)
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        what = " ".join(text.split()).rstrip(".")
    elif isinstance(error, (ConnectionResetError, ConnectionRefusedError, EOFError)):
        what = f"the connection to a DataLoader worker was lost: {text or type(error).__name__}"
    else:
        return None
    hint = "usually memory or /dev/shm ran out: lower data.num_workers, then run the same command again to resume"
    return DataError(f"{what}; {hint}")


def make_worker_init(num_workers: int) -> Callable[[int], None]:
    """Make the ``worker_init_fn`` of a loader: one torch thread, and signals that only the main process handles.

    It can be handed to processes of every start method.
    """
    is_exiting = multiprocessing.RawValue("b", 0)
    if num_workers:
        before_exit(partial(_announce_exit, is_exiting, os.getpid()))
    return partial(_init_worker, is_exiting, os.getpid())


def _announce_exit(is_exiting: Any, process: int) -> None:
    if os.getpid() == process:  # workers inherit this hook and exit too
        is_exiting.value = 1


def _init_worker(is_exiting: Any, main: int, worker: int) -> None:
    """Use one thread, and ignore signals meant for the main process but sent to its whole process group."""
    torch.set_num_threads(1)
    for name in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        # The parent is the main process or, under forkserver, the fork server: it ends with the main process.
        watched = (is_exiting, main, os.getppid())
        threading.Thread(target=_exit_with_main, args=watched, daemon=True).start()


def _exit_with_main(is_exiting: Any, main: int, parent: int) -> None:
    """Exit when the main process sends SIGTERM, is exiting or is gone; ignore SIGTERM from anybody else.

    A pending signal hides later ones of its kind, so the main process's SIGTERM may get lost. That is why its exit is
    checked too: it would wait for this worker forever.
    """
    while os.getppid() == parent and _exists(main) and not is_exiting.value:
        taken = signal.sigtimedwait({signal.SIGTERM}, 0.2)
        if taken is not None and taken.si_pid == main:
            break
    os._exit(0)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
