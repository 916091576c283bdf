"""Augmentation of a whole batch at once, on any device; each sample's is a function of (seed, epoch, index)."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.crops import CropDraws, center_box, crop_draws, fit_boxes, resample
from hjepa_engine.data.rand_augment import rand_augment
from hjepa_engine.data.split import Stats
from hjepa_engine.utils.rng import keyed_uniform

_GRAY = (0.2989, 0.587, 0.114)


class EvalTransform:
    """Normalize pixels (B, C, H, W), uint8 or from 0 to 1, after a centered crop where they have another size.

    Args:
        config: the data section.
        stats: mean and standard deviation of each channel.
    """

    def __init__(self, config: DataConfig, stats: Stats) -> None:
        self.size, self.stats = config.size, stats

    def __call__(self, pixels: Tensor) -> Tensor:
        """Transform a batch."""
        cropped = self.crop(pixels)
        return normalize(cropped, self.stats, white(cropped))

    def crop(self, pixels: Tensor) -> Tensor:
        """The centers of images that have another size, as floats from 0 to 1; others as they are."""
        size = (pixels.shape[2], pixels.shape[3])
        if size == self.size:
            return pixels
        boxes = torch.tensor([center_box(size, self.size)]).repeat(len(pixels), 1)
        return resample(pixels, boxes, self.size) / white(pixels)


class TrainTransform:
    """Random crop, flip, RandAugment, affine map and color jitter, as far as ``config`` enables them; then normalization.

    Args:
        config: the data section.
        stats: mean and standard deviation of each channel.
        seed: seed of the run.
    """

    def __init__(self, config: DataConfig, stats: Stats, seed: int) -> None:
        self.config, self.stats, self.seed = config, stats, seed

    def __call__(self, pixels: Tensor, keys: NDArray[np.int64], is_cropped: bool = False) -> Tensor:
        """Transform a batch.

        Args:
            pixels: (B, C, H, W), uint8 or from 0 to 1, on any device.
            keys: epoch and index of each sample, (B, 2).
            is_cropped: the pixels are random crops of the right size already, mirrored where they should be.

        Returns:
            Normalized images (B, C, *config.size), float32.
        """
        config, images, brightest = self.config, pixels, white(pixels)

        def draw(width: int, name: str) -> Tensor:
            return torch.from_numpy(keyed_uniform(keys, width, self.seed, name)).to(images.device)

        if not is_cropped:
            images = self._crop(images, self.draw_crops(keys))
        if config.rand_augment:
            if images.dtype != torch.uint8:  # its operations are defined on bytes
                images = (images * (255 / brightest)).round().clamp(0, 255).byte()
            draws = torch.from_numpy(keyed_uniform(keys, 2 * config.rand_augment, self.seed, "rand_augment"))
            images, brightest = rand_augment(images, draws, config.rand_augment_magnitude), 255
        if config.random_affine:
            images = affine(images.float(), affine_matrices(draw(5, "affine"), config.random_affine, config.size))
        if config.color_jitter:
            images, brightest = jitter(images / brightest, draw(5, "jitter"), config.color_jitter), 1
        return normalize(images, self.stats, brightest)

    def _crop(self, images: Tensor, draws: CropDraws) -> Tensor:
        boxes = self.boxes(np.tile(images.shape[2:], (len(images), 1)), draws)
        mirrored = None if draws.mirrored is None else torch.from_numpy(draws.mirrored).to(images.device)
        if boxes is not None:
            return resample(images, torch.from_numpy(boxes), self.config.size, mirrored)
        if mirrored is not None:
            return torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images

    def draw_crops(self, keys: NDArray[np.int64]) -> CropDraws:
        """Draw the crops of samples by epoch and index, (B, 2)."""
        config, uniform, mirrored = self.config, None, None
        if {*config.crop_scale, *config.crop_ratio} != {1.0}:
            uniform = crop_draws(keys, self.seed, "crop")
        if config.horizontal_flip:
            mirrored = keyed_uniform(keys, 1, self.seed, "flip")[:, 0] < config.horizontal_flip
        return CropDraws(uniform, mirrored)

    def boxes(self, sizes: NDArray[np.int64], draws: CropDraws) -> NDArray[np.int64] | None:
        """Crop boxes (B, 4) of images of ``sizes`` (B, 2); None: the images are used as they are."""
        config = self.config
        if draws.uniform is not None:
            return fit_boxes(sizes, draws.uniform, config.crop_scale, config.crop_ratio)
        if (sizes == config.size).all():
            return None
        return np.concatenate([np.zeros_like(sizes), sizes], axis=1)  # the whole image


def white(pixels: Tensor) -> int:
    """The largest value that pixels can have: 255 in bytes, else 1."""
    return 255 if pixels.dtype == torch.uint8 else 1


def normalize(images: Tensor, stats: Stats, brightest: int = 1) -> Tensor:
    """Subtract each channel's mean and divide by its standard deviation: float32, contiguous.

    Args:
        images: (B, C, H, W), from 0 to ``brightest``.
        stats: mean and standard deviation of each channel, for pixels from 0 to 1.
        brightest: the value that is 1 in ``stats``.
    """
    scale, shift = _scale_and_shift(stats, brightest, images.device)
    # One allocation: in large batches, new memory costs more than arithmetic.
    return torch.empty(images.shape, device=images.device).copy_(images).mul_(scale).add_(shift)


@cache
def _scale_and_shift(stats: Stats, brightest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in stats)
    return (1 / (brightest * std)).float().to(device), (-mean / std).float().to(device)


def affine_matrices(draws: Tensor, strength: float, size: tuple[int, int]) -> Tensor:
    """Random maps from output to input pixels, counted from the image's center, (B, 2, 3).

    Args:
        draws: uniform numbers, (B, 5).
        strength: at 1: up to 30 degrees of rotation, 20 % of shift and scale, 15 degrees of horizontal shear.
        size: height and width of the images.
    """
    angle, shear = ((2 * draws[:, i] - 1) * math.radians(limit * strength) for i, limit in ((0, 30), (1, 15)))
    scale = 1 + (2 * draws[:, 2] - 1) * 0.2 * strength
    right, down = ((2 * draws[:, i] - 1) * 0.2 * strength * side for i, side in ((3, size[1]), (4, size[0])))
    return inverse_affine(angle, right.round(), down.round(), scale, shear)


def inverse_affine(angle: Tensor, right: Tensor, down: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Inverse of rotating (clockwise, radians), shearing, scaling and then shifting about the center, (B, 2, 3)."""
    cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
    xx, xy = (cos - sin * tan) / scale, (sin + cos * tan) / scale
    yx, yy = -sin / scale, cos / scale
    rows = [torch.stack([x, y, -x * right - y * down], dim=1) for x, y in ((xx, xy), (yx, yy))]
    return torch.stack(rows, dim=1)


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Map images (B, C, H, W) by ``matrices`` (B, 2, 3) from output to input pixels; bilinear, black outside."""
    height, width = images.shape[2:]
    half = images.new_tensor([width / 2, height / 2, 1.0])
    theta = matrices * half / half[:2, None]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def jitter(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Random brightness, contrast and, of RGB, saturation and (a quarter as strong) hue, in an order of each image's own.

    Args:
        images: (B, C, H, W), from 0 to 1.
        draws: uniform numbers, (B, 5).
        strength: factors are from ``1 - strength`` to ``1 + strength``.
    """
    factors = 1 + (2 * draws[:, :3] - 1) * strength
    values = [*factors.unbind(dim=1), (2 * draws[:, 3] - 1) * strength / 4]
    steps = [brightness, contrast, saturation, hue][: 4 if images.shape[1] == 3 else 2]
    orders = torch.tensor(list(itertools.permutations(range(len(steps)))), device=draws.device)
    order = orders[(draws[:, 4] * len(orders)).long()]
    for place in range(len(steps)):
        for number, step in enumerate(steps):
            chosen = (order[:, place] == number).nonzero()[:, 0]
            images = images.index_copy(0, chosen, step(images[chosen], values[number][chosen, None, None, None]))
    return images


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply."""
    return (images * factor).clamp(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean gray value of the image."""
    mean = _gray(images).mean(dim=(1, 2, 3), keepdim=True)
    return (images * factor + mean * (1 - factor)).clamp(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the gray image."""
    return (images * factor + _gray(images) * (1 - factor)).clamp(0, 1)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images by ``shift``, a share of the color circle, keeping HSV's saturation and value."""
    value, low = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    chroma = value - low
    red, green, blue = images.split(1, dim=1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    offsets = images.new_tensor([5, 3, 1])[:, None, None]
    distance = (offsets + sixth + 6 * shift) % 6
    return value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1)


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    return (images * images.new_tensor(_GRAY)[:, None, None]).sum(dim=1, keepdim=True)
