"""Random views of a batch of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa_engine.utils.rng import uniform_rows


def random_views(
    images: Tensor,
    number: int,
    *parts: int | str,
    scale: tuple[float, float] = (0.3, 1.0),
    color: float = 0.0,
) -> list[Tensor]:
    """Random square crops of images (B, C, H, W), flipped with probability 1/2, resized to (H, W).

    Args:
        images: the images, on any device.
        number: views per image.
        *parts: key of the random draws.
        scale: smallest and largest area of a crop, as a fraction of the image.
        color: strength of random colors, from 0 to 1; see :func:`recolor`.

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
    if color:
        width = 2 * images.shape[1] + 1
        colors = torch.from_numpy(uniform_rows(0, number * len(images), width, "colors", *parts)).to(images)
        views = [recolor(view, drawn, color) for view, drawn in zip(views, colors.split(len(images)), strict=True)]
    return views


def recolor(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Multiply and shift each channel of normalized images (B, C, H, W) by factors of their own; make some gray.

    Args:
        images: the images.
        draws: uniform numbers, (B, 2 C + 1).
        strength: factors are from ``1 - strength`` to ``1 + strength``, shifts up to ``strength`` standard deviations, and
            ``strength / 4`` of the images become the mean of their channels.
    """
    factor, shift = (strength * (2 * draws[:, :-1] - 1))[:, :, None, None].chunk(2, dim=1)
    is_gray = (draws[:, -1] < strength / 4)[:, None, None, None]
    images = torch.where(is_gray, images.mean(dim=1, keepdim=True), images)
    return images * (1 + factor) + shift
