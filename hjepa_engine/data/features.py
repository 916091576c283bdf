"""Batches of frozen features, their standardization, and choices among labeled samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hjepa_engine.data.sampler import EpochBatchSampler
from hjepa_engine.utils.rng import generator

#: Numbers of features that are computed with at once: 32 MB in float64.
_CHUNK = 2**22


class FeatureBatches:
    """Iterate over batches of ``features`` (B, ...) and ``labels`` (B, ...).

    Args:
        features: (samples, ...), in memory or memory-mapped.
        labels: (samples, ...).
        batch_size: B; the last batch of an epoch may be smaller.
        seed: seed of the order.
        shuffle: reshuffle every epoch.
        rows: indices (n,) of the samples to iterate over; all by default.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rows: Tensor | None = None,
    ) -> None:
        self.features, self.labels, self.rows = features, labels, rows
        size = len(features) if rows is None else len(rows)
        self.sampler = EpochBatchSampler(size, batch_size, seed, shuffle, drop_last=False)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for keys in self.sampler:
            idx = torch.tensor([index for _, index in keys])
            if self.rows is not None:
                idx = self.rows[idx]
            yield {"features": self.features[idx], "labels": self.labels[idx]}


def sample_per_class(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Draw ``per_class`` samples of each class (all of them, if there are fewer); returns their sorted indices (n,)."""
    return torch.cat([rows[:per_class] for rows in _shuffled_by_class(labels, seed, "few labels")]).sort().values


def sample_share(labels: Tensor, share: float, seed: int) -> Tensor:
    """Draw ``share`` of each class, rounded, at least one sample of it; returns their sorted indices (n,)."""
    parts = [rows[: max(1, round(share * len(rows)))] for rows in _shuffled_by_class(labels, seed, "share of labels")]
    return torch.cat(parts).sort().values


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split samples into those to train on and those to choose by: ``share`` of each class, rounded.

    Returns:
        Sorted indices of both parts. The second one may be empty, and lack classes with few samples.
    """
    kept, held = [], []
    for rows in _shuffled_by_class(labels, seed, "held out"):
        number = round(share * len(rows))
        held.append(rows[:number])
        kept.append(rows[number:])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def _shuffled_by_class(labels: Tensor, seed: int, purpose: str) -> list[Tensor]:
    order = torch.randperm(len(labels), generator=generator(seed, purpose))
    return [order[labels[order] == label] for label in torch.unique(labels)]


def mean_and_std(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (F,) of features (n, F), summed in float64, a part of them at a time.

    The deviation of a feature that is constant, or next to that, is 1: dividing by it would blow up other images (the
    border of digits).
    """
    parts = features.split(max(1, _CHUNK // features.shape[1]))
    mean = sum(part.double().sum(dim=0) for part in parts) / len(features)
    squares = sum((part.double() - mean).square().sum(dim=0) for part in parts)
    std = (torch.as_tensor(squares) / max(1, len(features) - 1)).sqrt()
    std = torch.where(std < 1e-4 * std.max(), 1.0, std)
    # Where all are constant, nothing is.
    std = torch.where(std > 0, std, 1.0)
    return torch.as_tensor(mean).to(features.dtype), std.to(features.dtype)


def standardize_(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract ``mean`` and divide by ``std`` in place, a part of the features (n, F) at a time; returns them."""
    for part in features.split(max(1, _CHUNK // features.shape[1])):
        part.sub_(mean).div_(std)
    return features
