"""What a split of a dataset is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

#: ``train``: pretraining images, labels unused; ``probe``: labeled images to train a probe on; ``val``: held-out images.
SplitName = Literal["train", "probe", "val"]

#: Mean and standard deviation of each channel, for pixels from 0 to 1.
Stats = tuple[tuple[float, ...], tuple[float, ...]]

#: Label of an image that has none.
UNLABELED = -1


class ImageDataset(Protocol):
    """A map-style dataset of (image, class index) pairs; an image is a PIL image, an array or a tensor."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


@dataclass(frozen=True)
class Contents:
    """Which files a split consists of, for the start line, ``data.json`` and checkpoints."""

    folders: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Number of files in each folder, and a fingerprint of their relative paths and sizes."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """What was left out: why, and how many files."""
    notes: tuple[str, ...] = ()
    """What else a user should know, a sentence each."""


@dataclass(frozen=True)
class DatasetSplit:
    """One split of a dataset."""

    images: ImageDataset
    classes: tuple[str, ...]
    """Names of the classes; empty: the images have no labels."""
    stats: Stats
    """Mean and standard deviation of each channel, for pixels from 0 to 1."""
    name_of: Callable[[int], str] = str
    """Name of sample i in messages: its path, if it has one."""
    contents: Contents = field(default_factory=Contents)
    draws: bool = False
    """Whether samples may be drawn from the global generators, which are then seeded before each."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0: the images have no labels."""
        return len(self.classes)
