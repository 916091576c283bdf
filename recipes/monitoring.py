"""What a pretraining run says of itself while it goes on: handlers that look, and change nothing of the training."""

from __future__ import annotations

from functools import partial
from typing import Any

import ignite.distributed as idist
from torch import nn

from hjepa_engine import Config, create_evaluator
from hjepa_engine.config import Level, resolve_levels
from hjepa_engine.data import ImageSet, Source
from hjepa_engine.data.views import images_needed
from hjepa_engine.engine import Trainer
from hjepa_engine.handlers import BatchCollapse, CollapseGuard, CollapseMonitor
from hjepa_engine.levels import windows
from hjepa_engine.steps import feature_map_step
from hjepa_engine.types import unwrap


def build_monitors(config: Config, trainer: Trainer, train: Source) -> list[Any]:
    """The configured monitors, to be attached to the trainer.

    Args:
        config: of the run.
        trainer: its engine.
        train: the training images.
    """
    monitors: list[Any] = []
    if config.collapse.enabled:
        monitors += [_collapse_monitor(config, trainer, train), BatchCollapse(config.collapse.batch_every)]
    if config.guard.rules:
        monitors.append(CollapseGuard(config.guard.rules))
    return monitors


def _collapse_monitor(config: Config, trainer: Trainer, train: Source) -> CollapseMonitor:
    options, levels = config.collapse, resolve_levels(config)
    encoders = nn.ModuleDict({name: unwrap(trainer.modules[f"{name}_encoder"]) for name in ("context", "target")})
    count = options.images or images_of_levels(encoders["target"], levels)
    images = ImageSet(
        config.data, train, count, seed=config.seed, rank=idist.get_rank(), world_size=idist.get_world_size()
    )
    evaluator = create_evaluator(partial(feature_map_step, levels=levels), encoders, trainer.device, trainer.amp_dtype)
    every = options.every or max(1, 50 * count // (config.data.batch_size * config.training.accumulation_steps))
    return CollapseMonitor(evaluator, images, every, options.alpha_req, options.lidar_views, config.seed)


def images_of_levels(encoder: Any, levels: tuple[Level, ...]) -> int:
    """How many images have features enough at every level."""
    return max(images_needed(encoder.embed_dim, windows(encoder.grid, level)) for level in levels)
