"""Linear probes of frozen encoders, compared with a random encoder and raw pixels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import ignite.distributed as idist
import torch
from torch import nn

from hjepa_engine import Config
from hjepa_engine.data import (
    mean_and_std,
    open_split,
    sample_per_class,
    standardize_,
)
from hjepa_engine.data.summary import why_unlabeled
from hjepa_engine.devices import choose_device
from hjepa_engine.errors import DataError
from hjepa_engine.loggers.jsonl import JsonlWriter
from hjepa_engine.metrics.names import FINAL_PROBES, PROBE
from hjepa_engine.recipes.common.gathering import SPLITS, ProbeData, gather_splits
from hjepa_engine.recipes.common.heads import train_head
from hjepa_engine.run.folder import own_folders
from hjepa_engine.steps import feature_step
from hjepa_engine.types import Labeled

logger = logging.getLogger(__name__)


def open_probe_data(config: Config) -> ProbeData:
    """Labeled images to train a probe on, and held-out ones.

    Raises:
        DataError: they cannot be opened, or have no labels.
    """
    exclude = own_folders(config)
    data: ProbeData = {name: open_split(config.data, name, config.seed, exclude) for name in SPLITS}
    for split in data.values():
        if not split.num_classes:
            raise DataError(f"a linear probe needs labels: {why_unlabeled(split)}")
    return data


def read_features(
    config: Config, encoder: nn.Module | None, device: torch.device, data: ProbeData | None = None
) -> tuple[Labeled, Labeled, int]:
    """Standardized features (samples, F) and labels of the probe and validation splits, and the number of classes.

    Images without a label are left out. Collective: processes share the images.

    Args:
        config: configuration of the run, with the settings in ``probe``.
        encoder: from images to tokens (B, N, D) or features (B, D); None: raw pixels.
        device: where features are computed.
        data: the splits, if they are opened already.

    Raises:
        DataError: no image of a split has a label.
    """
    data = data or open_probe_data(config)
    step = partial(feature_step, features=config.probe.features)
    (features, labels), val = (
        (found["features"], found["labels"]) for found in gather_splits(config, step, encoder, device, data)
    )
    if data["probe"].num_classes > 1 and len(torch.cat([labels, val[1]]).unique()) == 1:
        logger.warning("all images have the same label: the accuracy of a linear probe means nothing")
    if config.probe.labels_per_class is not None:
        chosen = sample_per_class(labels, config.probe.labels_per_class, config.seed)
        features, labels = features[chosen], labels[chosen]
    mean, std = mean_and_std(features)
    train_set, val_set = (standardize_(features, mean, std), labels), (standardize_(val[0], mean, std), val[1])
    return train_set, val_set, data["probe"].num_classes


def probe(
    config: Config,
    encoder: nn.Module | None,
    name: str,
    folder: Path | None = None,
    bar: bool = False,
    data: ProbeData | None = None,
    log: str = "probe",
) -> float:
    """Train a linear head on frozen features; returns its validation accuracy after the last epoch, from 0 to 1.

    Collective: processes share the images.

    Args:
        config: configuration of the run, with the settings in ``probe``.
        encoder: from images to tokens (B, N, D) or features (B, D); None: raw pixels.
        name: name of the encoder, for the progress bar and the log.
        folder: folder of ``<log>_<name>.jsonl``; None: do not write it.
        bar: show a progress bar.
        data: the splits, if they are opened already.
        log: start of the log's file name.
    """
    device = choose_device(config.device)
    train, val, num_classes = read_features(config, None if encoder is None else encoder.to(device), device, data)
    writers = []
    if folder is not None and idist.get_rank() == 0:
        writers.append(JsonlWriter(folder / f"{log}_{name}.jsonl"))
    return train_head(
        train, val, num_classes, config.probe, config.seed, device, writers, f"probe of {name}" if bar else None
    )


def evaluate_encoders(
    config: Config,
    encoders: Mapping[str, nn.Module | None],
    folder: Path | None = None,
    bar: bool = False,
    data: ProbeData | None = None,
    log: str = "probe",
) -> dict[str, float]:
    """Probe accuracy of each encoder, by name; see :func:`probe`. Collective."""
    data = data or open_probe_data(config)
    return {name: probe(config, encoder, name, folder, bar, data, log) for name, encoder in encoders.items()}


def as_metrics(results: dict[str, float]) -> dict[str, float]:
    """Accuracies by their logged names: ``probe/linear``, ``probe/linear_random``, ``probe/linear_pixels``."""
    return {FINAL_PROBES.get(name, f"{PROBE}linear_{name}"): accuracy for name, accuracy in results.items()}


def describe(results: dict[str, float], config: Config) -> str:
    """The table that recipes print."""
    labels = config.probe.labels_per_class
    how = f"{config.probe.features} tokens, {'all labels' if labels is None else f'{labels} labels per class'}"
    names = {"trained": "trained encoder", "random": "random encoder", "pixels": "raw pixels"}
    return "\n".join([f"linear probe ({how}):", *(f"  {names[n]:24}{100 * results[n]:5.1f} %" for n in results)])
