"""Position embeddings of another patch grid: sine-cosine tables are computed anew, others interpolated."""

from __future__ import annotations

from typing import Literal

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from hjepa_engine.models.positions import sincos_2d

Grid = tuple[int, int]


def sincos_order(table: Tensor, grid: Grid) -> Literal["own", "other"] | None:
    """Which sine-cosine table ``table`` (N, D) of the patches of ``grid`` is; None: it is none.

    ``own``: this project's order of rows and columns; ``other``: the halves of each embedding are exchanged.
    """
    if table.shape[0] != grid[0] * grid[1] or table.shape[1] % 4:
        return None
    computed = sincos_2d(grid, table.shape[1])
    for order, wanted in (("own", computed), ("other", _exchanged(computed))):
        if torch.allclose(table.float(), wanted, atol=5e-3):  # half precision rounds
            return order  # type: ignore[return-value]
    return None


def resized_positions(table: Tensor, old: Grid, new: Grid, fixed: bool) -> Tensor:
    """The position embeddings (1, N, D) of grid ``old`` for grid ``new``.

    Args:
        table: as it was read; it is returned as it is where the grids are equal.
        old: patches down and across.
        new: patches down and across.
        fixed: whether they are not trained: a sine-cosine table is computed anew then.
    """
    if old == new:
        return table
    if fixed and (order := sincos_order(table[0], old)):
        computed = sincos_2d(new, table.shape[2])
        return (computed if order == "own" else _exchanged(computed))[None]
    return resample_abs_pos_embed(table.float(), new_size=list(new), old_size=list(old), num_prefix_tokens=0)


def _exchanged(table: Tensor) -> Tensor:
    return torch.cat(table.chunk(2, dim=1)[::-1], dim=1)
