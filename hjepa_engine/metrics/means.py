"""Effective rank of a matrix, and weighted means over batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping

import ignite.distributed as idist
import torch
from torch import Tensor

from hjepa_engine.metrics.collapse import spectrum_rank


def effective_rank(features: Tensor) -> float:
    """Effective rank of ``features`` (samples, D), from 1 to D (Roy and Vetterli, EUSIPCO 2007).

    The exponential of the entropy of the singular values of the centered matrix, normalized to sum 1. All samples being
    equal, it is 1. Use at least 2 D samples: the rank cannot exceed their number.

    >>> features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> round(effective_rank(features), 4), round(effective_rank(features + 20), 4)
    (2.0, 2.0)

    Raises:
        ValueError: ``features`` is no matrix or has no row.
    """
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"features must be (samples, D) with at least one sample, got {tuple(features.shape)}")
    features = features.detach().double()
    centered = features - features.mean(dim=0)
    values = torch.linalg.svdvals(centered)
    # Rounding leaves about this much of a constant column behind.
    noise = features.abs().max() * torch.finfo(torch.float64).eps * max(features.shape)
    return spectrum_rank(torch.where(values > noise, values, 0.0))


class WeightedMeans:
    """Weighted means by name, summed in float64 on the values' own device, over all ranks when computed."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def reset(self) -> None:
        """Forget everything."""
        self._sums, self._weights = {}, {}

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Add values (); a name may be missing from some calls, its mean is over the others."""
        sums = []
        for name, value in values.items():
            total = self._sums.get(name)
            if total is None or total.device != value.device:  # a resumed sum is on the CPU
                total = torch.zeros((), dtype=torch.float64, device=value.device) if total is None else total
                self._sums[name] = total = total.to(value.device)
            sums.append(total)
            self._weights[name] = self._weights.get(name, 0.0) + weight
        if sums:
            with torch.no_grad():
                torch._foreach_add_(sums, list(values.values()), alpha=weight)

    def compute(self) -> dict[str, float]:
        """The means, with one device synchronization. Collective: all ranks must call it with the same names."""
        if not self._sums:
            return {}
        # A resumed sum is on the CPU until its name is seen again.
        device = next((value.device for value in self._sums.values() if value.device.type != "cpu"), None)
        sums = torch.stack([value.to(device) for value in self._sums.values()])
        weights = torch.tensor(list(self._weights.values()), dtype=torch.float64, device=sums.device)
        both = torch.stack([sums, weights])
        if idist.get_world_size() > 1:
            both = idist.all_reduce(both)  # type: ignore[assignment]
        return dict(zip(self._sums, (both[0] / both[1]).tolist(), strict=True))

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Sums and weights of this rank."""
        return {"sums": {name: value.item() for name, value in self._sums.items()}, "weights": dict(self._weights)}

    def load_state_dict(self, state_dict: dict[str, dict[str, float]]) -> None:
        """Restore what ``state_dict`` returned."""
        self._sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state_dict["sums"].items()}
        self._weights = dict(state_dict["weights"])
