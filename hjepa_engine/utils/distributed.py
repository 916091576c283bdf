"""Collective operations of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import ignite.distributed as idist
import torch.distributed as dist

Result = TypeVar("Result")


def world_size() -> int:
    """Number of ranks. Ignite's function of that name looks for a launcher first, each time: too slow for every step."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; see :func:`world_size`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is set on any rank. Collective, and small enough for every step."""
    return bool(idist.all_reduce(int(flag), op="MAX")) if world_size() > 1 else flag


def gather_objects(value: Result) -> list[Result]:
    """The small values of all ranks, in their order. Collective."""
    if idist.get_world_size() == 1:
        return [value]
    found: list[Result | None] = [None] * idist.get_world_size()
    dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def rank_zero(action: Callable[[], Result]) -> Result:
    """The result of ``action``, which only rank 0 runs; if it raises, all ranks do. Collective.

    Args:
        action: with a small result.
    """
    if idist.get_world_size() == 1:
        return action()
    answer: list[tuple[Result | None, Exception | None]] = [(None, None)]
    if idist.get_rank() == 0:
        try:
            answer = [(action(), None)]
        except Exception as error:
            answer = [(None, error)]
    dist.broadcast_object_list(answer, src=0)
    result, raised = answer[0]
    if raised is not None:
        raise raised
    return result  # type: ignore[return-value]
