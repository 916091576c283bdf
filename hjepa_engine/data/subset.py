"""Parts of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hjepa_engine.data.split import ImageDataset, SplitName
from hjepa_engine.utils.rng import generator


class Subset:
    """Some samples of a dataset, like ``torch.utils.data.Subset`` but with the types needed here."""

    def __init__(self, images: ImageDataset, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[self.indices[index]]


def random_split(length: int, split: SplitName, fraction: float, seed: int) -> list[int]:
    """Indices of one side of a random split, for a dataset that never changes."""
    order: list[int] = torch.randperm(length, generator=generator(seed, "validation split")).tolist()
    held = max(1, round(fraction * length))
    return sorted(order[:held] if split == "val" else order[held:])
