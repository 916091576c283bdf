"""Feature-map step: features of whole images at every level, to measure collapse on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hjepa_engine.config.schema import Level
from hjepa_engine.levels import as_tokens, pool_sliding
from hjepa_engine.types import Batch, Outputs, unwrap


def feature_map_step(modules: nn.ModuleDict, batch: Batch, levels: Sequence[Level] = ()) -> Outputs:
    """Compute features of whole images, without gradients.

    Args:
        modules: encoders by name, from images to tokens (B, N, D) or features (B, D); where there are levels, with ``grid``
            and ``features(images, depths=...)``.
        batch: ``images`` (B, C, H, W), normalized.
        levels: levels of the hierarchy; may be empty. Levels of pixels (depth 0) are left out: no training changes them.

    Returns:
        ``<name>`` (B, N, D), the tokens of each encoder, and ``<name>_level_<l>`` (B, cells, D), its features at the level's
        depth, averaged over every ``pool`` x ``pool`` cell of patches (stride 1).
    """
    of_features = {number: level for number, level in enumerate(levels) if level.depth}
    depths = sorted({level.depth for level in of_features.values()} | {1.0})
    outputs: Outputs = {}
    with torch.no_grad():
        for name, module in modules.items():
            encoder = unwrap(module)
            if not levels:
                outputs[name] = as_tokens(encoder(batch["images"]))
                continue
            features = dict(zip(depths, encoder.features(batch["images"], depths=depths), strict=True))
            outputs[name] = features[1.0]
            for number, level in of_features.items():
                outputs[f"{name}_level_{number}"] = pool_sliding(features[level.depth], encoder.grid, level)
    return outputs
