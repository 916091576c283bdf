"""Effective rank of a matrix, and weighted means over batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

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
        # By the names that were added together: two operations for all of them, however many there are.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._weights: dict[tuple[str, ...], float] = {}

    def reset(self) -> None:
        """Forget everything."""
        self._sums, self._weights = {}, {}

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Add values (); a name may be missing from some calls, its mean is over the others."""
        if not values:
            return
        names, added = tuple(values), _stacked([value.detach() for value in values.values()])
        total = self._sums.get(names)
        if total is None:
            self._sums[names], self._weights[names] = added.double() * weight, weight
            return
        if total.device != added.device:  # it was resumed
            self._sums[names] = total = total.to(added.device)
        total.add_(added, alpha=weight)
        self._weights[names] += weight

    def compute(self) -> dict[str, float]:
        """The means, with one device synchronization. Collective: all ranks must call it with the same names."""
        if not self._sums:
            return {}
        # A resumed sum is on the CPU until its name is seen again.
        device = next((total.device for total in self._sums.values() if total.device.type != "cpu"), None)
        names = {name: number for number, name in enumerate(dict.fromkeys(chain.from_iterable(self._sums)))}
        weights = [0.0] * len(names)
        sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        for group, total in self._sums.items():
            numbers = [names[name] for name in group]
            sums.index_add_(0, torch.tensor(numbers, device=device), total.to(device))
            for number in numbers:
                weights[number] += self._weights[group]
        both = torch.stack([sums, torch.tensor(weights, dtype=torch.float64, device=device)])
        if idist.get_world_size() > 1:
            both = idist.all_reduce(both)  # type: ignore[assignment]
        return dict(zip(names, (both[0] / both[1]).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Names, sums and weights of this rank."""
        return {
            "names": [list(names) for names in self._sums],
            "sums": [total.tolist() for total in self._sums.values()],
            "weights": list(self._weights.values()),
        }

    @staticmethod
    def merge_states(states: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Any]:
        """For other ranks than wrote ``states``: rank 0 has the sums of all, the others have the names with nothing added.

        >>> one = {"names": [["loss"]], "sums": [[2.0]], "weights": [4.0]}
        >>> WeightedMeans.merge_states([one, one], rank=0)
        {'names': [['loss']], 'sums': [[4.0]], 'weights': [8.0]}
        >>> WeightedMeans.merge_states([one, one], rank=1)
        {'names': [['loss']], 'sums': [[0.0]], 'weights': [0.0]}
        """
        totals: dict[tuple[str, ...], list[float]] = {}  # the sums, and then the weight
        for state in states:
            for names, sums, weight in zip(state["names"], state["sums"], state["weights"], strict=True):
                added = [*sums, weight] if rank == 0 else [0.0] * (len(sums) + 1)
                before = totals.setdefault(tuple(names), [0.0] * len(added))
                totals[tuple(names)] = [one + other for one, other in zip(before, added, strict=True)]
        return {
            "names": [list(names) for names in totals],
            "sums": [values[:-1] for values in totals.values()],
            "weights": [values[-1] for values in totals.values()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        groups = [tuple(names) for names in state_dict["names"]]
        sums = (torch.tensor(values, dtype=torch.float64) for values in state_dict["sums"])
        self._sums = dict(zip(groups, sums, strict=True))
        self._weights = dict(zip(groups, state_dict["weights"], strict=True))


def _stacked(values: list[Tensor]) -> Tensor:
    """Numbers () as (N,); those of several devices or types in float64, on a GPU if one of them is."""
    first = values[0]
    if any(value.device != first.device or value.dtype != first.dtype for value in values):
        device = next((value.device for value in values if value.device.type != "cpu"), first.device)
        values = [value.to(device, torch.float64) for value in values]
    return torch.stack(values)
