"""The order of the data: a function of seed and epoch, shared out to ranks, entered anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from hjepa_engine.utils.rng import generator

SampleKey = tuple[int, int]


class EpochBatchSampler(Sampler[list[SampleKey]]):
    """Batches of (epoch, index): a permutation keyed by (seed, epoch), cut into global batches, each shared by the ranks.

    Global batch and order do not depend on the number of ranks: rank r takes the r-th slice of every batch.

    Args:
        size: number of samples in the data set.
        batch_size: samples of a batch over all ranks, a multiple of ``world_size``.
        seed: seed of the run.
        shuffle: False: the data set's own order in every epoch.
        drop_last: leave out the samples behind the last full batch (others in every epoch). If False, the last batch is
            smaller, and on several ranks its rest is left out.
        rank: this process's place among ``world_size``.
        world_size: number of processes.

    Raises:
        ValueError: ``batch_size`` cannot be shared out, or the data set is smaller than one batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size must be a positive multiple of the {world_size} processes, got {batch_size}")
        if size < (batch_size if drop_last else world_size):
            raise ValueError(f"the data must hold at least one batch of {batch_size} images, it holds {size}")
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.drop_last, self.rank, self.world_size = drop_last, rank, world_size
        self._epoch = self._first_batch = 0

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.batch_size)
        return full + (not self.drop_last and rest >= self.world_size)

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Start the next pass at ``batch`` of ``epoch``, both from 0; passes after it start at their first batch."""
        self._epoch, self._first_batch = epoch, batch

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, first = self._epoch, self._first_batch
        self._first_batch = 0
        order = torch.randperm(self.size, generator=generator(self.seed, "order", epoch)) if self.shuffle else None
        for number in range(first, len(self)):
            start = number * self.batch_size
            share = min(self.batch_size, self.size - start) // self.world_size
            mine = range(start + self.rank * share, start + (self.rank + 1) * share)
            indices = list(mine) if order is None else order[mine.start : mine.stop].tolist()
            yield [(epoch, index) for index in indices]
