"""Random views of a batch of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa_engine.utils.rng import uniform_rows


def random_views(
    images: Tensor, number: int, *parts: int | str, scale: tuple[float, float] = (0.3, 1.0)
) -> list[Tensor]:
    """Random square crops of images (B, C, H, W), flipped with probability 1/2, resized to (H, W).

    Args:
        images: the images, on any device.
        number: views per image.
        *parts: key of the random draws.
        scale: smallest and largest area of a crop, as a fraction of the image.

    Returns:
        A list of ``number`` tensors (B, C, H, W).
    """
    draws = torch.from_numpy(uniform_rows(0, number * len(images), 4, "views", *parts))
    low, high = scale
    side = (low + (high - low) * draws[:, 0]).sqrt()
    mirror = torch.where(draws[:, 1] < 0.5, 1.0, -1.0)
    left, top = (1 - side) * (2 * draws[:, 2] - 1), (1 - side) * (2 * draws[:, 3] - 1)
    zero = torch.zeros_like(side)
    theta = torch.stack([torch.stack([side * mirror, zero, left], 1), torch.stack([zero, side, top], 1)], 1)
    views = []
    for chosen in theta.to(images).split(len(images)):
        grid = F.affine_grid(chosen, list(images.shape), align_corners=False)
        views.append(F.grid_sample(images, grid, padding_mode="border", align_corners=False))
    return views
