"""Fixed sine-cosine position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Sine-cosine embeddings of ``positions`` (n,), dim / 2 wavelengths from 2 pi to 10,000 * 2 pi: (n, dim)."""
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    frequencies = 10_000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_2d(grid: tuple[int, int], dim: int) -> Tensor:
    """Position embeddings of the patches of ``grid`` (H, W), row by row: (H * W, dim).

    The first half of an embedding is its column's, the second half its row's, as in I-JEPA and MAE (arXiv:2111.06377).

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    rows, columns = sincos_1d(torch.arange(grid[0]), dim // 2), sincos_1d(torch.arange(grid[1]), dim // 2)
    return torch.cat([columns.repeat(grid[0], 1), rows.repeat_interleave(grid[1], dim=0)], dim=1)
