"""Matrix products of a step, and how fast the device could compute them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Dense TFLOP/s that NVIDIA publishes, by what the GPU's name contains: in 16-bit types, and in float32 without TF32. The
#: first name that fits counts.
PUBLISHED: dict[str, tuple[float, float]] = {
    "B200": (2250, 75),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
}


class Peak(NamedTuple):
    """The most FLOP/s of a device, and where that is from."""

    flop_per_s: float
    source: str


class MatrixProducts(TorchDispatchMode):
    """Count the matrix products of a step by operator, shapes and types."""

    NAMES = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the product and compute it."""
        if func._schema.name in self.NAMES:
            one, other = [part for part in args if isinstance(part, torch.Tensor)][-2:]
            self.found[(tuple(one.shape), tuple(other.shape), one.dtype, one.device)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> int:
        """Floating-point operations of one step."""
        return sum(2 * _size(one) * other[-1] * number for (one, other, *_), number in self.found.items())

    def seconds(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Time of them all, each shape at its best of five."""
        total = 0.0
        for (one, other, dtype, device), number in self.found.items():
            left, right = (torch.randn(shape, device=device).to(dtype) for shape in (one, other))
            total += number * best_time(lambda a=left, b=right: a @ b, device, 5, clock)  # type: ignore[misc]
        return total


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def best_time(
    action: Callable[[], object], device: torch.device, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The least seconds of an action on a device."""
    times = []
    for _ in range(repeats):
        began = clock()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - began)
    return min(times)


def published_peak(name: str, dtype: torch.dtype) -> Peak | None:
    """The published rate of the GPU of this name; None if it is not known.

    >>> published_peak("NVIDIA H100 80GB HBM3", torch.bfloat16)
    Peak(flop_per_s=989000000000000.0, source='published for H100')
    """
    for known, (half, single) in PUBLISHED.items():
        if known in name:
            return Peak(1e12 * (single if dtype == torch.float32 else half), f"published for {known}")
    return None


@cache
def peak_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> Peak:
    """The published rate of a GPU, else the best of a product of two matrices of 2048 x 2048, measured now."""
    known = published_peak(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    if known is not None:
        return known
    one, other = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    return Peak(2 * 2048**3 / best_time(lambda: one @ other, device, 5, clock), "measured, 2048 x 2048")
