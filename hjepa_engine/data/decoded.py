"""Image files that are decoded once and kept in memory."""

from __future__ import annotations

from functools import cached_property

import ignite.distributed as idist
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.decode import DamagedImageError, damage
from hjepa_engine.data.memory import MemoryImages
from hjepa_engine.data.pixels import image_size, to_pixels
from hjepa_engine.data.split import DatasetSplit
from hjepa_engine.errors import DataError
from hjepa_engine.utils.bars import Bar


class DecodedImages:
    """The images of a split, all of one size, as one uint8 tensor that is made when it is first needed.

    See :class:`~hjepa_engine.data.memory.BatchedImages`. Whatever needs pixels raises a ``DataError`` where an image is
    damaged, of another size than the first or not of 8 bits, or where memory is too small.

    Args:
        config: the data section.
        split: its images are files.
    """

    def __init__(self, config: DataConfig, split: DatasetSplit) -> None:
        self.config, self.split = config, split

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.decode()[index]

    def to(self, device: torch.device) -> MemoryImages:
        """The decoded images in the memory of a device."""
        return self.decode().to(device)

    def gather(self, keys: NDArray[np.int64], seed: int) -> tuple[Tensor, Tensor]:
        """Pixels (B, C, H, W) and labels (B,) of samples by epoch and index, (B, 2); the same in every epoch."""
        return self.decode().gather(keys, seed)

    def decode(self) -> MemoryImages:
        """All images; they are read in the first call."""
        return self._decoded

    @cached_property
    def _decoded(self) -> MemoryImages:
        number, first = len(self), self._read(0, None)[0]
        size = (first.shape[1], first.shape[2])
        # Each process of this machine has its own; others need memory as well.
        processes, free = idist.get_nproc_per_node(), psutil.virtual_memory().available
        if (needed := processes * number * first.numel()) > 0.9 * free:
            where = f" in {processes} processes" if processes > 1 else ""
            raise DataError(
                f"data.in_memory: {number:,} images of {size[0]} x {size[1]}{where} take {needed / 1e6:,.0f} MB, "
                f"{free / 1e6:,.0f} MB of memory are free; use files with --data.in_memory false"
            )
        pixels, labels = first.new_empty(number, *first.shape), torch.empty(number, dtype=torch.int64)
        hidden = None if idist.get_rank() == 0 else True  # None: hidden unless on a terminal
        for index in Bar(lambda: "", iterable=range(number), desc="decoding", unit=" images", delay=2, disable=hidden):
            pixels[index], labels[index] = self._read(index, size)
        return MemoryImages(pixels, labels)

    def _read(self, index: int, size: tuple[int, int] | None) -> tuple[Tensor, int]:
        config = self.config
        try:
            with damage():
                image, label = self.split.images[index]
                own = image_size(image, config.channels, config.max_pixels)
            if size not in (None, own):
                raise DamagedImageError(f"{own[0]} x {own[1]} pixels, the first image has {size[0]} x {size[1]}")
            pixels = to_pixels(image, config.channels, own, None, config.max_pixels)
            if pixels.dtype != torch.uint8:
                raise DamagedImageError("not of 8 bits")
        except DamagedImageError as error:
            raise DataError(
                "data.in_memory needs images of one size and 8 bits that can all be read, else --data.in_memory false; "
                f"{self.split.name_of(index)}: {error}"
            ) from error
        return pixels, label
