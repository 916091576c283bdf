"""Some of many: tokens for a covariance, points of a spectrum for a log."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: Maximum number of singular values in a logged spectrum.
MAX_POINTS = 64


def stride_of(images: int, number: int, most: int) -> int:
    """The stride that picks about ``most`` of ``images`` x ``number`` tokens, and every patch position equally often."""
    stride = max(1, images * number // most)
    while math.gcd(stride, number) > 1:  # a common factor would skip some positions in every image
        stride += 1
    return stride


def spread(tokens: Tensor, position_idx: Tensor, stride: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    """Every ``stride``-th of tokens (B, K, D) and of their positions (B, K), counted from the first token of rank 0."""
    first = -rank * position_idx.numel() % stride
    return tokens.reshape(-1, tokens.shape[-1])[first::stride], position_idx.reshape(-1)[first::stride]


def thinned(singular_values: Tensor) -> dict[str, list[Any]]:
    """At most 64 singular values, divided by the sum of all, at ranks evenly spaced on a log scale.

    Values that are not finite are None, since JSON has no NaN.
    """
    dim = len(singular_values)
    rank = torch.logspace(0, math.log10(dim), MAX_POINTS, dtype=torch.float64).round().long().clamp(1, dim).unique()
    share = singular_values / singular_values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    picked = share[rank.to(share.device) - 1].tolist()
    return {"rank": rank.tolist(), "share": [float(f"{value:.4g}") if value == value else None for value in picked]}
