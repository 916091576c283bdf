"""The step that collapse is measured on: what both encoders say of whole images, at every level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hjepa_engine.config.schema import Level
from hjepa_engine.levels import pool_sliding
from hjepa_engine.types import Batch, Outputs, unwrap


def feature_map_step(modules: nn.ModuleDict, batch: Batch, levels: Sequence[Level]) -> Outputs:
    """Features of whole images, without gradients.

    Args:
        modules: encoders by name, each with ``grid`` and ``features(images, depths=...)``.
        batch: ``images`` (B, C, H, W), normalized.
        levels: of the hierarchy.

    Returns:
        For each encoder its tokens (B, N, D) under its name, and for each level ``<name>_level_<l>`` (B, cells, D): the
        means of all windows of ``pool`` x ``pool`` patches, wherever they begin, at the level's depth.
    """
    depths = sorted({level.depth for level in levels} | {1.0})
    outputs: Outputs = {}
    with torch.no_grad():
        for name, module in modules.items():
            encoder = unwrap(module)
            features = dict(zip(depths, encoder.features(batch["images"], depths=depths), strict=True))
            outputs[name] = features[1.0]
            for number, level in enumerate(levels):
                outputs[f"{name}_level_{number}"] = pool_sliding(features[level.depth], encoder.grid, level)
    return outputs
