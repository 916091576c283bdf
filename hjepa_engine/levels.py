"""Levels of the hierarchy: what is predicted at each, pooled from the target encoder's patch tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa_engine.config.schema import Level
from hjepa_engine.masking import Masks


def take_tokens(tokens: Tensor, idx: Tensor) -> Tensor:
    """Tokens (B, N, D) at ``idx`` (B, ...): (B, ..., D)."""
    flat = idx.flatten(1)
    picked = tokens.gather(1, flat.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    return picked.view(*idx.shape, tokens.shape[-1])


def pool_target(features: Tensor, masks: Masks, level: Level) -> Tensor:
    """What ``level`` predicts of the patch features (B, N, D), before it is normalized.

    Returns:
        (B, M, cells, D), the means of the cells of each target block, row by row; a cell that the block's edge cuts
        is the mean of the patches it holds. For ``pool: image``, (B, 1, 1, D), the mean of all patches.
    """
    if level.pool == "image":
        return features.mean(dim=1)[:, None, None]
    tokens = take_tokens(features, masks.target_idx)
    if level.pool == 1:
        return tokens
    batch, blocks, _, dim = tokens.shape
    maps = tokens.view(batch * blocks, *masks.block, dim).permute(0, 3, 1, 2)
    cells = F.avg_pool2d(maps, level.pool, ceil_mode=True, count_include_pad=False)
    return cells.flatten(2).transpose(1, 2).reshape(batch, blocks, -1, dim)


def pool_sliding(features: Tensor, grid: tuple[int, int], level: Level) -> Tensor:
    """Means of all windows of ``level``'s size in the patch features (B, N, D), wherever they begin: (B, cells, D)."""
    if level.pool == 1:
        return features
    if level.pool == "image":
        return features.mean(dim=1, keepdim=True)
    size = [min(level.pool, side) for side in grid]
    maps = features.view(len(features), *grid, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(maps, size, stride=1).flatten(2).transpose(1, 2)


def num_disjoint_cells(grid: tuple[int, int], level: Level) -> int:
    """How many windows of ``level``'s size lie side by side; those of :func:`pool_sliding` overlap, and say no more."""
    return 1 if level.pool == "image" else math.prod(max(1, side // level.pool) for side in grid)


def cell_centers(masks: Masks, pool: int, grid_width: int) -> tuple[Tensor, Tensor]:
    """Mean row and column of each cell's patches, doubled (so that they are integers).

    Returns:
        Rows (B, M, cells down) and columns (B, M, cells across), from 0 to 2 H - 2 and 2 W - 2.
    """
    corner = masks.target_idx[:, :, :1]
    (height, width), device = masks.block, corner.device
    rows, columns = 2 * (corner // grid_width), 2 * (corner % grid_width)
    return rows + _axis_centers(height, pool, device), columns + _axis_centers(width, pool, device)


def _axis_centers(length: int, pool: int, device: torch.device) -> Tensor:
    """Doubled centers of the cells that ``pool`` cuts ``length`` patches into; the last cell may be smaller."""
    starts = torch.arange(0, length, pool, device=device)
    return 2 * starts + (length - starts).clamp(max=pool) - 1
