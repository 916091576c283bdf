"""The masks of a batch, and what samples them."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from torch import Tensor

# ``torch.compile`` compiles a module anew for each length of its input, by default eight times.
_SHARES = 8


def kept_share(context_keep: tuple[float, float], draw: float) -> float:
    """One of up to eight evenly spaced shares from the smallest to the largest, by a uniform ``draw`` in [0, 1)."""
    low, high = context_keep
    return low + (high - low) * math.floor(draw * _SHARES) / (_SHARES - 1)


class Masks(NamedTuple):
    """Indices of patches; the N = H * W patches of an image are numbered row by row."""

    context_idx: Tensor
    """(B, K) int64, ascending: the visible patches, which the context encoder sees."""
    target_idx: Tensor
    """(B, M, h * w) int64: the patches of each target block, row by row."""
    block: tuple[int, int]
    """(h, w): height and width of the target blocks, in patches."""


class MaskSource(Protocol):
    """Samples the masks of a batch; the draws of an image depend on (seed, step, index in the global batch) alone."""

    grid: tuple[int, int]
    """(H, W), the patch grid."""

    @property
    def num_patches(self) -> int:
        """N = H * W."""
        return self.grid[0] * self.grid[1]

    def sample(self, batch_size: int, seed: int, step: int = 0, offset: int = 0) -> Masks:
        """Masks of images ``offset`` to ``offset + batch_size`` of the global batch of optimizer step ``step``."""
        ...
