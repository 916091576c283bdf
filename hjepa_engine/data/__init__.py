"""Datasets, keyed augmentation, samplers and loaders."""

from hjepa_engine.data.contents import data_changes, describe
from hjepa_engine.data.datasets import describe_data, open_digit_maps, open_split
from hjepa_engine.data.feature_store import FeatureStore
from hjepa_engine.data.features import (
    FeatureBatches,
    hold_out,
    mean_and_std,
    sample_per_class,
    sample_share,
    standardize_,
)
from hjepa_engine.data.fixed_subset import FixedImageSubset
from hjepa_engine.data.loading import ImageLoader, build_loader
from hjepa_engine.data.own import passed_splits
from hjepa_engine.data.sampler import EpochBatchSampler
from hjepa_engine.data.split import Contents, DatasetSplit
from hjepa_engine.data.workers import shutdown_workers

__all__ = [
    "Contents",
    "DatasetSplit",
    "FeatureBatches",
    "FeatureStore",
    "FixedImageSubset",
    "ImageLoader",
    "build_loader",
    "data_changes",
    "describe",
    "describe_data",
    "hold_out",
    "mean_and_std",
    "open_digit_maps",
    "open_split",
    "passed_splits",
    "sample_per_class",
    "sample_share",
    "shutdown_workers",
    "standardize_",
    "EpochBatchSampler",
]
