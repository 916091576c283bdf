"""Extraction step: features of chosen blocks and levels, as they are saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hjepa_engine.config.schema import Level
from hjepa_engine.levels import as_tokens, pool_disjoint
from hjepa_engine.types import Batch, Outputs, unwrap


def extraction_step(
    modules: nn.ModuleDict,
    batch: Batch,
    blocks: Sequence[int] = (),
    levels: Mapping[int, Level] | None = None,
    pooled: bool = True,
) -> Outputs:
    """Compute features of whole images, without gradients.

    Args:
        modules: ``encoder``; where blocks or levels are asked for, a ``ContextEncoder``.
        batch: ``images`` (B, C, H, W), normalized.
        blocks: whose outputs are wanted, from 1.
        levels: of the hierarchy, by number.
        pooled: average the tokens of each image; if False, keep them.

    Returns:
        ``last``, after the last norm, ``block_<n>`` and ``level_<l>``: (B, D), or (B, N, D), of a level (B, cells, D),
        disjoint cells row by row.
    """
    encoder, images = unwrap(modules["encoder"]), batch["images"]
    levels = levels or {}
    with torch.no_grad():
        if not blocks and not levels:
            found = {1.0: as_tokens(encoder(images))}
        else:
            shares = {number: number / encoder.depth for number in blocks}
            # The last block's own output is that of a share just below 1, which is before the norm.
            shares = {number: min(share, 1 - 0.25 / encoder.depth) for number, share in shares.items()}
            depths = sorted({1.0, *shares.values(), *(level.depth for level in levels.values())})
            found = dict(zip(depths, encoder.features(images, depths=depths), strict=True))
    outputs = {"last": found[1.0]}
    outputs |= {f"block_{number}": found[shares[number]] for number in blocks}
    for number, level in levels.items():
        tokens = found[level.depth]
        outputs[f"level_{number}"] = tokens if pooled else pool_disjoint(tokens, encoder.grid, level.pool)
    return {name: (tokens.mean(dim=1) if pooled else tokens).float() for name, tokens in outputs.items()}
