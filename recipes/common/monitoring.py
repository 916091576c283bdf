"""Monitoring handlers of a pretraining run: they measure and do not change the training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import ignite.distributed as idist
import torch
from torch import nn

from hjepa_engine import Config, create_evaluator
from hjepa_engine.config.schema import Level
from hjepa_engine.data import DatasetSplit, FixedImageSubset, open_split
from hjepa_engine.data.datasets import has_probe_split
from hjepa_engine.data.summary import why_unlabeled
from hjepa_engine.engine import Trainer
from hjepa_engine.errors import ConfigError
from hjepa_engine.handlers import (
    BatchCollapse,
    CollapseMonitor,
    DamagedImages,
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
from hjepa_engine.models import encoder_name
from hjepa_engine.recipes.common.heads import standardized, train_head
from hjepa_engine.run.folder import RunFolder
from hjepa_engine.steps import feature_map_step, feature_step
from hjepa_engine.types import Labeled, unwrap
from hjepa_engine.utils.rng import derive_seed

logger = logging.getLogger(__name__)


def build_monitors(
    config: Config,
    trainer: Trainer,
    train: DatasetSplit,
    val: DatasetSplit,
    preemption: Preemption,
    damaged: DamagedImages,
) -> list[Any]:
    """The configured monitors, to be attached to the trainer.

    Args:
        config: of the run.
        trainer: its engine.
        train: the training images.
        val: the validation images.
        preemption: ends long probes when the run is asked to stop.
        damaged: counts the training images that cannot be read.
    """
    monitors: list[Any] = [StepTiming()]
    encoder = encoder_name(config, trainer.modules)
    if config.logging.system_metrics:
        monitors.append(GpuStats())
    if config.collapse.enabled:
        monitors += _collapse_monitors(config, trainer, train, damaged)
    if config.online_probe.every is not None:
        if encoder is None:
            warn_no_encoder("no online probe", trainer.modules)
        elif why := why_unlabeled(train):
            warn_no_labels("no online probe", why)
        else:
            monitors.append(_online_probe(config, trainer, encoder, train, val, preemption))
    if config.logging.watch != "none":
        monitors.append(ParameterHistograms(config.logging.watch, config.logging.watch_frequency))
    if config.pictures.enabled and encoder is not None:
        monitors += _pictures(config, trainer, encoder, train)
    return monitors


def warn_no_encoder(consequence: str, modules: nn.ModuleDict) -> None:
    """Warn, on rank 0, of what a run without an encoder does without."""
    if idist.get_rank() == 0:
        names = ", ".join(modules)
        logger.warning("%s: none of the modules %s is an encoder; model.encoder names one", consequence, names)


def warn_no_labels(consequence: str, why: str) -> None:
    """Warn, on rank 0, of what a run on images without labels does without."""
    if idist.get_rank() == 0:
        logger.warning("%s, which needs labels of several classes: %s", consequence, why)


def _measured(config: Config, modules: nn.ModuleDict) -> dict[str, str]:
    """Names of the encoders whose collapse is measured, by their name in the metrics.

    Raises:
        ConfigError: ``collapse.modules`` names one that is not there.
    """
    names = config.collapse.modules
    if names is None:
        names = {name: f"{name}_encoder" for name in ("context", "target") if f"{name}_encoder" in modules}
        encoder = encoder_name(config, modules)
        return names or ({} if encoder is None else {"target": encoder})
    for name in names.values():
        if name not in modules:
            raise ConfigError(f"collapse.modules must name modules ({', '.join(modules)}), got {name!r}")
    return names


def levels_of(modules: nn.ModuleDict) -> tuple[Level, ...]:
    """The levels that the predictor predicts; none where there is no such predictor."""
    return tuple(getattr(unwrap(modules["predictor"]), "levels", ())) if "predictor" in modules else ()


def _has_pixels_alone(config: Config, levels: tuple[Level, ...]) -> bool:
    """Whether the step runs no target encoder, and has no tokens of it."""
    return config.step is None and bool(levels) and not any(level.depth for level in levels)


def _token_shape(config: Config, trainer: Trainer, name: str) -> tuple[int, int]:
    """Number and width of the tokens that an encoder makes of an image: (N, D)."""
    encoder, data = unwrap(trainer.modules[name]), config.data
    if hasattr(encoder, "grid") and hasattr(encoder, "embed_dim"):
        return encoder.grid[0] * encoder.grid[1], encoder.embed_dim
    image = {"images": torch.zeros(1, data.channels, *data.size)}
    evaluator = create_evaluator(feature_map_step, nn.ModuleDict({name: encoder}), trainer.device)
    tokens: torch.Tensor = evaluator.run([image]).output[name]
    return tokens.shape[1], tokens.shape[2]


def _collapse_monitors(config: Config, trainer: Trainer, train: DatasetSplit, damaged: DamagedImages) -> list[Any]:
    options, names = config.collapse, _measured(config, trainer.modules)
    if not names:
        warn_no_encoder("collapse is not measured", trainer.modules)
        return []
    encoders = nn.ModuleDict({name: unwrap(trainer.modules[module]) for name, module in names.items()})
    has_levels = all(hasattr(encoder, "features") and hasattr(encoder, "grid") for encoder in encoders.values())
    levels = levels_of(trainer.modules) if has_levels else ()
    shapes = [_token_shape(config, trainer, module) for module in names.values()]
    num_patches = max(shape[0] for shape in shapes)
    needed = max(images_needed(dim, number) for number, dim in shapes)
    if levels:
        needed = max(needed, *(images_of_levels(encoder, levels) for encoder in encoders.values()))
    outputs = dict(options.outputs)
    if _has_pixels_alone(config, levels):
        outputs = {name: output for name, output in outputs.items() if output != "target_tokens"}
    count = options.images or needed
    if count < needed and idist.get_rank() == 0:
        logger.warning(
            "collapse.images %d are too few for these levels: ranks mean something from %d on", count, needed
        )
    images = FixedImageSubset(config.data, train, count, 64, config.seed, idist.get_rank(), idist.get_world_size())
    evaluator = create_evaluator(partial(feature_map_step, levels=levels), encoders, trainer.device, trainer.amp_dtype)
    damaged.attach(evaluator)
    every = options.every or max(1, 50 * count // (config.data.batch_size * config.training.accumulation_steps))
    epoch_ends = config.checkpoint.metric.startswith("collapse/")
    return [
        CollapseMonitor(evaluator, images, every, options.alpha_req, options.lidar_views, config.seed, epoch_ends),
        BatchCollapse(options.batch_every, outputs, num_patches),
    ]


def _online_probe(
    config: Config, trainer: Trainer, name: str, train: DatasetSplit, val: DatasetSplit, preemption: Preemption
) -> OnlineProbe:
    options, data, seed = config.online_probe, config.data, config.seed
    labeled = open_split(data, "probe", seed) if has_probe_split(data) else train
    encoder = nn.ModuleDict({"encoder": unwrap(trainer.modules[name])})
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
    assert options.every is not None
    return OnlineProbe(evaluator, train_images, val_images, classifiers, options.every)


def _pictures(config: Config, trainer: Trainer, name: str, train: DatasetSplit) -> list[Pictures]:
    options, grid = config.pictures, getattr(unwrap(trainer.modules[name]), "grid", None)
    if grid is None:
        if idist.get_rank() == 0:
            logger.warning("no pictures: the module %s has no grid, (H, W) in patches", name)
        return []
    levels = levels_of(trainer.modules)
    tokens = None if _has_pixels_alone(config, levels) else config.collapse.outputs.get("target", "target_tokens")
    folder = RunFolder(config).path
    return [Pictures(folder, levels, grid, train.stats, options.every, options.images, tokens)]


def images_of_levels(encoder: Any, levels: tuple[Level, ...]) -> int:
    """How many images have features enough at every level."""
    return max(images_needed(encoder.embed_dim, num_disjoint_cells(encoder.grid, level)) for level in levels)
