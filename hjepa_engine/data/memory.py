"""Small datasets as one uint8 tensor, out of which whole batches are taken at once."""

from __future__ import annotations

import copy
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hjepa_engine.errors import DataError
from hjepa_engine.utils.rng import keyed_uniform


@runtime_checkable
class BatchedImages(Protocol):
    """A dataset that makes whole batches, in the main process."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...

    def to(self, device: torch.device) -> BatchedImages:
        """The same images in the memory of a device."""

    def gather(self, keys: NDArray[np.int64], seed: int) -> tuple[Tensor, Tensor]:
        """Pixels (B, C, H, W), uint8, and labels (B,) of samples by epoch and index, (B, 2)."""


def in_channels(pixels: Tensor, channels: int) -> Tensor:
    """Images (B, C, H, W), uint8, in 1 or 3 channels: gray is repeated, color becomes its luma.

    Raises:
        DataError: another number of channels is asked for.
    """
    own = pixels.shape[1]
    if own == channels:
        return pixels
    if (own, channels) == (1, 3):
        return pixels.expand(-1, 3, -1, -1)
    if (own, channels) == (3, 1):
        luma = (pixels * pixels.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32)[:, None, None]).sum(
            1, keepdim=True
        )
        return luma.round().to(torch.uint8)
    raise DataError(f"data.in_chans must be 1 or 3 for a dataset of {own} channels, got {channels}")


class MemoryImages:
    """Images in memory.

    Args:
        pixels: (N, C, H, W), uint8.
        labels: (N,), int64; -1: none.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], int(self.labels[index])

    def to(self, device: torch.device) -> MemoryImages:
        """See :class:`BatchedImages`."""
        return MemoryImages(self.pixels.to(device), self.labels)

    def gather(self, keys: NDArray[np.int64], seed: int) -> tuple[Tensor, Tensor]:
        """See :class:`BatchedImages`; the same images in every epoch."""
        idx = torch.from_numpy(keys[:, 1])
        return self.pixels.index_select(0, idx.to(self.pixels.device)), self.labels.index_select(0, idx)


class DigitPages:
    """Pages of ``side`` x ``side`` handwritten digits of one class, each dark on light or light on dark.

    Digits and polarities are drawn by (seed, epoch, index): every epoch has new pages. The label of page i is i mod 10. A
    linear classifier cannot read the class from the pixels, because the sign of each digit is random; and all that masked
    and visible digits have in common is their class.

    Args:
        digits: (n, 8, 8), uint8.
        labels: (n,), from 0 to 9; every class is there.
        length: number of pages.
        name: of the split; pages of another one are drawn independently.
        side: digits in a row and in a column.
    """

    def __init__(
        self, digits: NDArray[np.uint8], labels: NDArray[np.int64], length: int, name: str, side: int = 4
    ) -> None:
        # A row of eight pixels is one number of 64 bits: an eighth of the elements to move.
        self.rows = torch.from_numpy(digits[np.argsort(labels, kind="stable")]).view(torch.int64)[:, :, 0]
        self.counts = np.bincount(labels, minlength=10)
        self.firsts = self.counts.cumsum() - self.counts
        self.length, self.name, self.side = length, name, side

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pages, labels = self.gather(np.array([[0, index]]), 0)
        return pages[0], int(labels[0])

    def to(self, device: torch.device) -> DigitPages:
        """See :class:`BatchedImages`."""
        moved = copy.copy(self)
        moved.rows = self.rows.to(device)
        return moved

    def gather(self, keys: NDArray[np.int64], seed: int) -> tuple[Tensor, Tensor]:
        """See :class:`BatchedImages`."""
        number, side, per_page = len(keys), self.side, self.side**2
        draws, labels = keyed_uniform(keys, 2 * per_page, seed, "page", self.name), keys[:, 1] % 10
        picks = self.firsts[labels, None] + (draws[:, :per_page] * self.counts[labels, None]).astype(np.int64)
        inverted = torch.from_numpy(draws[:, per_page:] < 0.5).view(-1, 1).to(self.rows.device)
        rows = self.rows.index_select(0, torch.from_numpy(picks).view(-1).to(self.rows.device))
        rows = (
            (rows ^ -inverted.long()).view(number, side, side, 8).transpose(2, 3)
        )  # 255 - x is x with all bits flipped
        return rows.reshape(number, 1, 8 * side, side).view(torch.uint8), torch.from_numpy(labels)
