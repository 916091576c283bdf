"""Collective operations of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch import Tensor, nn

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


def gather_samples(samples: Tensor) -> Tensor:
    """The rows (B, ...) of all ranks, in the order of ranks: (sum of all B, ...), with gradients. Collective.

    All ranks must compute the same loss of the result, and average their gradients as DDP does: each then sends back what
    that loss asks of its own rows, times the number of ranks, which the average divides by.

    Args:
        samples: of this rank, (B, ...); B may differ between ranks and be 0.
    """
    return _GatherRows.apply(samples) if world_size() > 1 else samples


def of_rank_zero(tensor: Tensor) -> Tensor:
    """Rank 0's ``tensor``, without gradients; all ranks give one of its shape and type. Collective."""
    if world_size() > 1:
        tensor = tensor.detach().contiguous()
        dist.broadcast(tensor, src=0)
    return tensor


@torch.no_grad()
def take_from_rank_zero(module: nn.Module, device: torch.device) -> None:
    """Give a module rank 0's weights and buffers, by way of ``device``. Collective."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.copy_(of_rank_zero(tensor.to(device)))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, samples: Tensor) -> Tensor:
        own = torch.tensor([len(samples)], device=samples.device)
        counts = [torch.zeros_like(own) for _ in range(world_size())]
        dist.all_gather(counts, own)
        sizes = torch.cat(counts).tolist()
        padded = samples.new_zeros(max(sizes), *samples.shape[1:])
        padded[: len(samples)] = samples
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        first = sum(sizes[: rank()])
        ctx.rows = slice(first, first + len(samples))
        return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0][ctx.rows] * world_size()


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
