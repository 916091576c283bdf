"""Random masks: single patches anywhere in the image."""

from __future__ import annotations

import numpy as np
import torch

from hjepa_engine.masking.masks import Masks
from hjepa_engine.utils.rng import uniform_rows


class RandomMasks:
    """Show K patches of each image, drawn uniformly, and predict all the others (MAE, arXiv:2111.06377).

    Each hidden patch is a target block of its own. All draws are keyed by (seed, step, index of the image in the global
    batch), so a rank or micro-batch computes its slice alone and gets the same masks as in the whole batch.

    Args:
        grid: (H, W), the patch grid.
        context_keep: smallest and largest K / N, in (0, 1). Each step draws a K from there, the same for all its images.

    Raises:
        ValueError: the grid is empty, the range is invalid, or no patch would be visible, or none hidden.
    """

    def __init__(self, grid: tuple[int, int], context_keep: tuple[float, float] = (0.25, 0.25)) -> None:
        if min(grid) < 1:
            raise ValueError(f"grid must be at least 1 x 1, got {grid}")
        self.grid = grid
        self.num_visible = least, most = (
            round(context_keep[0] * grid[0] * grid[1]),
            round(context_keep[1] * grid[0] * grid[1]),
        )
        if not 0 < least <= most < self.num_patches:
            raise ValueError(
                f"context_keep must keep 1 to {self.num_patches - 1} of {self.num_patches} patches, got {context_keep}"
            )

    @property
    def num_patches(self) -> int:
        """N = H * W."""
        return self.grid[0] * self.grid[1]

    def sample(self, batch_size: int, seed: int, step: int = 0, offset: int = 0) -> Masks:
        """Masks of images ``offset`` to ``offset + batch_size`` of the global batch of optimizer step ``step``.

        Args:
            batch_size: B, the number of images.
            seed: seed of the run.
            step: optimizer step.
            offset: index of the first image in the global batch (all ranks and micro-batches).
        """
        draws = uniform_rows(offset, batch_size, self.num_patches, seed, "random mask", step)
        least, most = self.num_visible
        share = float(uniform_rows(0, 1, 1, seed, "random mask size", step)[0, 0])
        kept = least + int(share * (most - least + 1))
        order = torch.from_numpy(np.argsort(draws, axis=1, kind="stable"))
        context, targets = order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values
        return Masks(context, targets[:, :, None], (1, 1))
