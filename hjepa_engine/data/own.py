"""Any map-style data set: one that a function or class of the user's own makes, or one that is passed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data.folder import IMAGENET_STATS
from hjepa_engine.data.split import UNLABELED, DatasetSplit, ImageDataset, SplitName
from hjepa_engine.data.subset import Subset
from hjepa_engine.errors import ConfigError, DataError
from hjepa_engine.utils.imports import import_callable
from hjepa_engine.utils.rng import in_validation


class OwnImages:
    """Samples of a map-style data set as (image, label).

    Args:
        name: of the data set, in messages.
        samples: its items are (image, label), a dict with ``image`` and perhaps ``label``, or an image alone.
        num_classes: labels are from 0 to ``num_classes - 1``, or -1; 0: they are not read.
    """

    def __init__(self, name: str, samples: Any, num_classes: int) -> None:
        self.name, self.samples, self.num_classes = name, samples, num_classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        item, label = self.samples[index], None
        if isinstance(item, Mapping):
            if "image" not in item:
                raise DataError(f"{self.name}: sample {index} must have the key image, got {', '.join(map(str, item))}")
            image, label = item["image"], item.get("label")
        elif isinstance(item, (tuple, list)):
            if len(item) not in (1, 2):
                raise DataError(f"{self.name}: sample {index} must be (image, label), got {len(item)} values")
            image, label = item[0], item[1] if len(item) == 2 else None
        else:
            image = item
        return image, UNLABELED if label is None or not self.num_classes else self._class_index(index, label)

    def _class_index(self, index: int, label: Any) -> int:
        try:
            found = int(label)
        except (TypeError, ValueError):
            found = self.num_classes
        if not UNLABELED <= found < self.num_classes:
            allowed = f"from 0 to {self.num_classes - 1}, or -1 for none"
            raise DataError(f"{self.name}: the label of sample {index} must be {allowed}, got {label!r}")
        return found


def open_own(config: DataConfig, split: SplitName, seed: int) -> DatasetSplit:
    """A split of the data set that ``config.class_path`` makes.

    It is called with ``split`` ("train" or "val") if it has an argument of that name that ``init_args`` do not give; else
    its samples are split by their index: one stays where it is when others are added behind it.

    Raises:
        ConfigError: it cannot be imported or called, or what it makes is no map-style data set.
        DataError: a split has no images.
    """
    path, arguments = str(config.class_path), dict(config.init_args)
    make = import_callable("data", path)
    try:
        has_splits = "split" in inspect.signature(make).parameters and "split" not in arguments
        samples = make(**arguments, **({"split": "val" if split == "val" else "train"} if has_splits else {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.init_args: {error}") from error
    if not _is_map_style(samples):
        raise ConfigError(f"data.class_path: {path} must make a data set with __len__ and __getitem__, got {samples!r}")
    classes = _classes(samples)
    images: ImageDataset = OwnImages("data.class_path", samples, len(classes))
    if not has_splits:
        held_out = in_validation(np.arange(len(images), dtype=np.uint64), config.val_fraction, seed)
        images = Subset(images, np.flatnonzero(held_out == (split == "val")).tolist())
    if not len(images):
        raise DataError(f"data.class_path: {path} has no images for the {'val' if split == 'val' else 'train'} split")
    return DatasetSplit(images, classes, IMAGENET_STATS, draws=True)


def passed_splits(data: Any) -> dict[SplitName, DatasetSplit]:
    """Splits ``train`` and ``val`` of two map-style data sets; the classes are those of ``train``.

    Raises:
        ConfigError: they are not two map-style data sets.
        DataError: one has no images, or ``val`` has other classes.
    """
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise ConfigError(f"data must be two data sets, (train, val), got {data!r}")
    train, val = data
    splits: dict[SplitName, Any] = {"train": train, "val": val}
    for name, samples in splits.items():
        if not _is_map_style(samples):
            raise ConfigError(f"data: {name} must be a data set with __len__ and __getitem__, got {samples!r}")
        if not len(samples):
            raise DataError(f"data: {name} has no images")
    classes, others = _classes(train), _classes(val)
    if others and others != classes:
        raise DataError(f"data: val must have the classes of train, {_names(classes)}, got {_names(others)}")

    return {
        name: DatasetSplit(OwnImages(f"data {name}", samples, len(classes)), classes, IMAGENET_STATS, draws=True)
        for name, samples in splits.items()
    }


def _is_map_style(samples: Any) -> bool:
    return hasattr(samples, "__len__") and hasattr(samples, "__getitem__")


def _classes(samples: Any) -> tuple[str, ...]:
    """Names of a data set's classes, where it says them; a subset has those of the whole."""
    while isinstance(samples, torch.utils.data.Subset):
        samples = samples.dataset
    return tuple(map(str, getattr(samples, "classes", None) or range(getattr(samples, "num_classes", 0))))


def _names(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "") or "none"
