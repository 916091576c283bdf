"""Which process ended first, and why: what the others say then, instead of how they noticed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from hjepa_engine.errors import PeerEnded, RunError, exit_code_of, one_line
from hjepa_engine.utils.distributed import rank, world_size

#: Seconds that a process which has lost contact waits for the others to say why.
PATIENCE = 3.0

#: What gloo, whose errors have no class of their own, says of other processes.
_SIGNS = re.compile(
    r"gloo|connection (closed|reset|refused) by peer|pair closure|timed out waiting \d+ms", re.IGNORECASE
)


Store = Any  # torch's, which is not typed
_store: Store | None = None


def share_causes(store: Store | None) -> None:
    """Tell causes to the other processes by ``store``, which all of them reach; None: to nobody."""
    global _store
    _store = store


def explain(error: BaseException, written: Callable[[], PeerEnded | None] = lambda: None) -> BaseException:
    """Why this process must end: ``error``, which the others are told of, unless another process has ended before.

    Where ``error`` says that contact was lost, the cause is another process's; one that has told none within
    :data:`PATIENCE` seconds was killed, has lost its machine, or hangs.

    Args:
        error: that this process raised.
        written: what another process has left behind elsewhere, if it has; the store may be gone with the process it was in.
    """
    if _store is None or isinstance(error, PeerEnded):
        return error
    try:
        if is_lost_contact(error):
            _store.set(f"lost contact/{rank()}", "")
            return _wait(_store, written) or _silent(_store, error)
        _store.compare_set("cause", "", json.dumps([rank(), exit_code_of(error), one_line(error)]))
        _store.set(f"ended/{rank()}", "")
        first = _told(_store)
        return error if first is None or first.exit_code == exit_code_of(error) else first
    except RuntimeError:  # whoever held the store is gone as well
        return (written() or PeerEnded(_lost("rank 0", error))) if is_lost_contact(error) else error


def is_lost_contact(error: BaseException) -> bool:
    """Whether ``error`` is of a collective operation that failed."""
    if isinstance(error, RunError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or _SIGNS.search(str(error)) is not None


def _told(store: Store) -> PeerEnded | None:
    """What another process has told, if it has."""
    if not store.check(["cause"]):
        return None
    number, code, reason = json.loads(store.get("cause"))
    return None if number == rank() else PeerEnded(f"another process ended: rank {number}: {reason}", code)


def _wait(store: Store, written: Callable[[], PeerEnded | None]) -> PeerEnded | None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if told := _told(store) or written():
            return told
        time.sleep(0.02)
    return None


def _silent(store: Store, error: BaseException) -> PeerEnded:
    silent = ", ".join(map(str, _unheard(store)))
    return PeerEnded(_lost(f"rank {silent}" if silent else "the other processes", error))


def _lost(whom: str, error: BaseException) -> str:
    how = str(error).strip().splitlines()[0].rpartition("] ")[2] if str(error).strip() else type(error).__name__
    how = how.partition(". ")[0].removesuffix(".")
    return f"lost contact with {whom} (killed, hanging, or its machine is gone: {how}): run the same command again to go on"


def _unheard(store: Store) -> list[int]:
    """Ranks that have neither ended by themselves nor lost contact."""

    def is_heard(number: int, ways: Iterable[str] = ("ended", "lost contact")) -> bool:
        return any(store.check([f"{way}/{number}"]) for way in ways)

    return [number for number in range(world_size()) if not is_heard(number)]
