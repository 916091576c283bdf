"""Crop boxes, keyed by sample, and cropping a batch of images at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hjepa_engine.utils.rng import Part, keyed_uniform

_ATTEMPTS = 10


class CropDraws(NamedTuple):
    """What is random about the crops of a batch."""

    uniform: NDArray[np.float64] | None
    """Numbers that boxes are made of, (B, 22); None: images are not cropped."""
    mirrored: NDArray[np.bool_] | None
    """Which images are mirrored left to right, (B,); None: none."""

    def sample(self, place: int) -> CropDraws:
        """Those of one image."""
        here = slice(place, place + 1)
        return CropDraws(
            None if self.uniform is None else self.uniform[here], None if self.mirrored is None else self.mirrored[here]
        )


def random_boxes(
    sizes: NDArray[np.int64],
    keys: NDArray[np.int64],
    *parts: Part,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> NDArray[np.int64]:
    """Boxes of random resized crops, drawn as ``torchvision.transforms.v2.RandomResizedCrop`` does.

    Args:
        sizes: height and width of each image, (B, 2).
        keys: epoch and index of each image, (B, 2).
        *parts: names the draw.
        scale: see :func:`fit_boxes`.
        ratio: see :func:`fit_boxes`.

    Returns:
        top, left, height, width of each box, (B, 4).
    """
    return fit_boxes(sizes, crop_draws(keys, *parts), scale, ratio)


def crop_draws(keys: NDArray[np.int64], *parts: Part) -> NDArray[np.float64]:
    """What :func:`fit_boxes` needs of each key: uniform numbers, (B, 22)."""
    return keyed_uniform(keys, 2 * _ATTEMPTS + 2, *parts).astype(np.float64)


def fit_boxes(
    sizes: NDArray[np.int64], draws: NDArray[np.float64], scale: tuple[float, float], ratio: tuple[float, float]
) -> NDArray[np.int64]:
    """Boxes of random resized crops out of uniform numbers.

    Area and aspect ratio are drawn up to ten times until the box fits; if none does, it is the largest centered box whose
    ratio is allowed.

    Args:
        sizes: height and width of each image, (B, 2).
        draws: of :func:`crop_draws`.
        scale: smallest and largest area, as a share of the image.
        ratio: smallest and largest width / height.

    Returns:
        top, left, height, width of each box, (B, 4).
    """
    height, width = sizes[:, :1], sizes[:, 1:]
    share = scale[0] + (scale[1] - scale[0]) * draws[:, :_ATTEMPTS]
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * draws[:, _ATTEMPTS:-2])
    area = height * width * share
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax(axis=1)[:, None]
    chosen = np.concatenate([np.take_along_axis(sides, first, axis=1) for sides in (heights, widths)], axis=1)
    found = fits.any(axis=1)[:, None]
    box = np.where(found, chosen, _allowed(sizes, ratio))
    corner = np.where(found, np.floor(draws[:, -2:] * (sizes - box + 1)), (sizes - box) // 2)
    return np.concatenate([corner, box], axis=1).astype(np.int64)


def _allowed(sizes: NDArray[np.int64], ratio: tuple[float, float]) -> NDArray[np.float64]:
    """Height and width of the largest box with an allowed ratio, (B, 2)."""
    height, width = sizes.T.astype(np.float64)
    own = width / height
    heights = np.where(own < ratio[0], np.rint(width / ratio[0]), height)
    widths = np.where(own > ratio[1], np.rint(height * ratio[1]), width)
    return np.maximum(np.stack([heights, widths], axis=1), 1)


def center_box(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest centered box of an image of ``size`` (H, W) that is shaped like ``target``: top, left, height, width."""
    (height, width), (target_height, target_width) = size, target
    box_height = min(height, max(1, round(width * target_height / target_width)))
    box_width = min(width, max(1, round(height * target_width / target_height)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resample(images: Tensor, boxes: Tensor, size: tuple[int, int], mirrored: Tensor | None = None) -> Tensor:
    """Cut a box out of each image and resize it, as bilinear interpolation with antialiasing does.

    Interpolation is separable and linear, so that two matrix products crop, resize and mirror a whole batch. Differs from
    ``torchvision.transforms.v2.functional.resized_crop`` by rounding only.

    Args:
        images: (B, C, H, W).
        boxes: top, left, height, width of each box in pixels, (B, 4).
        size: height and width of the result.
        mirrored: which images are mirrored left to right, (B,), bool.

    Returns:
        (B, C, *size), float32.
    """
    number, channels, full_height, full_width = images.shape
    top, left, height, width = boxes.to(images.device, torch.float32).unbind(dim=1)
    rows = _weights(top, height, full_height, size[0])
    columns = _weights(left, width, full_width, size[1], mirrored)
    # Two plain batched products, with channels beside columns: those with broadcasting copy the weights for every channel.
    images = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).contiguous()
    high = torch.bmm(rows, images.view(number, full_height, channels * full_width))
    wide = torch.bmm(high.view(number, size[0] * channels, full_width), columns.mT)
    return wide.view(number, size[0], channels, size[1]).transpose(1, 2)


def _weights(start: Tensor, length: Tensor, full: int, number: int, mirrored: Tensor | None = None) -> Tensor:
    """How much each of ``full`` pixels counts for each of ``number`` output pixels: a triangle filter, (B, number, full)."""
    position = torch.arange(full, device=start.device) + 0.5 - start[:, None]
    scale = length / number
    centers = scale[:, None] * (torch.arange(number, device=start.device) + 0.5)
    if mirrored is not None:
        centers = torch.where(mirrored[:, None], length[:, None] - centers, centers)
    position = torch.where((position > 0) & (position < length[:, None]), position, torch.inf)
    distance = (position[:, None] - centers[:, :, None]).abs_()
    weights = distance.mul_(-1 / scale.clamp(min=1)[:, None, None]).add_(1).clamp_(min=0)
    return weights.div_(weights.sum(dim=2, keepdim=True))
