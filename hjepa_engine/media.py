"""What is logged besides floats: images, histograms, texts, and any object that JSON can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Image:
    """A picture.

    Args:
        pixels: (height, width, 3), uint8.
    """

    pixels: NDArray[np.uint8]

    @classmethod
    def of(cls, image: Tensor | NDArray[Any]) -> Image:
        """From (H, W), (H, W, C) or, of tensors, (C, H, W), with C 1 or 3: uint8, or floats from 0 to 1.

        Raises:
            ValueError: it is of another shape.
        """
        if isinstance(image, Tensor):
            array = image.detach().cpu().float().numpy() if image.is_floating_point() else image.cpu().numpy()
            array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
        else:
            array = np.asarray(image)
        array = array[..., None] if array.ndim == 2 else array
        if array.ndim != 3 or array.shape[-1] not in (1, 3) or 0 in array.shape:
            raise ValueError(
                f"an image must be (H, W), (H, W, C) or a tensor (C, H, W), C 1 or 3, got {tuple(image.shape)}"
            )
        if array.dtype != np.uint8:
            array = (np.nan_to_num(array.astype(np.float64)).clip(0, 1) * 255).round().astype(np.uint8)
        return cls(np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3))))


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges.

    Args:
        counts: (bins,).
        edges: (bins + 1,), ascending.
        non_finite: values that were NaN or infinite, which are in no bin.
    """

    counts: tuple[int, ...]
    edges: tuple[float, ...]
    non_finite: int = 0

    @classmethod
    def of(cls, values: Tensor | NDArray[Any], bins: int = 64) -> Histogram:
        """Of any numbers, between the smallest and the largest."""
        tensor = torch.as_tensor(values).detach().reshape(-1)
        tensor = tensor.float() if tensor.dtype != torch.float64 else tensor
        finite = tensor[tensor.isfinite()]
        low, high = (finite.min().item(), finite.max().item()) if len(finite) else (0.0, 0.0)
        if high <= low:  # one value only: bins around it
            width = max(abs(low), 1.0) * 0.5
            low, high = low - width, high + width
        counts = torch.histc(finite, bins, low, high) if len(finite) else torch.zeros(bins)
        edges = np.linspace(low, high, bins + 1)
        return cls(tuple(int(c) for c in counts.tolist()), tuple(edges.tolist()), len(tensor) - len(finite))


@dataclass(frozen=True)
class Text:
    """A text."""

    text: str


@dataclass(frozen=True)
class Anything:
    """Any object that JSON can hold: lists, dicts, numbers, texts, None."""

    value: Any


Media = Image | Histogram | Text | Anything
