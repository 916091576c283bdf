"""Levels of the hierarchy: prediction targets, pooled from the patch tokens of the target encoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa_engine.config.schema import Level
from hjepa_engine.masking import Masks


def as_tokens(features: Tensor) -> Tensor:
    """Features of an encoder as tokens: (B, N, D) as they are, (B, D) as (B, 1, D).

    Raises:
        ValueError: the features have another number of dimensions.
    """
    if features.ndim not in (2, 3):
        raise ValueError(f"an encoder must return (B, N, D) or (B, D), got {tuple(features.shape)}")
    return features[:, None] if features.ndim == 2 else features


def take_tokens(tokens: Tensor, idx: Tensor) -> Tensor:
    """Select tokens (B, N, D) at ``idx`` (B, ...): (B, ..., D)."""
    flat = idx.flatten(1)
    picked = tokens.gather(1, flat.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    return picked.view(*idx.shape, tokens.shape[-1])


def pool_target(features: Tensor, masks: Masks, level: Level) -> Tensor:
    """Pool patch features (B, N, D) into the targets of ``level``, before normalization.

    Returns:
        (B, M, cells, D), the mean of each ``pool`` x ``pool`` cell of each target block, row by row; a cell cut off by the
        block's edge averages the patches it has. For ``pool: image``, (B, 1, 1, D), the mean of all patches.
    """
    if level.pool == "image":
        return features.mean(dim=1)[:, None, None]
    tokens = take_tokens(features, masks.target_idx)
    if level.pool == 1:
        return tokens
    return pool_disjoint(tokens.flatten(0, 1), masks.block, level.pool).unflatten(0, tokens.shape[:2])


def pool_sliding(features: Tensor, grid: tuple[int, int], level: Level) -> Tensor:
    """Average-pool patch features (B, N, D) over every ``pool`` x ``pool`` cell of the grid, stride 1: (B, cells, D)."""
    if level.pool == 1:
        return features
    if level.pool == "image":
        return features.mean(dim=1, keepdim=True)
    size = [min(level.pool, side) for side in grid]
    maps = features.view(len(features), *grid, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(maps, size, stride=1).flatten(2).transpose(1, 2)


def pool_disjoint(features: Tensor, grid: tuple[int, int], pool: int | str) -> Tensor:
    """Average patch features (B, N, D) over disjoint ``pool`` x ``pool`` cells, or the image: (B, cells, D), row by row.

    A cell that is cut off by the edge averages the patches it has.
    """
    if isinstance(pool, str):
        return features.mean(dim=1, keepdim=True)
    maps = features.view(len(features), *grid, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(maps, pool, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)


def num_disjoint_cells(grid: tuple[int, int], level: Level) -> int:
    """Number of ``level``'s cells that fit side by side; :func:`pool_sliding` has more, but they overlap."""
    return 1 if level.pool == "image" else math.prod(max(1, side // level.pool) for side in grid)


def cell_centers(masks: Masks, pool: int, grid_width: int) -> tuple[Tensor, Tensor]:
    """Mean row and column of the patches of each cell, times two so that they are integers.

    Returns:
        Rows (B, M, cells per column), from 0 to 2 H - 2, and columns (B, M, cells per row), from 0 to 2 W - 2.
    """
    corner = masks.target_idx[:, :, :1]
    (height, width), device = masks.block, corner.device
    rows, columns = 2 * (corner // grid_width), 2 * (corner % grid_width)
    return rows + _axis_centers(height, pool, device), columns + _axis_centers(width, pool, device)


def _axis_centers(length: int, pool: int, device: torch.device) -> Tensor:
    """Centers, times two, of the cells of ``pool`` patches along an axis of ``length``; the last may be smaller."""
    starts = torch.arange(0, length, pool, device=device)
    return 2 * starts + (length - starts).clamp(max=pool) - 1
