"""What each encoder says of the images of a task."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from hjepa_engine import Config
from hjepa_engine.config.schema import resolve_levels
from hjepa_engine.data import open_digit_maps
from hjepa_engine.recipes.common.gathering import SPLITS, ProbeData, gather_splits
from hjepa_engine.recipes.evaluation.task import Encoder, Readings
from hjepa_engine.steps import patch_pixels_step, readings_step
from hjepa_engine.types import Step

Grid = tuple[int, int]


def read_images(config: Config, encoder: Encoder, device: torch.device, data: ProbeData) -> Readings:
    """Features of whole images: see :func:`~hjepa_engine.steps.readings_step`."""
    levels = () if config.model.class_path is not None else resolve_levels(config)
    return _read(config, encoder, device, data, partial(readings_step, levels=levels))


def read_patches(config: Config, encoder: Encoder, device: torch.device, data: ProbeData, grid: Grid) -> Readings:
    """All patch tokens, (n, N, D), or the pixels of all patches, and the labels of the images."""
    return _read(config, encoder, device, data, _patches(encoder, grid))


def read_maps(config: Config, encoder: Encoder, device: torch.device, grid: Grid) -> Readings:
    """Patch tokens or pixels of patches as :func:`read_patches`, of pages of digits with a label for each patch."""
    data = {name: open_digit_maps(config.data, name, config.seed, grid) for name in SPLITS}
    return _read(config, encoder, device, data, _patches(encoder, grid))


def grid_of(encoder: nn.Module | None) -> Grid | None:
    """Patches in a column and in a row; None: the encoder does not say."""
    return getattr(encoder, "grid", None)


def _patches(encoder: Encoder, grid: Grid) -> Step:
    return partial(patch_pixels_step, grid=grid) if encoder.module is None else partial(readings_step, patches=True)


def _read(config: Config, encoder: Encoder, device: torch.device, data: ProbeData, step: Step) -> Readings:
    train, test = gather_splits(config, step, encoder.module, device, data)
    return Readings(train, test, data["probe"].num_classes)
