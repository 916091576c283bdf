"""A fixed subset of images in memory, for monitors that measure the same images again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.augment import EvalTransform
from hjepa_engine.data.reading import ImageReader, PixelBatch, as_is
from hjepa_engine.data.split import DatasetSplit
from hjepa_engine.data.workers import make_worker_init
from hjepa_engine.errors import DataError
from hjepa_engine.utils.rng import derive_seed, preserve_rng_state


class FixedImageSubset:
    """A random sample from each of ``count`` equal segments of a split, with evaluation transforms, kept in memory.

    Images are read at first use and normalized on every pass; damaged ones are left out. The global random generators are
    left as they were. Iterating yields batches with ``images`` (B, C, H, W), normalized, ``labels`` (B,) and ``damaged``.

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
        self._transform = EvalTransform(config, split.stats)
        self._images: Tensor | None = None
        self._labels: Tensor | None = None
        self._damaged: list[str] = []

    def __len__(self) -> int:
        return -(-len(self.pixels) // self.batch_size)

    def load(self) -> None:
        """Read the images, unless they are in memory already."""
        if self._images is None:
            workers = self.config.num_workers if len(self.indices) > 1000 else 0
            keys = [(0, index) for index in self.indices]
            reader = ImageReader(self.config, self.split, self.seed)
            chunks = [keys[start : start + 64] for start in range(0, len(keys), 64)]
            batches: Iterable[PixelBatch] = map(reader.__getitems__, chunks)
            if not reader.is_batched:
                batches = DataLoader(
                    reader,
                    batch_sampler=chunks,
                    num_workers=workers,
                    collate_fn=as_is,
                    worker_init_fn=make_worker_init(workers),
                    generator=torch.Generator(),
                )
            with preserve_rng_state():
                found = list(batches)
            self._damaged = [line for batch in found for line in batch.damaged]
            found = [batch for batch in found if len(batch.pixels)]
            if not found:
                raise DataError(
                    f"{len(keys)} of {len(keys)} images could not be read, the last one: {self._damaged[-1]}"
                )
            pixels = [self._transform.crop(batch.pixels) for batch in found]
            if len({part.dtype for part in pixels}) > 1:
                pixels = [part / 255 if part.dtype == torch.uint8 else part for part in pixels]
            self._images, self._labels = torch.cat(pixels), torch.cat([batch.labels for batch in found])

    @property
    def pixels(self) -> Tensor:
        """The images (n, C, H, W) that can be read, uint8 or float32 from 0 to 1."""
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
        parts = zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
        for number, (pixels, labels) in enumerate(parts):
            damaged = self._damaged if number == 0 else []
            yield {"images": self._transform(pixels), "labels": labels, "damaged": damaged}
