"""Order of the data: a function of seed and epoch, split over ranks, that can start at any batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from hjepa_engine.utils.rng import generator

SampleKey = tuple[int, int]


class EpochBatchSampler(Sampler[list[SampleKey]]):
    """Batches of (epoch, index): a permutation keyed by (seed, epoch), cut into global batches that the ranks split.

    Global batches do not depend on the number of ranks: rank r takes the r-th slice of every batch.

    Args:
        size: number of samples in the dataset.
        batch_size: global batch size over all ranks, a multiple of ``world_size``.
        seed: seed of the run.
        shuffle: a new permutation every epoch; if False, the order of the dataset.
        drop_last: drop the samples after the last full batch. If False, the last batch is smaller, and ranks have shares
            of it that differ by a sample: one may have none.
        rank: rank of this process.
        world_size: number of processes.

    Raises:
        ValueError: ``batch_size`` is not a multiple of ``world_size``, or the dataset is smaller than one batch.
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
            raise ValueError(f"batch_size must be a positive multiple of world_size ({world_size}), got {batch_size}")
        if size < (least := batch_size if drop_last else 1):
            raise ValueError(f"size must be at least {least} samples for one batch, got {size}")
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.drop_last, self.rank, self.world_size = drop_last, rank, world_size
        self._epoch = self._first_batch = 0

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.batch_size)
        return full + (not self.drop_last and rest > 0)

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Start the next pass at ``batch`` of ``epoch``, both from 0; later passes start at batch 0."""
        self._epoch, self._first_batch = epoch, batch

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, first = self._epoch, self._first_batch
        self._first_batch = 0
        order = torch.randperm(self.size, generator=generator(self.seed, "order", epoch)) if self.shuffle else None
        for number in range(first, len(self)):
            start = number * self.batch_size
            share, more = divmod(min(self.batch_size, self.size - start), self.world_size)
            first_idx = start + self.rank * share + min(self.rank, more)
            mine = range(first_idx, first_idx + share + (self.rank < more))
            indices = list(mine) if order is None else order[mine.start : mine.stop].tolist()
            yield [(epoch, index) for index in indices]
