"""Pages of mixed handwritten digits, and which class each patch of them belongs to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hjepa_engine.data.memory import DigitPages
from hjepa_engine.utils.rng import keyed_uniform

#: Class of a cell without a digit.
BACKGROUND = 10
#: How many of the cells have none, on average.
_EMPTY = 0.25


class DigitMaps(DigitPages):
    """Pages of cells of 8 x 8 pixels, each with a digit of any class or empty, dark on light or light on dark.

    They are drawn as :class:`DigitPages`, but every cell for itself. Labels are classes of patches, (B, N): digits from 0 to
    9, and 10 for the background.

    Args:
        digits: (n, 8, 8), uint8.
        labels: (n,), from 0 to 9; every class is there.
        length: number of pages.
        name: of the split; pages of another one are drawn independently.
        grid: patches in a column and in a row.
        side: cells in a row and in a column.
    """

    def __init__(
        self,
        digits: NDArray[np.uint8],
        labels: NDArray[np.int64],
        length: int,
        name: str,
        grid: tuple[int, int],
        side: int = 4,
    ) -> None:
        super().__init__(digits, labels, length, name, side)
        self.grid = grid

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """A page (1, H, W) and the classes of its patches (N,)."""
        pages, labels = self.gather(np.array([[0, index]]), 0)
        return pages[0], labels[0]

    def draw_cells(self, keys: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Tensor]:
        """Which class each cell has, which digit (a row of all of them), and whether it is inverted: (B, cells) each."""
        draws = keyed_uniform(keys, 4 * self.side**2, seed, "map", self.name)
        empty, kind, pick, polarity = np.split(draws, 4, axis=1)
        digit = (kind * 10).astype(np.int64)
        picks = self.firsts[digit] + (pick * self.counts[digit]).astype(np.int64)
        return np.where(empty < _EMPTY, BACKGROUND, digit), picks, torch.from_numpy(polarity < 0.5)

    def gather(self, keys: NDArray[np.int64], seed: int) -> tuple[Tensor, Tensor]:
        """See :class:`~hjepa_engine.data.memory.BatchedImages`; labels are (B, N)."""
        classes, picks, inverted = self.draw_cells(keys, seed)
        number, side, device = len(keys), self.side, self.rows.device
        digits = self.rows.index_select(0, torch.from_numpy(picks).view(-1).to(device)).view(torch.uint8)
        digits = digits.view(number, side, side, 8, 8)
        cells = torch.from_numpy(classes).view(number, side, side)
        digits = torch.where((cells == BACKGROUND).to(device)[..., None, None], 0, digits)
        digits = torch.where(inverted.view(number, side, side, 1, 1).to(device), 255 - digits, digits)
        pages = digits.transpose(2, 3).reshape(number, 1, 8 * side, 8 * side)
        return pages, patch_classes(cells, self.grid, BACKGROUND + 1)


def patch_classes(cells: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """The class that covers most of each patch, the smallest of equal ones.

    >>> patch_classes(torch.tensor([[[0, 1], [1, 1]]]), (1, 1), 2).tolist()
    [[1]]

    Args:
        cells: (B, S, S), classes of the cells of a page.
        grid: patches in a column and in a row of the page.
        num_classes: number of classes.

    Returns:
        (B, N), row by row.
    """
    side = cells.shape[1]
    rows, columns = (_overlaps(patches, side) for patches in grid)
    one_hot = torch.nn.functional.one_hot(cells, num_classes)
    areas = torch.einsum("is,jt,bstc->bijc", rows, columns, one_hot)
    return areas.argmax(dim=3).flatten(1)


def _overlaps(patches: int, cells: int) -> Tensor:
    """How much of each patch lies in each cell along an axis, in parts of the page's 1 / (patches * cells)."""
    first_patch, first_cell = torch.arange(patches)[:, None] * cells, torch.arange(cells) * patches
    end = torch.minimum(first_patch + cells, first_cell + patches)
    return (end - torch.maximum(first_patch, first_cell)).clamp(min=0)
