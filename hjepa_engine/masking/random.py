"""Random masks: single patches anywhere in the image."""

from __future__ import annotations

import numpy as np
import torch

from hjepa_engine.masking.masks import Masks, MaskSource, kept_share
from hjepa_engine.utils.rng import uniform_rows


class RandomMasks(MaskSource):
    """Show K patches of each image, drawn uniformly, and predict all the others (MAE, arXiv:2111.06377).

    Each hidden patch is a target block of its own. All draws are keyed by (seed, step, index of the image in the global
    batch), so a rank or micro-batch computes its slice alone and gets the same masks as in the whole batch.

    Args:
        grid: (H, W), the patch grid.
        context_keep: smallest and largest K / N, in (0, 1). Each step draws one of up to eight values, evenly spaced between
            them, for all its images.

    Raises:
        ValueError: the grid is empty, the range is not ordered, or no patch would be visible, or none hidden.
    """

    def __init__(self, grid: tuple[int, int], context_keep: tuple[float, float] = (0.25, 0.25)) -> None:
        if min(grid) < 1:
            raise ValueError(f"grid must be at least 1 x 1, got {grid}")
        low, high = context_keep
        if not 0 < low <= high < 1:
            raise ValueError(f"context_keep must satisfy 0 < low <= high < 1, got {context_keep}")
        self.grid, self.context_keep = grid, context_keep
        if not 0 < round(low * self.num_patches) <= round(high * self.num_patches) < self.num_patches:
            raise ValueError(
                f"context_keep must keep 1 to {self.num_patches - 1} of {self.num_patches} patches, got {context_keep}"
            )

    def sample(self, batch_size: int, seed: int, step: int = 0, offset: int = 0) -> Masks:
        """Masks of images ``offset`` to ``offset + batch_size`` of the global batch of optimizer step ``step``.

        Args:
            batch_size: B, the number of images.
            seed: seed of the run.
            step: optimizer step.
            offset: index of the first image in the global batch (all ranks and micro-batches).
        """
        draws = uniform_rows(offset, batch_size, self.num_patches, seed, "random mask", step)
        draw = float(uniform_rows(0, 1, 1, seed, "random mask size", step)[0, 0])
        kept = round(kept_share(self.context_keep, draw) * self.num_patches)
        order = torch.from_numpy(np.argsort(draws, axis=1, kind="stable"))
        context, targets = order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values
        return Masks(context, targets[:, :, None], (1, 1))
