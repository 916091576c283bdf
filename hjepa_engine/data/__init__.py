"""Data sets, keyed augmentation and loaders."""

from hjepa_engine.data.datasets import Source, open_source
from hjepa_engine.data.features import FeatureBatches, few_labels
from hjepa_engine.data.image_set import FixedImageSubset
from hjepa_engine.data.loading import (
    KeyedDataset,
    build_loader,
    collate,
    eval_transform,
    release_workers,
    train_transform,
)
from hjepa_engine.data.sampler import EpochBatchSampler

__all__ = [
    "EpochBatchSampler",
    "FeatureBatches",
    "FixedImageSubset",
    "KeyedDataset",
    "Source",
    "build_loader",
    "collate",
    "eval_transform",
    "few_labels",
    "open_source",
    "release_workers",
    "train_transform",
]
