"""What a pretraining run says of itself while it goes on: handlers that look, and change nothing of the training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import ignite.distributed as idist
from torch import nn

from hjepa_engine import Config, create_evaluator
from hjepa_engine.config.schema import Level, resolve_levels
from hjepa_engine.data import DatasetSplit, FixedImageSubset, open_split
from hjepa_engine.data.datasets import DATASETS_WITH_PROBE_SPLIT
from hjepa_engine.engine import Trainer
from hjepa_engine.handlers import (
    BatchCollapse,
    CollapseGuard,
    CollapseMonitor,
    GpuStats,
    OnlineProbe,
    ParameterHistograms,
    Pictures,
    Preemption,
    StepTiming,
)
from hjepa_engine.levels import num_disjoint_cells
from hjepa_engine.metrics.collapse import images_needed
from hjepa_engine.metrics.knn import knn_accuracy
from hjepa_engine.recipes.common.heads import standardized, train_head
from hjepa_engine.run.folder import RunFolder
from hjepa_engine.steps import feature_map_step, feature_step
from hjepa_engine.types import Labeled, unwrap
from hjepa_engine.utils.rng import derive_seed

logger = logging.getLogger(__name__)


def build_monitors(
    config: Config, trainer: Trainer, train: DatasetSplit, val: DatasetSplit, preemption: Preemption
) -> list[Any]:
    """The configured monitors, to be attached to the trainer.

    Args:
        config: of the run.
        trainer: its engine.
        train: the training images.
        val: the validation images.
        preemption: ends long probes when the run is asked to stop.
    """
    monitors: list[Any] = [StepTiming()]
    if config.logging.system_metrics:
        monitors.append(GpuStats())
    if config.collapse.enabled:
        monitors += [_collapse_monitor(config, trainer, train), BatchCollapse(config.collapse.batch_every)]
    if config.guard.rules:
        monitors.append(CollapseGuard(config.guard.rules))
    if (epochs := config.online_probe.every) is not None:
        monitors.append(_online_probe(config, trainer, epochs, train, val, preemption))
    if config.logging.watch != "none":
        monitors.append(ParameterHistograms(config.logging.watch, config.logging.watch_frequency))
    if config.pictures.enabled:
        monitors.append(_pictures(config, trainer, train))
    return monitors


def _collapse_monitor(config: Config, trainer: Trainer, train: DatasetSplit) -> CollapseMonitor:
    options, levels = config.collapse, resolve_levels(config)
    encoders = nn.ModuleDict({name: unwrap(trainer.modules[f"{name}_encoder"]) for name in ("context", "target")})
    needed = images_of_levels(encoders["target"], levels)
    count = options.images or needed
    if count < needed and idist.get_rank() == 0:
        logger.warning(
            "collapse.images %d are too few for these levels: ranks mean something from %d on", count, needed
        )
    images = FixedImageSubset(config.data, train, count, 64, config.seed, idist.get_rank(), idist.get_world_size())
    evaluator = create_evaluator(partial(feature_map_step, levels=levels), encoders, trainer.device, trainer.amp_dtype)
    every = options.every or max(1, 50 * count // (config.data.batch_size * config.training.accumulation_steps))
    epoch_ends = config.checkpoint.metric.startswith("collapse/")
    return CollapseMonitor(evaluator, images, every, options.alpha_req, options.lidar_views, config.seed, epoch_ends)


def _online_probe(
    config: Config, trainer: Trainer, every: int, train: DatasetSplit, val: DatasetSplit, preemption: Preemption
) -> OnlineProbe:
    options, data, seed = config.online_probe, config.data, config.seed
    labeled = open_split(data, "probe", seed) if data.dataset in DATASETS_WITH_PROBE_SPLIT else train
    encoder = nn.ModuleDict({"encoder": unwrap(trainer.modules["target_encoder"])})
    evaluator = create_evaluator(feature_step, encoder, trainer.device, trainer.amp_dtype)
    preemption.watch(evaluator)

    def knn(known: Labeled, judged: Labeled) -> float:
        return knn_accuracy(*known, *judged, options.neighbors, options.temperature)

    def linear(known: Labeled, judged: Labeled) -> float:
        settings = replace(config.probe, epochs=options.linear_epochs)
        return train_head(*standardized(known, judged), labeled.num_classes, settings, seed, trainer.device)

    classifiers: dict[str, Callable[[Labeled, Labeled], float]] = {"knn": knn}
    if options.linear_epochs:
        classifiers["online_linear"] = linear
    # With one seed, images that are drawn when read (digit_pages) would have twins in the other split for neighbors.
    train_images = FixedImageSubset(
        data, labeled, options.train_images, seed=derive_seed(seed, "probe images", "train")
    )
    val_images = FixedImageSubset(data, val, options.val_images, seed=derive_seed(seed, "probe images", "val"))
    return OnlineProbe(evaluator, train_images, val_images, classifiers, every)


def _pictures(config: Config, trainer: Trainer, train: DatasetSplit) -> Pictures:
    options, grid = config.pictures, unwrap(trainer.modules["target_encoder"]).grid
    return Pictures(RunFolder(config).path, resolve_levels(config), grid, train.stats, options.every, options.images)


def images_of_levels(encoder: Any, levels: tuple[Level, ...]) -> int:
    """How many images have features enough at every level."""
    return max(images_needed(encoder.embed_dim, num_disjoint_cells(encoder.grid, level)) for level in levels)
