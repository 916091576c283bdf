"""A fixed subset of images in memory, for monitors that measure the same images again and again."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.loading import KeyedDataset, collate, make_worker_init, resize_and_crop
from hjepa_engine.data.split import DatasetSplit
from hjepa_engine.utils.rng import derive_seed, preserve_rng_state


class FixedImageSubset:
    """A random sample from each of ``count`` equal segments of a split, with evaluation transforms, kept as uint8.

    Images are read at first use and normalized on every pass. The global random generators are left as they were.

    Iterating yields batches with ``images`` (B, C, H, W), normalized, and ``labels`` (B,).

    Args:
        config: the data section.
        split: the split to choose from.
        count: number of images over all ranks; at least one per rank, at most all there are.
        batch_size: B; the last batch may be smaller.
        seed: seed of the choice, and of datasets that generate their samples (digit pages).
        rank: this process's rank; it holds every ``world_size``-th image.
        world_size: number of processes.
    """

    def __init__(
        self,
        config: DataConfig,
        split: DatasetSplit,
        count: int,
        batch_size: int = 256,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.config, self.split, self.batch_size, self.seed = config, split, batch_size, seed
        total = len(split.images)
        count = min(max(count, world_size), total)  # a rank without images would block the others
        starts = [number * total // count for number in range(count + 1)]
        # A random sample, not the first: with cyclic labels (digit pages), firsts would cover few classes.
        drawn = [a + derive_seed(seed, "image set", a) % (b - a) for a, b in pairwise(starts)]
        self.indices = drawn[rank::world_size]
        self._images: Tensor | None = None
        self._labels: Tensor | None = None

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def load(self) -> None:
        """Read the images, unless they are in memory already."""
        if self._images is None:
            dataset = KeyedDataset(self.split, resize_and_crop(self.config), self.seed)
            workers = self.config.num_workers if len(self.indices) > 1000 else 0
            keys = [(0, index) for index in self.indices]
            loader: DataLoader[dict[str, Any]] = DataLoader(
                dataset,
                64,
                sampler=keys,
                num_workers=workers,
                collate_fn=collate,
                worker_init_fn=make_worker_init(workers),
                generator=torch.Generator(),
            )
            with preserve_rng_state():
                batches = list(loader)
            self._images = torch.cat([batch["images"] for batch in batches])
            self._labels = torch.cat([batch["labels"] for batch in batches])

    @property
    def pixels(self) -> Tensor:
        """The images (n, C, H, W), uint8."""
        self.load()
        assert self._images is not None
        return self._images

    @property
    def labels(self) -> Tensor:
        """Class indices (n,)."""
        self.load()
        assert self._labels is not None
        return self._labels

    def __iter__(self) -> Iterator[dict[str, Any]]:
        normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*self.split.stats)])
        for pixels, labels in zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield {"images": normalize(pixels), "labels": labels}
