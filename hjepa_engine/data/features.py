"""Batches of frozen features, kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hjepa_engine.data.sampler import EpochBatchSampler
from hjepa_engine.utils.rng import generator


class FeatureBatches:
    """Iterate over batches of ``features`` (B, F) and ``labels`` (B,).

    Args:
        features: (samples, F).
        labels: (samples,).
        batch_size: B; the last batch of an epoch may be smaller.
        seed: seed of the order.
        shuffle: reshuffle every epoch.
    """

    def __init__(self, features: Tensor, labels: Tensor, batch_size: int, seed: int = 0, shuffle: bool = True) -> None:
        self.features, self.labels = features, labels
        self.sampler = EpochBatchSampler(len(features), batch_size, seed, shuffle, drop_last=False)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for keys in self.sampler:
            idx = torch.tensor([index for _, index in keys])
            yield {"features": self.features[idx], "labels": self.labels[idx]}


def sample_per_class(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Draw ``per_class`` samples of each class (all of them, if there are fewer); returns their sorted indices (n,)."""
    order = torch.randperm(len(labels), generator=generator(seed, "few labels"))
    chosen = [order[labels[order] == label][:per_class] for label in torch.unique(labels)]
    return torch.cat(chosen).sort().values
