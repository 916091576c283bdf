"""Images that are arrays or tensors: their layout, bands and range."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hjepa_engine.data.decode import DamagedImageError, check_size

#: Top, left, height, width.
Box = tuple[int, int, int, int]


def wrong_bands(bands: int, channels: int, mode: str = "") -> DamagedImageError:
    """An image has another number of bands than is asked for, or turned into."""
    what = f"{bands} band{'s' if bands != 1 else ''}{f' ({mode})' if mode else ''}"
    return DamagedImageError(f"{what}, but data.in_chans is {channels}")


def bands_last(image: Any, channels: int | None) -> NDArray[Any]:
    """An array or tensor as (H, W, C)."""
    is_tensor = isinstance(image, Tensor)
    array: NDArray[Any] = image.detach().cpu().numpy() if is_tensor else np.asanyarray(image)
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        raise DamagedImageError(f"an array must be (H, W), (H, W, C) or (C, H, W), got shape {array.shape}")
    first, last = array.shape[0], array.shape[2]
    known = {channels, 1, 3} if channels in (1, 3) else {channels}
    bands_first = first < last or (first == last and is_tensor)
    if (first in known) != (last in known):
        bands_first = first in known
    return np.moveaxis(array, 0, -1) if bands_first else array


def cut_array(image: Any, channels: int, box: Box | None, max_pixels: int) -> list[Image.Image]:
    """The bands of a part of an array."""
    array = bands_last(image, channels)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    check_size(array.shape[:2], max_pixels)
    bands = array.shape[2]
    if bands != channels and {bands, channels} != {1, 3}:
        raise wrong_bands(bands, channels)
    if array.dtype.kind == "f":
        array = in_unit_range(array)
    elif array.dtype not in (np.bool_, np.uint8, np.uint16, np.uint32):
        raise DamagedImageError(f"pixels must be uint8, uint16, uint32, bool or floats from 0 to 1, got {array.dtype}")
    if box is not None:
        top, left, height, width = box
        array = array[top : top + height, left : left + width]
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype.kind == "u" and array.dtype != np.uint8:
        array = array / float(np.iinfo(array.dtype).max)
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
        if channels == 1 and bands == 3:
            array = (array @ np.array([0.299, 0.587, 0.114], np.float32))[:, :, None]
    if array.dtype == np.uint8 and bands == 3 and channels in (1, 3):
        return [Image.fromarray(np.ascontiguousarray(array)).convert("L" if channels == 1 else "RGB")]
    return [Image.fromarray(np.ascontiguousarray(array[:, :, band])) for band in range(array.shape[2])]


def in_unit_range(pixels: NDArray[Any]) -> NDArray[Any]:
    """Floats from 0 to 1, or a refusal."""
    low, high = float(pixels.min()) + 0.0, float(pixels.max()) + 0.0  # -0 is 0
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise DamagedImageError(f"floating-point pixels must be from 0 to 1, got {low:g} to {high:g}")
    return pixels.clip(0, 1)
