"""What is logged besides floats: images, histograms, texts, and any object that JSON can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Bins that a histogram has at most, which is what W&B takes.
MAX_BINS = 512


@dataclass(frozen=True)
class Image:
    """A picture.

    Args:
        pixels: (height, width, 3), uint8.
        path: of a file that holds the picture already; None: there is none.
    """

    pixels: NDArray[np.uint8]
    path: Path | None = None

    def __post_init__(self) -> None:
        array = np.asarray(self.pixels)
        if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape or array.dtype != np.uint8:
            raise ValueError(f"pixels must be (height, width, 3) uint8, got {array.shape} {array.dtype}")

    @classmethod
    def of(cls, image: Tensor | NDArray[Any]) -> Image:
        """From (H, W), (H, W, C) or, of tensors, (C, H, W), with C 1 or 3: uint8, or floats from 0 to 1.

        Floats out of range are clipped, NaN is black; true is white.

        Raises:
            ValueError: it is of another shape or type.
        """
        if isinstance(image, Tensor):
            tensor = image.detach()
            array = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
            array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
        else:
            array = np.asarray(image)
        shape, kind = getattr(image, "shape", array.shape), array.dtype
        array = array[..., None] if array.ndim == 2 else array
        if array.ndim != 3 or array.shape[-1] not in (1, 3) or 0 in array.shape:
            raise ValueError(f"an image must be (H, W), (H, W, C) or a tensor (C, H, W), C 1 or 3, got {tuple(shape)}")
        if kind != np.uint8:
            if kind.kind not in "fb":
                raise ValueError(f"an image must be uint8, or floats from 0 to 1, got {kind}")
            array = (np.nan_to_num(array.astype(np.float64)).clip(0, 1) * 255).round().astype(np.uint8)
        return cls(np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3))))


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges; a value on an edge is in the bin above it, one on the last edge in the last bin.

    Args:
        counts: (bins,), at most 512.
        edges: (bins + 1,), ascending.
        non_finite: values that were NaN or infinite, which are in no bin.
    """

    counts: tuple[int, ...]
    edges: tuple[float, ...]
    non_finite: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.counts) <= MAX_BINS or len(self.edges) != len(self.counts) + 1:
            raise ValueError(
                f"a histogram must have 1 to {MAX_BINS} counts and one edge more, "
                f"got {len(self.counts)} and {len(self.edges)} edges"
            )
        if not all(map(math.isfinite, self.edges)) or any(low >= high for low, high in pairwise(self.edges)):
            raise ValueError("the edges of a histogram must be finite and ascending")

    @classmethod
    def of(cls, values: Tensor | NDArray[Any], bins: int = 64) -> Histogram:
        """Of any real numbers, in bins of one width from the smallest to the largest."""
        return cls.of_all([values], bins)[0]

    @classmethod
    def of_all(cls, many: Iterable[Tensor | NDArray[Any]], bins: int = 64) -> list[Histogram]:
        """As :meth:`of`, of each; waits once for the device that they lie on."""
        return cls.read([cls.measure(values, bins) for values in many])

    @staticmethod
    @torch.no_grad()
    def measure(values: Tensor | NDArray[Any], bins: int = 64) -> Tensor:
        """Counts, non-finite values and edges of a histogram as (2 bins + 2,) float64, where the values lie.

        Raises:
            ValueError: too many bins, or numbers that are not real.
        """
        if not 1 <= bins <= MAX_BINS:
            raise ValueError(f"bins must be from 1 to {MAX_BINS}, got {bins}")
        tensor = torch.as_tensor(values).reshape(-1)
        if tensor.is_complex():
            raise ValueError(f"a histogram must be of real numbers, got {tensor.dtype}")
        tensor = tensor.double()
        finite, some = tensor.isfinite(), torch.zeros(1, dtype=torch.float64, device=tensor.device)
        low = torch.where(finite, tensor, math.inf).amin() if len(tensor) else some
        high = torch.where(finite, tensor, -math.inf).amax() if len(tensor) else some
        low, high = (torch.where(low > high, 0.0, end).reshape(1) for end in (low, high))  # no finite value
        scale = torch.maximum(low.abs(), high.abs())
        # One value only, or so close to one that floats have no room for edges between: bins around it.
        width = torch.where(high / 2 - low / 2 <= 2 * bins * 2**-52 * scale + 1e-300, 0.5 * scale.clamp(min=1.0), 0.0)
        share = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=tensor.device)
        most = torch.finfo(torch.float64).max
        edges = (low - width).clamp(min=-most) * (1 - share) + (high + width).clamp(max=most) * share
        bin_idx = torch.where(finite, torch.bucketize(tensor, edges[1:-1], right=True), bins)
        counts = torch.zeros(bins + 1, dtype=torch.int64, device=tensor.device)
        counts.scatter_add_(0, bin_idx, torch.ones(1, dtype=torch.int64, device=tensor.device).expand_as(bin_idx))
        return torch.cat([counts.double(), edges])

    @classmethod
    def read(cls, measured: Iterable[Tensor]) -> list[Histogram]:
        """Histograms of what :meth:`measure` returned, each with the same number of bins."""
        rows = list(measured)
        if not rows:
            return []
        bins = len(rows[0]) // 2 - 1
        return [
            cls(tuple(map(int, row[:bins])), tuple(row[bins + 1 :]), int(row[bins]))
            for row in torch.stack(rows).tolist()
        ]


@dataclass(frozen=True)
class Text:
    """A string, shown as text."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"a text must be a string, got {type(self.text).__name__}")
        # Half a surrogate pair has no bytes to be written as.
        object.__setattr__(self, "text", self.text.encode("utf-8", "replace").decode())


@dataclass(frozen=True)
class JsonValue:
    """Any object that JSON can hold: lists, dicts, numbers, strings, None; tensors and arrays become lists.

    ``value`` is a copy. NaN and infinities in it are None, which JSON has.

    Raises:
        TypeError: JSON cannot hold it.
    """

    value: Any

    def __post_init__(self) -> None:
        try:
            copy = json.loads(json.dumps(self.value, default=_as_list), parse_constant=lambda name: None)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"an object must be what JSON can hold: {error}") from error
        object.__setattr__(self, "value", copy)


def _as_list(value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is none of dict, list, number, string, None, tensor")


Media = Image | Histogram | Text | JsonValue
