"""A fixed set of images in memory, for whatever looks at the same ones again and again."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.datasets import DatasetSplit
from hjepa_engine.data.loading import KeyedDataset, collate, make_worker_init, resize_and_crop
from hjepa_engine.utils.rng import derive_seed, preserve_rng_state


class FixedImageSubset:
    """One sample of each of ``count`` equal parts of a split, resized and cut as for evaluation, kept as bytes.

    They are read from the split at the first use, and normalized at every one; nothing random is drawn from the outside's
    generators.

    Args:
        config: of the data.
        split: where the images are.
        count: how many, but one for each process at least; all, where there are fewer.
        batch_size: of the batches that iterating yields: ``images`` (B, C, H, W), normalized, and ``labels`` (B,).
        seed: names the choice, and the augmentations of data that is drawn when read.
        rank: which share of the set is this process's own.
        world_size: number of shares.
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
        count = min(max(count, world_size), total)  # a process without images would leave the others waiting
        starts = [number * total // count for number in range(count + 1)]
        # Not the first of each part: labels that come round (as of digit pages) would be of few classes then.
        drawn = [a + derive_seed(seed, "image set", a) % (b - a) for a, b in pairwise(starts)]
        self.indices = drawn[rank::world_size]
        self._images: Tensor | None = None
        self._labels: Tensor | None = None

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def load(self) -> None:
        """Read the images now, if that has not happened yet."""
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
        """Class numbers (n,)."""
        self.load()
        assert self._labels is not None
        return self._labels

    def __iter__(self) -> Iterator[dict[str, Any]]:
        normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*self.split.stats)])
        for pixels, labels in zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield {"images": normalize(pixels), "labels": labels}
