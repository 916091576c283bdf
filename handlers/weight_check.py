"""Compare the weights of all processes."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from hjepa_engine.engine import Trainer
from hjepa_engine.errors import GuardStop
from hjepa_engine.events import TrainEvents
from hjepa_engine.types import unwrap
from hjepa_engine.utils.distributed import gather_objects, world_size
from hjepa_engine.utils.sharding import is_sharded

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightCheck:
    """End the run when a parameter is not the same on all ranks, which DDP takes for granted and never looks at again.

    A parameter's digest is the sum of its bits as integers: of one rank's memory, a single wrong bit changes it.

    Listens to: ``TrainEvents.OPTIMIZER_STEPPED``, every 50 optimizer steps by default; with one process, and where modules
    are in shards, of which there is one copy only, it does nothing.
    Reads: ``engine.modules``, ``engine.state.optimizer_step``.
    Writes: nothing; raises :class:`~hjepa_engine.errors.GuardStop`.
    Keys: ``distributed.weight_check_every``.

    Args:
        every: optimizer steps between comparisons, at least 1.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(TrainEvents.OPTIMIZER_STEPPED, self.check_if_due)

    def check_if_due(self, engine: Trainer) -> None:
        """Compare the weights every ``every``-th optimizer step."""
        if engine.state.optimizer_step % self.every == 0 and world_size() > 1 and not is_sharded(engine.modules):
            self.check(engine)

    def check(self, engine: Trainer) -> None:
        """Compare the weights now. Collective."""
        parameters = {
            f"{module}.{name}": parameter.detach()
            for module, part in engine.modules.items()
            for name, parameter in unwrap(part).named_parameters()
        }
        digests = torch.stack([bit_sum(parameter) for parameter in parameters.values()])
        extremes = torch.cat([digests, -digests])  # the largest, and minus the smallest, in one operation
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        largest, smallest = extremes.chunk(2)
        differs = largest != -smallest
        if not bool(differs.any()):
            return
        number = int(differs.nonzero()[0])
        held = gather_objects(int(digests[number]))
        usual = Counter(held).most_common(1)[0][0]  # of two ranks, rank 0's
        odd = ", ".join(str(rank) for rank, digest in enumerate(held) if digest != usual)
        step = engine.state.optimizer_step
        raise GuardStop(
            f"weights differ between processes at optimizer step {step}: {list(parameters)[number]} of rank {odd} (of "
            f"{int(differs.sum())} parameters that differ the first); a device may be faulty. Checkpoints from before step "
            f"{max(0, step - self.every)} are sound"
        )


def bit_sum(tensor: Tensor) -> Tensor:
    """The sum () of a tensor's numbers, read as signed integers of their size, modulo 2 ** 64."""
    return tensor.contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)
