"""The masks of a batch, and what samples them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

#: Numbers of visible patches between which a step chooses: ``torch.compile`` compiles a module anew for each length of its
#: input, by default eight times.
SHARES = 8


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
